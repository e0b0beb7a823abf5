//! The router that every caller runs: which replica takes which request, and when.
//!
//! Pure state: no socket, no clock, no thread. A driver (the proxy's shard, a handle in an asyncio loop, a blocked thread)
//! tells what happened and carries out the [`Action`]s; `W` is its own word for somebody who waits. A [`Lease`] is the right
//! to one slot of one replica; the driver gives every lease back through exactly one of [`Engine::answered`],
//! [`Engine::busy`], [`Engine::returned`] and [`Engine::unsent`], and one of a link that has closed frees nothing.

mod admit;
mod affinity;
pub mod batch;
mod bind;
pub mod limit;
mod links;
mod members;
mod own;
pub mod pattern;
mod pick;
mod replica;
mod reserve;
pub mod route;
mod schedule;
pub mod split;
pub mod streams;
mod traffic;

use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

use slab::Slab;

pub use self::{
    admit::Seq,
    affinity::Affinity,
    bind::Batch,
    replica::Candidate,
    reserve::Assigned,
    route::RouteTable,
    schedule::Schedules,
    split::Splitter,
    streams::Streams,
    traffic::{SplitKey, Turn},
};
use self::{
    admit::{Queue, Since},
    batch::Window,
    bind::Due,
    members::Deployments,
    pick::{Picker, Rule},
    replica::Replica,
    traffic::Split,
};
use crate::{error::Error, snapshot};

/// A deployment, until a snapshot does not hold it; a request that outlives it meets no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeploymentKey {
    index: u32,
    /// No two deployments of an engine have the same.
    life: u32,
}

impl DeploymentKey {
    /// One that no engine has.
    pub const NONE: Self = Self { index: u32::MAX, life: 0 };
}

/// A replica, until [`Engine::closed`] after its [`Action::Close`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaKey(usize);

impl ReplicaKey {
    /// Small and dense, for drivers that keep links in a vector.
    pub fn index(self) -> usize {
        self.0
    }
}

/// A request's place in the order of arrival at its deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where it waits.
    pub deployment: DeploymentKey,
    /// Since when.
    pub seq: Seq,
    /// Where it would like to go.
    pub affinity: Affinity,
    since: Since,
}

/// The right to one slot of one replica.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the slot is taken until the lease is given back"]
pub struct Lease {
    /// Who takes the request.
    pub replica: ReplicaKey,
    /// The request that it is for.
    pub place: Place,
    /// The REQUEST or CALL, or the BATCH that it is part of, carries GRANTED.
    pub granted: bool,
    session: u64,
    /// With whom it shares the slot, see [`bind`].
    batch: Option<usize>,
}

/// What becomes of a new request.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// Send it now.
    Go(Lease),
    /// It waits here; an action will name its waiter.
    Wait(Place),
}

/// What the driver has to do.
#[derive(Debug, PartialEq)]
pub enum Action<W> {
    /// A waiting request may be sent.
    Start(W, Lease),
    /// Waiting requests may be sent, all in one go.
    Batch(Batch<W>),
    /// A waiting request fails.
    Refuse(W, Error),
    /// Link to this replica and keep trying while it is not closed.
    Open(ReplicaKey, snapshot::Replica),
    /// Leave this replica when its last stream has ended, then call [`Engine::closed`].
    Close(ReplicaKey),
    /// Send UNUSED with this count.
    Unused(ReplicaKey, u32),
    /// A router in Python chooses from now on, also for those who wait already: see [`Engine::waiters`].
    Ask(DeploymentKey),
    /// Targets of splits have become ready, or are so no more, or others: whoever waits for one chooses again.
    Readiness,
}

#[derive(Debug)]
struct Deployment<W> {
    life: u32,
    config: snapshot::Deployment,
    /// Why every request is refused.
    gone: Option<Error>,
    members: Vec<ReplicaKey>,
    picker: Picker,
    queue: Queue<W>,
    /// Its requests go in batches.
    window: Option<Window>,
    /// When [`Engine::seal`] is to look at it again.
    alarm: Option<Instant>,
}

/// See the module.
#[derive(Debug)]
pub struct Engine<W> {
    /// The caller's, for requests that prefer it.
    node: Option<String>,
    /// All do, where the policy leaves it open.
    near_first: bool,
    deployments: Deployments<W>,
    by_name: HashMap<String, DeploymentKey>,
    replicas: Slab<Replica>,
    by_id: HashMap<String, ReplicaKey>,
    /// Sorted by name.
    splits: Vec<Split>,
    schedules: Schedules,
    /// Goes up with every snapshot.
    split_life: u32,
    lives: u32,
    sessions: u64,
    actions: VecDeque<Action<W>>,
    /// Deployments whose queue has to be looked at with a clock.
    due: Due,
}

impl<W> Default for Engine<W> {
    fn default() -> Self {
        Self {
            node: None,
            near_first: false,
            deployments: Deployments::default(),
            by_name: HashMap::new(),
            replicas: Slab::new(),
            by_id: HashMap::new(),
            splits: Vec::new(),
            schedules: Schedules::default(),
            split_life: 0,
            lives: 0,
            sessions: 0,
            actions: VecDeque::new(),
            due: Due::default(),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "a lease is given back by being consumed")]
impl<W> Engine<W> {
    /// One of several that share their splits' traffic out together.
    pub fn sharing(schedules: Schedules) -> Self {
        Self { schedules, ..Self::default() }
    }

    /// Knows which replicas are on its own node, for requests that would like those; with `near_first`, those of deployments
    /// whose policy only balances all do.
    #[must_use]
    pub fn on(self, node: String, near_first: bool) -> Self {
        Self { node: Some(node), near_first, ..self }
    }

    /// The next thing to do; a driver asks until there is none, after every event.
    pub fn next_action(&mut self) -> Option<Action<W>> {
        self.actions.pop_front()
    }

    /// The deployment of this name, `{app}#{deployment}`.
    pub fn deployment(&self, name: &str) -> Option<DeploymentKey> {
        self.by_name.get(name).copied()
    }

    /// What the newest snapshot says of a deployment.
    pub fn config(&mut self, key: DeploymentKey) -> Option<&snapshot::Deployment> {
        self.deployments.at(key).map(|deployment| &deployment.config)
    }

    /// A new request: goes, waits (`waiter` is then asked for), or is refused.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Deleted`] and [`Error::Backpressure`].
    pub fn request(
        &mut self,
        key: DeploymentKey,
        affinity: Affinity,
        waiter: impl FnOnce(Place) -> W,
    ) -> Result<Admission, Error> {
        let deployment = self.deployments.open(key)?;
        let place = Place { deployment: key, seq: deployment.queue.arrive(), affinity, since: None };
        let at_once = deployment.queue.is_clear() && deployment.window.is_none();
        let aside = self.awaits_own(place);
        if at_once
            && !aside
            && let Some(lease) = self.lease(place)
        {
            return Ok(Admission::Go(lease));
        }
        if let Some(full) = self.full(key) {
            // Better elsewhere than nowhere.
            let lease = if at_once && aside { self.lease(place) } else { None };
            return lease.map(Admission::Go).ok_or(full);
        }
        self.wait(place, aside, waiter(place));
        Ok(Admission::Wait(place))
    }

    /// Why one more may not wait.
    fn full(&mut self, key: DeploymentKey) -> Option<Error> {
        let Deployment { queue, config, .. } = self.deployments.at(key)?;
        let limit = usize::try_from(config.max_queued_requests).ok().filter(|&limit| queue.len() >= limit)?;
        let (queued, policy) = (queue.len(), config.backpressure);
        let queued = queued - self.forming(key);
        (queued >= limit).then_some(Error::Backpressure { queued, limit, policy })
    }

    fn wait(&mut self, place: Place, aside: bool, waiter: W) {
        if let Some(Deployment { queue, .. }) = self.deployments.at(place.deployment) {
            let push = if aside { Queue::push_aside } else { Queue::push };
            push(queue, place.seq, place.affinity, place.since, waiter);
            self.touch(place.deployment);
        }
    }

    /// A request that came back unbegun, or is tried once more, takes its old place again; limits do not refuse it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Deleted`].
    pub fn again(&mut self, place: Place, waiter: impl FnOnce(Place) -> W) -> Result<Admission, Error> {
        let deployment = self.deployments.open(place.deployment)?;
        let at_once = !deployment.queue.has_before(place.seq) && deployment.window.is_none();
        let aside = self.awaits_own(place);
        if at_once
            && !aside
            && let Some(lease) = self.lease(place)
        {
            return Ok(Admission::Go(lease));
        }
        self.wait(place, aside, waiter(place));
        Ok(Admission::Wait(place))
    }

    /// Somebody waits no more; `None` if an action has already named the waiter.
    pub fn cancel(&mut self, place: Place) -> Option<W> {
        self.deployments.at(place.deployment)?.queue.cancel(place.seq)
    }

    fn lease(&mut self, place: Place) -> Option<Lease> {
        let Deployment { members, picker, .. } = self.deployments.at(place.deployment)?;
        let key = picker.pick(&self.replicas, members, place.affinity)?;
        self.take(key, place)
    }

    fn take(&mut self, key: ReplicaKey, place: Place) -> Option<Lease> {
        let replica = &mut self.replicas[key.0];
        let session = replica.session?;
        Some(Lease { replica: key, place, granted: replica.take(place.affinity), session, batch: None })
    }

    /// Starts whoever waits first while there is room; those behind one that waits for its own replica pass it.
    fn dispatch(&mut self, deployment: DeploymentKey) {
        if self.touch(deployment) {
            return;
        }
        while let Some((seq, affinity)) = self.deployments.at(deployment).and_then(|it| it.queue.first()) {
            let place = Place { deployment, seq, affinity, since: None };
            if self.awaits_own(place) {
                self.deployments.at(deployment).into_iter().for_each(|it| it.queue.step_aside());
                continue;
            }
            let Some(lease) = self.lease(place) else { return };
            if let Some(waiter) = self.deployments.at(deployment).and_then(|it| it.queue.pop()) {
                self.actions.push_back(Action::Start(waiter, lease));
            }
        }
    }

    /// The replica of a lease, if its link is still the one of the lease.
    fn holder(&mut self, lease: &Lease) -> Option<&mut Replica> {
        self.replicas.get_mut(lease.replica.0).filter(|replica| replica.session == Some(lease.session))
    }

    /// Whether the link that a lease was made for is still up.
    pub fn holds(&self, lease: &Lease) -> bool {
        self.replicas.get(lease.replica.0).is_some_and(|replica| replica.session == Some(lease.session))
    }

    /// The request was never sent: its slot is free, and so is the credit that it would have used.
    pub fn unsent(&mut self, lease: Lease) {
        if let Some(replica) = self.holder(&lease)
            && replica.unsend(&lease)
        {
            self.spend(lease.replica);
        }
    }

    /// The replica's final frame came: the slot is free.
    pub fn answered(&mut self, lease: Lease, report: Option<(u16, bool)>) {
        if let Some(replica) = self.holder(&lease)
            && replica.give_back(&lease)
        {
            if let Some((load, fast)) = report {
                replica.report(load, fast && lease.batch.is_none());
            }
            self.dispatch(lease.place.deployment);
        }
    }

    /// BUSY: not begun, and the replica owes a credit. The place is for [`Engine::again`].
    pub fn busy(&mut self, lease: Lease, load: u16) -> Place {
        if let Some(replica) = self.holder(&lease) {
            replica.refused(lease.batch);
            if replica.give_back(&lease) {
                replica.report(load, false);
            }
        }
        lease.place
    }

    /// RETURNED: held, never begun. The place is for [`Engine::again`].
    pub fn returned(&mut self, lease: Lease) -> Place {
        if let Some(replica) = self.holder(&lease) {
            replica.give_back(&lease);
            if !std::mem::replace(&mut replica.draining, true) {
                self.reckon();
            }
        }
        lease.place
    }
}

#[cfg(test)]
mod tests;
