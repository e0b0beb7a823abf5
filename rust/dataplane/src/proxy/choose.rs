//! Requests whose replica a router in Python chooses: they wait in the engine's queue, and Python is told by a descriptor.
//!
//! No thread of the proxy waits for Python. A thread of Python's takes [`Choices::take`], and answers with ids; each answer
//! is an order to the shard where the request waits, carried out between two of its events. A request that goes away
//! meanwhile leaves the queue as any other, and the answer then says so. When one that was assigned ends, the same
//! descriptor tells that too: never of more than have been assigned, and those are in flight, which the slots bound.

use std::{
    collections::HashMap,
    io::{Read, Write},
    mem::take,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{Shared, shard::Shard};
use crate::engine::{Assigned, Candidate, DeploymentKey, Place};

/// A shard answers between two events; one that does not is gone, or held up by the machine.
const ANSWER: Duration = Duration::from_secs(5);

/// What Python is told of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the reference's metadata")]
pub struct Choice {
    pub number: u64,
    pub deployment: String,
    pub route: String,
    pub request_id: String,
    pub multiplexed_model_id: String,
    pub session_id: String,
}

/// What Python asks of the shard of a request.
#[derive(Debug)]
pub(super) enum Order {
    Candidates(DeploymentKey, SyncSender<(Vec<Candidate>, Option<String>)>),
    Assign(u64, Place, Vec<Vec<String>>, SyncSender<Assigned>),
}

/// See the module.
pub(super) struct Choices {
    desk: Mutex<Desk>,
    read: UnixStream,
    write: UnixStream,
    /// How long a shard may take for an answer.
    patience: Duration,
}

#[derive(Default)]
struct Desk {
    /// Sorted by number.
    fresh: Vec<Choice>,
    /// Requests that were assigned and have ended.
    ended: Vec<u64>,
    /// Where each request waits, until it has been assigned or its end was noticed.
    open: HashMap<u64, (usize, Place)>,
    next: u64,
    shards: Vec<UnboundedSender<Order>>,
}

impl Choices {
    pub(super) fn new() -> Self {
        let (read, write) = UnixStream::pair().expect("a process can have two more descriptors");
        for socket in [&read, &write] {
            socket.set_nonblocking(true).expect("a socket can be non-blocking");
        }
        Self { desk: Mutex::default(), read, write, patience: ANSWER }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more shard; the number that it is known by.
    pub(super) fn join(&self) -> (usize, UnboundedReceiver<Order>) {
        let (line, orders) = unbounded_channel();
        let mut desk = self.desk();
        desk.shards.push(line);
        (desk.shards.len() - 1, orders)
    }

    /// A request waits at a shard; its number.
    fn ask(&self, shard: usize, place: Place, choice: Choice) -> u64 {
        let mut desk = self.desk();
        let number = desk.next;
        desk.next += 1;
        desk.open.insert(number, (shard, place));
        desk.fresh.push(Choice { number, ..choice });
        self.announce(&desk);
        number
    }

    /// A request has ended, or its choice has led nowhere.
    fn end(&self, number: u64) {
        let mut desk = self.desk();
        if desk.open.remove(&number).is_none() {
            desk.ended.push(number);
            self.announce(&desk);
        } else if let Ok(at) = desk.fresh.binary_search_by_key(&number, |choice| choice.number) {
            desk.fresh.remove(at);
        }
    }

    /// The one byte is always accepted: the last was read when everything was taken.
    fn announce(&self, desk: &Desk) {
        if desk.fresh.len() + desk.ended.len() == 1 {
            let _ = (&self.write).write(&[1]);
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.read.as_raw_fd()
    }

    pub(super) fn take(&self) -> (Vec<Choice>, Vec<u64>) {
        let mut desk = self.desk();
        let _ = (&self.read).read(&mut [0; 8]);
        (take(&mut desk.fresh), take(&mut desk.ended))
    }

    fn order<T>(&self, shard: usize, order: impl FnOnce(SyncSender<T>) -> Order) -> Result<T, RecvTimeoutError> {
        let (reply, answer) = sync_channel(1);
        self.desk().shards[shard].send(order(reply)).map_err(|_| RecvTimeoutError::Disconnected)?;
        answer.recv_timeout(self.patience)
    }

    pub(super) fn candidates(&self, number: u64) -> Option<(Vec<Candidate>, Option<String>)> {
        let (shard, place) = *self.desk().open.get(&number)?;
        self.order(shard, |reply| Order::Candidates(place.deployment, reply)).ok()
    }

    pub(super) fn assign(&self, number: u64, ranks: Vec<Vec<String>>) -> Assigned {
        let Some((shard, place)) = self.desk().open.get(&number).copied() else { return Assigned::Over };
        match self.order(shard, |reply| Order::Assign(number, place, ranks, reply)) {
            Ok(assigned) => assigned,
            // The request may still wait, and nobody else would ask for it. If it was assigned too late to be told, the next
            // attempt says so.
            Err(RecvTimeoutError::Timeout) => Assigned::Full,
            Err(RecvTimeoutError::Disconnected) => Assigned::Over,
        }
    }
}

/// A request of which a router in Python is asked, and told when this is dropped.
pub(super) struct Chosen {
    shared: Arc<Shared>,
    number: u64,
}

impl Chosen {
    /// Asks it.
    pub(super) fn ask(shard: &Shard, place: Place, choice: Choice) -> Self {
        let shared = Arc::clone(&shard.shared);
        let number = shared.choices.ask(shard.index.get(), place, choice);
        Self { shared, number }
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        self.shared.choices.end(self.number);
    }
}

/// Carries out what Python orders.
pub(super) async fn obey(shard: Rc<Shard>, mut orders: UnboundedReceiver<Order>) {
    while let Some(order) = orders.recv().await {
        // Whoever has given up waiting for the answer has lost interest in it.
        match order {
            Order::Candidates(key, reply) => {
                let mut engine = shard.engine.borrow_mut();
                let custom = engine.config(key).and_then(|config| config.router.custom.clone());
                let _ = reply.try_send((engine.candidates(key), custom));
            }
            Order::Assign(number, place, ranks, reply) => {
                let assigned = shard.engine.borrow_mut().assign(place, &ranks);
                if let Assigned::To(_) = assigned {
                    // Here, where requests end: whichever comes first is seen by the other.
                    shard.shared.choices.desk().open.remove(&number);
                }
                shard.settle();
                let _ = reply.try_send(assigned);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::{Admission, Affinity, Engine},
        snapshot::Snapshot,
    };

    /// Of a request that waits.
    fn place() -> Place {
        let json =
            br#"{"version": [1, 1], "deployments": {"a#D": {"app": "a", "name": "D", "max_ongoing_requests": 1}}}"#;
        let mut engine = Engine::default();
        engine.apply(&Snapshot::parse(json).expect("valid"));
        let key = engine.deployment("a#D").expect("declared");
        match engine.request(key, Affinity::default(), |_| ()) {
            Ok(Admission::Wait(place)) => place,
            other => panic!("it does not wait: {other:?}"),
        }
    }

    #[test]
    fn one_that_ends_while_its_shard_is_asked_to_assign_it_was_never_assigned() {
        let choices = Choices::new();
        let (shard, mut orders) = choices.join();
        let number = choices.ask(shard, place(), Choice::default());
        assert_eq!(choices.take().0.len(), 1);
        std::thread::scope(|scope| {
            let assigned = scope.spawn(|| choices.assign(number, Vec::new()));
            let Some(Order::Assign(.., reply)) = orders.blocking_recv() else { panic!("no order came") };
            choices.end(number);
            reply.try_send(Assigned::Over).expect("it is waited for");
            assert_eq!(assigned.join().expect("it does not panic"), Assigned::Over);
        });
        assert_eq!(choices.take(), (vec![], vec![]));
        assert!(choices.desk().open.is_empty());
    }

    #[test]
    fn one_whose_shard_does_not_answer_in_time_is_asked_for_again() {
        let choices = Choices { patience: Duration::from_millis(50), ..Choices::new() };
        let (shard, orders) = choices.join();
        let number = choices.ask(shard, place(), Choice::default());
        assert_eq!(choices.assign(number, Vec::new()), Assigned::Full);
        drop(orders);
        assert_eq!(choices.assign(number, Vec::new()), Assigned::Over, "the shard is gone");
    }
}
