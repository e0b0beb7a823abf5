//! Drives the engine for handles: carries out its actions on links (`linking.rs`), and feeds it what they bring (`frames.rs`).
//!
//! It holds only the deployments that this process calls. Everything here happens under the caller's lock and without a
//! system call that waits. A call whose deployment the snapshot does not name waits for one that was taken after it began.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mio::Registry;
use rayserve_dataplane::{
    engine::{Action, Admission, DeploymentKey, Engine, Lease, Place as QueuePlace, ReplicaKey},
    error::Error,
    snapshot::{Replica, Snapshot, Version},
    tally::{Tallies, Tally},
    wire::{Header, Kind},
};
use slab::Slab;

use super::{
    aim::Held,
    deadlines::Deadlines,
    link::{Link, Sent},
    pending::{Needs, Outcome, Pending, Place},
    split::Way,
};

/// How long a call waits for a controller that cannot be asked whether its deployment exists, or does not answer.
pub(super) const UNROUTED: Duration = Duration::from_secs(10);
/// Why a call is not begun.
pub(super) const LATE: Bytes =
    Bytes::from_static(b"the time of the request was over before this call of it could begin");
const SCRATCH: usize = 64 * 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Router {
    pub(super) engine: Engine<Arc<Pending>>,
    pub(super) links: Slab<Link>,
    pub(super) by_key: HashMap<ReplicaKey, usize>,
    /// Replicas that could not be reached, and when to try again.
    pub(super) lost: Vec<(Instant, ReplicaKey, Replica)>,
    /// Calls whose deployment the snapshot does not hold, and since when.
    unrouted: Vec<(Instant, Arc<Pending>)>,
    /// Calls of splits that wait, and some that have waited.
    pub(super) roaming: Vec<Arc<Pending>>,
    /// Calls whose arguments may have come.
    ripe: Vec<Arc<Pending>>,
    pub(super) used: HashSet<String>,
    /// Calls whose replica somebody else chooses.
    pub(super) held: Held,
    pub(super) deadlines: Deadlines,
    snapshot: Option<Snapshot>,
    /// When the window of a batch ends.
    pub(super) alarm: Option<Instant>,
    pub(super) tallies: Tallies,
    /// Those of the deployments that the engine holds.
    pub(super) tally_of: HashMap<DeploymentKey, Arc<Tally>>,
    pub(super) unflushed: Vec<usize>,
    pub(super) scratch: Box<[u8]>,
    pub(super) registry: Registry,
    pub(super) node_id: String,
    pub(super) token: Arc<[u8]>,
    /// There are unrouted calls, and nobody has been told.
    pub(super) doubts: bool,
    /// Calls that have not ended.
    pub(super) outstanding: usize,
    /// Those of them that somebody waits for.
    pub(super) attended: usize,
    /// Calls since the start.
    pub(super) calls: u64,
}

impl Router {
    pub(super) fn new(node_id: String, token: Arc<[u8]>, registry: Registry) -> Self {
        Self {
            engine: Engine::default().on(node_id.clone(), false),
            links: Slab::new(),
            by_key: HashMap::new(),
            lost: Vec::new(),
            unrouted: Vec::new(),
            roaming: Vec::new(),
            ripe: Vec::new(),
            used: HashSet::new(),
            held: Held::default(),
            deadlines: Deadlines::default(),
            snapshot: None,
            alarm: None,
            tallies: Tallies::default(),
            tally_of: HashMap::new(),
            unflushed: Vec::new(),
            scratch: vec![0; SCRATCH].into_boxed_slice(),
            registry,
            node_id,
            token,
            doubts: false,
            outstanding: 0,
            attended: 0,
            calls: 0,
        }
    }

    pub(super) fn links(&self) -> usize {
        self.links.iter().filter(|(_, link)| link.deadline().is_none()).count()
    }

    /// Starts a call: it is on its way (or, with `cork`, at the next [`Self::settle`]), queued or refused when this returns.
    pub(super) fn begin(&mut self, call: &Arc<Pending>, cork: bool) {
        self.calls += 1;
        self.outstanding += 1;
        let needs = call.ask();
        self.enter(call, needs);
        if cork { self.act() } else { self.settle() }
    }

    /// Puts a call on its way if its arguments are there.
    fn enter(&mut self, call: &Arc<Pending>, needs: Needs) {
        match needs {
            Needs::Waiting => return self.park(call, Place::Needing),
            Needs::Failed(index) => return self.finish(call, Outcome::Argument(index)),
            Needs::Met => {}
        }
        self.use_deployment(&call.deployment);
        self.route(call);
    }

    pub(super) fn route(&mut self, call: &Arc<Pending>) {
        let key = match self.engine.deployment(&call.deployment).map_or_else(|| self.way(call), Way::To) {
            Way::To(key) => key,
            Way::Wait => return,
            Way::Refused(error) => return self.finish(call, Outcome::Refused(error)),
            Way::Unknown => {
                self.park(call, Place::Unrouted);
                self.unrouted.push((Instant::now(), Arc::clone(call)));
                self.doubts = true;
                return;
            }
        };
        if self.hold(call) {
            return;
        }
        let admission = self.engine.request(key, call.affinity, |_| Arc::clone(call));
        self.admitted(call, admission);
    }

    /// Puts a call that came back unbegun into its old place.
    pub(super) fn again(&mut self, call: &Arc<Pending>, place: QueuePlace) {
        if call.place() == Place::Done {
            return; // cancelled meanwhile
        }
        if self.hold(call) {
            return;
        }
        let admission = self.engine.again(place, |_| Arc::clone(call));
        self.admitted(call, admission);
    }

    fn admitted(&mut self, call: &Arc<Pending>, admission: Result<Admission, Error>) {
        match admission {
            Ok(Admission::Go(lease)) => self.send(call, lease),
            Ok(Admission::Wait(place)) => {
                self.park(call, Place::Queued(place));
                if self.engine.is_custom(place.deployment) {
                    self.held.fresh.push(Arc::clone(call));
                }
                self.settle_in(call, place.deployment);
            }
            Err(error) if self.reroutes(call, &error, false) => {}
            Err(error) => self.finish(call, Outcome::Refused(error)),
        }
    }

    pub(super) fn send(&mut self, call: &Arc<Pending>, lease: Lease) {
        let Some(&index) = self.by_key.get(&lease.replica) else {
            let place = self.engine.returned(lease);
            return self.again(call, place);
        };
        if self.put(call, lease, index, false).is_some() && self.unflushed.last() != Some(&index) {
            self.unflushed.push(index);
        }
    }

    /// Appends a call to a link, and says under which stream id; none: it has ended instead.
    pub(super) fn put(&mut self, call: &Arc<Pending>, lease: Lease, index: usize, batched: bool) -> Option<u32> {
        if call.is_late() {
            self.engine.unsent(lease);
            self.refuse_late(call);
            return None;
        }
        let sent = self.links[index].send_call(call, lease, index, batched);
        sent.map_err(|lease| {
            self.engine.unsent(lease);
            self.finish(call, Outcome::Refused(Error::Internal("a million calls are open on one link".into())));
        })
        .ok()
    }

    pub(super) fn finish(&mut self, call: &Arc<Pending>, outcome: Outcome) {
        if call.place() != Place::Done {
            self.outstanding -= 1;
            self.attended -= usize::from(call.attended());
            self.ripe.extend(call.finish(outcome));
        }
    }

    /// Ends a call from here. A replica that has begun it is told; its slot comes back with the replica's last frame.
    pub(super) fn cancel(&mut self, call: &Arc<Pending>) -> bool {
        match call.place() {
            Place::Done => return false,
            Place::Sent { link, stream } => {
                self.links[link].send(Header::new(Kind::Cancel, stream));
                self.unflushed.push(link);
            }
            _ => self.withdraw(call),
        }
        self.finish(call, Outcome::Cancelled);
        self.settle();
        true
    }

    /// Takes a call out of where it waits.
    pub(super) fn withdraw(&mut self, call: &Arc<Pending>) {
        match call.place() {
            Place::Unrouted => {
                self.unrouted.retain(|(_, other)| !Arc::ptr_eq(other, call));
                self.roaming.retain(|other| !Arc::ptr_eq(other, call));
            }
            Place::Queued(place) => drop(self.engine.cancel(place)),
            Place::Held => self.held.remove(call),
            Place::Needing | Place::Sent { .. } | Place::Done => {}
        }
    }

    /// Items were taken: the replica may send as many bytes more.
    pub(super) fn credit(&mut self, call: &Pending, bytes: u32) {
        if let Place::Sent { link, stream } = call.place() {
            self.widen(link, stream, bytes);
            self.settle();
        }
    }

    pub(super) fn widen(&mut self, link: usize, stream: u32, bytes: u32) {
        if bytes > 0 {
            self.links[link].send(Header::new(Kind::Window, stream).aux(bytes));
            self.unflushed.push(link);
        }
    }

    /// Takes over a newer snapshot. One that is the present one, `asked` for then, ends the calls that had begun before and
    /// whose deployment it does not name.
    pub(super) fn publish(&mut self, snapshot: Snapshot, asked: Option<Instant>) {
        if self.snapshot.as_ref().is_none_or(|old| snapshot.version > old.version) {
            self.snapshot = Some(snapshot);
            self.apply();
        }
        for (since, call) in std::mem::take(&mut self.unrouted) {
            if self.knows(&call) {
                self.route(&call);
            } else if asked.is_some_and(|asked| since <= asked) {
                self.finish(&call, Outcome::Unknown);
            } else {
                self.unrouted.push((since, call));
            }
        }
        self.settle();
    }

    pub(super) fn version(&self) -> Option<Version> {
        self.snapshot.as_ref().map(|snapshot| snapshot.version)
    }

    /// No snapshot could be had: unrouted calls that have waited for long wait no more.
    pub(super) fn unpublished(&mut self, why: &str) {
        let (late, early): (Vec<_>, _) =
            std::mem::take(&mut self.unrouted).into_iter().partition(|(since, _)| since.elapsed() > UNROUTED);
        self.unrouted = early;
        self.doubts = !self.unrouted.is_empty();
        for (_, call) in late {
            self.finish(&call, Outcome::Refused(Error::Unavailable(why.to_owned())));
        }
        self.settle();
    }

    /// Gives the engine what the snapshot says of the deployments that this process calls.
    pub(super) fn apply(&mut self) {
        let Some(snapshot) = &self.snapshot else { return };
        self.engine.apply(&self.relevant(snapshot));
        self.tally_of.retain(|&key, _| self.engine.config(key).is_some());
        self.settle();
    }

    /// Carries out what the engine wants done, and hands the kernel what that has produced.
    pub(super) fn settle(&mut self) {
        loop {
            self.act();
            if self.has_aimed() {
                self.shoot();
            }
            if self.seal() {
                continue;
            }
            let Some(index) = self.unflushed.pop() else { return };
            if let Some(link) = self.links.get_mut(index)
                && let Err(error) = link.flush()
            {
                self.close(index, &error.to_string());
            }
        }
    }

    fn act(&mut self) {
        loop {
            while let Some(action) = self.engine.next_action() {
                match action {
                    Action::Start(call, lease) => self.send(&call, lease),
                    Action::Batch(batch) => self.send_batch(batch),
                    Action::Refuse(call, error) if self.reroutes(&call, &error, true) => {}
                    Action::Refuse(call, error) => self.finish(&call, Outcome::Refused(error)),
                    Action::Ask(key) => self.held.fresh.extend(self.engine.waiters(key).cloned()),
                    Action::Readiness => self.turn(),
                    Action::Open(key, replica) => self.open(key, replica),
                    Action::Close(key) => self.leave(key),
                    Action::Unused(key, count) => {
                        if let Some(&index) = self.by_key.get(&key) {
                            self.links[index].send(Header::new(Kind::Unused, 0).aux(count));
                            self.unflushed.push(index);
                        }
                    }
                }
            }
            let Some(call) = self.ripe.pop() else { return };
            if call.place() == Place::Needing {
                self.enter(&call, call.needs());
            }
        }
    }

    /// Calls that the kernel has not taken: those on a link, and those without one.
    pub(super) fn unsent(&self) -> (usize, usize) {
        let each = self.links.iter().map(|(_, link)| link.sent());
        let (sent, unsent) = each.fold((0, 0), |sum, link| (sum.0 + link.0, sum.1 + link.1));
        (unsent, self.outstanding - sent - unsent)
    }

    /// Ends every call and closes every link.
    pub(super) fn close_all(&mut self) {
        for index in self.links.iter().map(|(index, _)| index).collect::<Vec<_>>() {
            if let Some(link) = self.links.try_remove(index) {
                for (Sent { call, .. }, _) in link.close(&self.registry) {
                    self.finish(&call, Outcome::Closed);
                }
            }
        }
        self.by_key.clear();
        self.lost.clear();
        for (_, call) in std::mem::take(&mut self.unrouted) {
            self.finish(&call, Outcome::Closed);
        }
        for call in std::mem::take(&mut self.roaming) {
            if call.place() == Place::Unrouted {
                self.finish(&call, Outcome::Closed);
            }
        }
        for call in self.held.take() {
            self.finish(&call, Outcome::Closed);
        }
        self.engine.apply(&Snapshot::default());
        while let Some(action) = self.engine.next_action() {
            if let Action::Refuse(call, _) = action {
                self.finish(&call, Outcome::Closed);
            }
        }
        while let Some(call) = self.ripe.pop() {
            self.finish(&call, Outcome::Closed);
        }
    }
}
