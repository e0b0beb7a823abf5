//! Batches of the router, bound late: which requests of a deployment's queue go together, when, and to which replica.
//!
//! [`Window::decide`] says when; a batch takes one slot of a replica, which its leases share: it is free when the last of
//! them has come back, however each of them did. The engine has no clock. What happens only marks a deployment, and the
//! driver brings the time to [`Engine::seal`] when it has told all that it knows, so that what came together goes together.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    Action, Affinity, Deployment, DeploymentKey, Engine, Lease, Place,
    batch::{Reason, Verdict, Window},
    replica::Replica,
};
use crate::{snapshot, wire::MAX_BATCH};

/// Requests that are to be sent in one go, in their order of arrival.
#[derive(Debug, PartialEq)]
pub struct Batch<W> {
    /// Who waited, and the lease of each; all of one replica.
    pub items: Vec<(W, Lease)>,
    /// Why it was released.
    pub reason: Reason,
    /// For how long its first request had waited.
    pub waited: Duration,
}

/// The slot of a batch, as its leases share it.
#[derive(Debug)]
pub(super) struct Shared {
    /// Leases that have not come back.
    left: usize,
    /// One of its requests was sent.
    pub(super) sent: bool,
    /// It was answered BUSY.
    pub(super) refused: bool,
    /// What the slot was taken with.
    pub(super) wish: Affinity,
}

/// Deployments to look at, and when.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Due {
    touched: BTreeSet<DeploymentKey>,
    alarms: BTreeSet<(Instant, DeploymentKey)>,
}

impl From<snapshot::Batch> for Window {
    fn from(batch: snapshot::Batch) -> Self {
        let max_size = batch.max_size.clamp(1, MAX_BATCH);
        // What no Duration can hold is a wait without end.
        Self { max_size, wait: Duration::try_from_secs_f64(batch.wait_s.max(0.0)).unwrap_or(Duration::MAX) }
    }
}

impl Replica {
    /// One lease of a batch comes back; the batch if it was the last.
    pub(super) fn leave(&mut self, batch: usize, sent: bool) -> Option<Shared> {
        let shared = self.batches.get_mut(batch)?;
        shared.left -= 1;
        shared.sent |= sent;
        if shared.left == 0 { self.batches.try_remove(batch) } else { None }
    }
}

impl<W> Engine<W> {
    /// Whether the requests of this deployment go in batches.
    pub fn is_batched(&mut self, key: DeploymentKey) -> bool {
        self.deployments.at(key).is_some_and(|deployment| deployment.window.is_some())
    }

    /// Whether something has happened for which [`Engine::seal`] is to be called.
    pub fn is_due(&self) -> bool {
        !self.due.touched.is_empty()
    }

    /// Binds the batches that can be bound at `now`; actions name them. Returns when to call again if nothing happens.
    pub fn seal(&mut self, now: Instant) -> Option<Instant> {
        while let Some(&(at, key)) = self.due.alarms.first()
            && at <= now
        {
            self.due.alarms.pop_first();
            self.due.touched.insert(key);
        }
        while let Some(key) = self.due.touched.pop_first() {
            self.forget_alarm(key);
            self.bind_all(key, now);
        }
        self.due.alarms.first().map(|(at, _)| *at)
    }

    /// Marks a deployment whose requests go in batches; `false`: they do not.
    pub(super) fn touch(&mut self, key: DeploymentKey) -> bool {
        let batched = self.is_batched(key);
        if batched {
            self.due.touched.insert(key);
        }
        batched
    }

    pub(super) fn forget_alarm(&mut self, key: DeploymentKey) {
        if let Some(at) = self.deployments.at(key).and_then(|deployment| deployment.alarm.take()) {
            self.due.alarms.remove(&(at, key));
        }
    }

    /// Requests in the queue that are not queued but are the next batches: there are slots for them.
    pub(super) fn forming(&mut self, key: DeploymentKey) -> usize {
        let replicas = &self.replicas;
        let Some(Deployment { window: Some(window), members, queue, .. }) = self.deployments.at(key) else { return 0 };
        let slots = members.iter().filter_map(|member| replicas.get(member.0)).map(Replica::slots).sum::<u32>();
        window.max_size.saturating_mul(slots as usize).min(queue.len())
    }

    fn bind_all(&mut self, key: DeploymentKey, now: Instant) {
        let Some(deployment) = self.deployments.at(key) else { return };
        deployment.queue.stamp(now);
        loop {
            let Some(deployment) = self.deployments.at(key) else { return };
            let (Some(window), queue) = (deployment.window, &deployment.queue) else { return self.dispatch(key) };
            let slot = deployment.members.iter().any(|member| self.replicas[member.0].has_room());
            match window.decide(window.front(queue.len(), queue.oldest(now)), slot, now) {
                Verdict::Take(count, reason) => {
                    if !self.bind(key, count, reason, now) {
                        break;
                    }
                }
                Verdict::Until(at) => {
                    deployment.alarm = Some(at);
                    self.due.alarms.insert((at, key));
                    break;
                }
                Verdict::Idle => break,
            }
        }
        self.return_credits(key);
    }

    /// Binds the first `count`; `false`: the deployment's policy chooses no replica.
    fn bind(&mut self, key: DeploymentKey, count: usize, reason: Reason, now: Instant) -> bool {
        let Some(deployment) = self.deployments.at(key) else { return false };
        let Some((_, wish)) = deployment.queue.first() else { return false };
        let Some(member) = deployment.picker.pick(&self.replicas, &deployment.members, wish) else { return false };
        let replica = &mut self.replicas[member.0];
        let Some(session) = replica.session else { return false };
        let waited =
            deployment.queue.oldest(now).map_or(Duration::ZERO, |oldest| now.saturating_duration_since(oldest));
        let granted = replica.take(wish);
        let batch = Some(replica.batches.insert(Shared { left: count, sent: false, refused: false, wish }));
        let taken = std::iter::from_fn(|| deployment.queue.take()).take(count);
        let items = taken.map(|(seq, affinity, since, waiter)| {
            let place = Place { deployment: key, seq, affinity, since };
            (waiter, Lease { replica: member, place, granted, session, batch })
        });
        let items = items.collect();
        self.actions.push_back(Action::Batch(Batch { items, reason, waited }));
        true
    }

    /// Credits are used at once or not at all.
    fn return_credits(&mut self, key: DeploymentKey) {
        let Some(deployment) = self.deployments.at(key) else { return };
        for &member in &deployment.members {
            let unused = self.replicas[member.0].unused();
            if unused > 0 {
                self.actions.push_back(Action::Unused(member, unused));
            }
        }
    }
}
