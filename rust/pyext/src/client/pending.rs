//! One call, from `.remote()` until its outcome is taken.
//!
//! It is shared by the response that Python holds, by the queue or the link that it stands in, and by whoever waits. The
//! outcome is written once; before it, a streaming call collects items. A call whose arguments are answers of others waits
//! for them, and takes their bytes over before anybody else can. `place` and the waiters change only under the caller's
//! lock; their own mutex is never contended and keeps the compiler's promise.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    thread::Thread,
    time::Instant,
};

use bytes::Bytes;
use pyo3::{Py, PyAny};
use rayserve_dataplane::{
    engine::{self, Affinity},
    error::Error,
    wire::{
        Fault, Payload, WINDOW,
        call::{Value, put_relayed},
    },
};

use super::{callee::Callee, mailbox::Mailbox};
use crate::lock::lock;

/// How a call ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The method returned; whoever decodes the value takes it.
    Value(Mutex<Option<Value>>),
    /// The generator has ended.
    End,
    /// The replica answered with an ERROR frame.
    Fault(Fault, Bytes),
    /// The call whose answer is this one's argument of that index has failed.
    Argument(usize),
    /// The replica died with the call begun.
    Died(String),
    /// The router refused it.
    Refused(Error),
    /// No snapshot holds the deployment.
    Unknown,
    /// The one replica that it was for has gone.
    Gone(String),
    /// Cancelled from here.
    Cancelled,
    /// This process closes its handles.
    Closed,
}

/// Where a call stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Until its arguments are there.
    Needing,
    /// Until a snapshot holds its deployment.
    Unrouted,
    Queued(engine::Place),
    /// Until its router has chosen, or the replica that it is for has room.
    Held,
    Sent {
        link: usize,
        stream: u32,
    },
    Done,
}

/// Whom the outcome wakes.
#[derive(Debug)]
enum Waiter {
    Thread(Thread),
    Mailbox(Arc<Mailbox>, u64),
}

/// Who is told when the call has ended, whatever items came before.
#[derive(Debug)]
enum Dependent {
    /// A call that needs its value, and for which of its arguments.
    Call(Arc<Pending>, usize),
    /// One that waits in an asyncio loop.
    Loop(Arc<Mailbox>, u64),
}

#[derive(Debug)]
struct Inner {
    place: Place,
    payload: Payload,
    needs: Vec<Need>,
    dependents: Vec<Dependent>,
    /// Python objects that must live as long as the call.
    keep: Option<Py<PyAny>>,
    waiters: Vec<Waiter>,
    items: VecDeque<Bytes>,
    /// Bytes of items that were taken and not yet credited to the replica.
    taken: u32,
    /// Nobody will take items any more.
    dropped: bool,
}

/// An argument that is the answer of another call.
#[derive(Debug)]
struct Need {
    slot: u32,
    of: Arc<Pending>,
    came: Came,
}

/// How far an argument is.
#[derive(Debug)]
enum Came {
    NotYet,
    Value(Bytes),
    Failed,
}

/// What a call's arguments let it do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// Some are not there.
    Waiting,
    /// All are there, and in the payload.
    Met,
    /// The first that failed.
    Failed(usize),
}

/// A call in flight.
#[derive(Debug)]
pub(super) struct Pending {
    /// `{app}#{deployment}`, or `split:{name}`.
    pub(super) deployment: Arc<str>,
    /// The answer is a stream of items.
    pub(super) stream: bool,
    pub(super) affinity: Affinity,
    /// When the time of the request is over that the call belongs to.
    pub(super) deadline: Option<Instant>,
    /// The one replica that may answer.
    pub(super) target: Option<String>,
    inner: Mutex<Inner>,
    outcome: OnceLock<Outcome>,
}

impl Pending {
    /// `payload` is that of the CALL frame but for the arguments that are answers of other calls.
    pub(super) fn new(
        callee: &Callee,
        mut payload: Payload,
        deadline: Option<Instant>,
        needs: Vec<(u32, Arc<Self>)>,
        keep: Option<Py<PyAny>>,
    ) -> Arc<Self> {
        if needs.is_empty() {
            payload.close();
        }
        let inner = Inner {
            place: Place::Unrouted,
            payload,
            needs: needs.into_iter().map(|(slot, of)| Need { slot, of, came: Came::NotYet }).collect(),
            dependents: Vec::new(),
            keep,
            waiters: Vec::new(),
            items: VecDeque::new(),
            taken: 0,
            dropped: false,
        };
        Arc::new(Self {
            deployment: Arc::clone(&callee.deployment),
            stream: callee.stream,
            affinity: callee.affinity,
            deadline,
            target: callee.target.clone(),
            inner: Mutex::new(inner),
            outcome: OnceLock::new(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    pub(super) fn place(&self) -> Place {
        self.inner().place
    }

    /// Whether no replica has it yet.
    pub(super) fn waits(&self) -> bool {
        !self.is_assigned()
    }

    pub(super) fn is_assigned(&self) -> bool {
        matches!(self.place(), Place::Sent { .. } | Place::Done)
    }

    pub(super) fn move_to(&self, place: Place) {
        self.inner().place = place;
    }

    /// Whether its time is over, unbegun.
    pub(super) fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// The time that is left, in milliseconds, as frames say it: 0 for no end.
    pub(super) fn left_ms(&self) -> u32 {
        let Some(deadline) = self.deadline else { return 0 };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        u32::try_from(left).unwrap_or(u32::MAX).max(1)
    }

    /// The CALL frame's payload, which is kept until the call ends: it may have to be sent again.
    pub(super) fn payload(&self) -> Payload {
        self.inner().payload.clone()
    }

    /// Asks the calls whose answers are arguments of this one for them.
    pub(super) fn ask(self: &Arc<Self>) -> Needs {
        let asked: Vec<_> = self.inner().needs.iter().map(|need| Arc::clone(&need.of)).collect();
        for (index, other) in asked.into_iter().enumerate() {
            if let Some(outcome) = other.outcome() {
                self.inner().needs[index].came = Came::of(outcome);
            } else {
                other.inner().dependents.push(Dependent::Call(Arc::clone(self), index));
            }
        }
        self.needs()
    }

    /// Whether all arguments are there; then they are in the payload from now on.
    pub(super) fn needs(&self) -> Needs {
        let mut inner = self.inner();
        if let Some(index) = inner.needs.iter().position(|need| matches!(need.came, Came::Failed)) {
            return Needs::Failed(index);
        }
        if inner.needs.iter().any(|need| matches!(need.came, Came::NotYet)) {
            return Needs::Waiting;
        }
        for need in std::mem::take(&mut inner.needs) {
            if let Came::Value(value) = need.came {
                put_relayed(&mut inner.payload, need.slot, value);
            }
        }
        inner.payload.close();
        Needs::Met
    }

    pub(super) fn outcome(&self) -> Option<&Outcome> {
        self.outcome.get()
    }

    /// Whether there is something for who waits: the outcome, or an item.
    pub(super) fn is_ready(&self) -> bool {
        self.outcome.get().is_some() || (self.stream && !self.inner().items.is_empty())
    }

    /// An item has come. Returns the bytes to credit at once, and whether somebody waited and has been woken.
    pub(super) fn push(&self, item: Bytes) -> (u32, bool) {
        let mut inner = self.inner();
        if inner.dropped {
            inner.taken += item.len() as u32;
            return (inner.credit(), false);
        }
        inner.items.push_back(item);
        let waiters = std::mem::take(&mut inner.waiters);
        drop(inner);
        let waited = !waiters.is_empty();
        waiters.into_iter().for_each(Waiter::wake);
        (0, waited)
    }

    /// Takes the items that have come; the second value is the credit to send.
    pub(super) fn take_items(&self) -> (VecDeque<Bytes>, u32) {
        let mut inner = self.inner();
        let items = std::mem::take(&mut inner.items);
        inner.taken += items.iter().map(|item| item.len() as u32).sum::<u32>();
        (items, inner.credit())
    }

    /// Items that come from now on are forgotten, so that the method runs to its end; the credit of those that are here.
    pub(super) fn drop_items(&self) -> u32 {
        self.inner().dropped = true;
        self.take_items().1
    }

    /// Whether somebody waits.
    pub(super) fn attended(&self) -> bool {
        !self.inner().waiters.is_empty()
    }

    pub(super) fn wake_thread(&self, thread: Thread) {
        self.inner().waiters.push(Waiter::Thread(thread));
    }

    pub(super) fn forget_thread(&self, gone: &Thread) {
        let mut inner = self.inner();
        let is_gone = |waiter: &Waiter| matches!(waiter, Waiter::Thread(thread) if thread.id() == gone.id());
        if let Some(index) = inner.waiters.iter().position(is_gone) {
            inner.waiters.swap_remove(index);
        }
    }

    pub(super) fn notify(&self, mailbox: Arc<Mailbox>, token: u64) {
        self.inner().waiters.push(Waiter::Mailbox(mailbox, token));
    }

    pub(super) fn notify_of_end(&self, mailbox: Arc<Mailbox>, token: u64) {
        self.inner().dependents.push(Dependent::Loop(mailbox, token));
    }

    pub(super) fn forget_mailbox(&self, token: u64) {
        self.inner().waiters.retain(|waiter| !matches!(waiter, Waiter::Mailbox(_, other) if *other == token));
    }

    /// Ends the call and wakes whoever waits. Returns the calls that have waited for the value, which they have now.
    pub(super) fn finish(&self, outcome: Outcome) -> Vec<Arc<Self>> {
        let (mut waiters, dependents) = {
            let mut inner = self.inner();
            inner.place = Place::Done;
            inner.payload = Payload::default();
            inner.needs.clear();
            inner.keep = None;
            (std::mem::take(&mut inner.waiters), std::mem::take(&mut inner.dependents))
        };
        let mut ripe = Vec::with_capacity(dependents.len());
        // Before anybody can take the value away: who decodes it may change its bytes.
        for dependent in dependents {
            match dependent {
                Dependent::Call(call, index) => {
                    if let Some(need) = call.inner().needs.get_mut(index) {
                        need.came = Came::of(&outcome);
                    }
                    ripe.push(call);
                }
                Dependent::Loop(mailbox, token) => waiters.push(Waiter::Mailbox(mailbox, token)),
            }
        }
        if self.outcome.set(outcome).is_err() {
            return ripe; // cannot be: a call that has ended is not ended again
        }
        waiters.into_iter().for_each(Waiter::wake);
        ripe
    }
}

impl Came {
    fn of(outcome: &Outcome) -> Self {
        let Outcome::Value(value) = outcome else { return Self::Failed };
        let value = lock(value);
        value.as_ref().map_or(Self::Failed, |value| Self::Value(value.payload.clone()))
    }
}

impl Waiter {
    fn wake(self) {
        match self {
            Self::Thread(thread) => thread.unpark(),
            Self::Mailbox(mailbox, token) => mailbox.deliver(token),
        }
    }
}

impl Inner {
    /// What to credit now: nothing until half a window was taken, as the replica can send the other half meanwhile.
    fn credit(&mut self) -> u32 {
        if self.taken >= WINDOW / 2 { std::mem::take(&mut self.taken) } else { 0 }
    }
}
