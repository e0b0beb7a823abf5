//! Batches of calls: bound when the engine is given the time, written in one go.
//!
//! Calls of a loop's turn are corked and so bound together; whoever reads answers binds what they make room for. A window
//! that ends while nobody does either is the tender's to notice (`tender.rs`).

use std::{sync::Arc, time::Instant};

use rayserve_dataplane::{
    engine::{Batch, DeploymentKey, Lease},
    snapshot::Deployment,
    tally::{self, Tallies, Tally},
};

use super::{pending::Pending, router::Router, turns::Caller};

impl Router {
    /// Binds what has come together, if anything has happened or is due by now; whether there may be more to act on.
    pub(super) fn seal(&mut self) -> bool {
        if !self.engine.is_due() {
            return false;
        }
        self.alarm = self.engine.seal(Instant::now());
        true
    }

    /// Binds those whose window is over.
    pub(super) fn seal_late(&mut self, now: Instant) {
        if self.alarm.is_some_and(|at| at <= now) {
            self.alarm = self.engine.seal(now);
        }
    }

    pub(super) fn send_batch(&mut self, batch: Batch<Arc<Pending>>) {
        let Some((_, Lease { replica, granted, place, .. })) = batch.items.first() else { return };
        let (deployment, granted) = (place.deployment, *granted);
        let Some(&index) = self.by_key.get(replica) else {
            for (call, lease) in batch.items {
                let place = self.engine.returned(lease);
                self.again(&call, place);
            }
            return;
        };
        let mut streams = Vec::with_capacity(batch.items.len());
        streams.extend(batch.items.into_iter().filter_map(|(call, lease)| self.put(&call, lease, index, true)));
        if !streams.is_empty() {
            self.links[index].send_batch(&streams, granted);
            self.unflushed.push(index);
            self.tally(deployment).add(streams.len(), batch.waited, batch.reason);
        }
    }

    fn tally(&mut self, key: DeploymentKey) -> &Tally {
        self.tally_of.entry(key).or_insert_with(|| {
            let name = self.engine.config(key).map(Deployment::key);
            self.tallies.of(&name.unwrap_or_default())
        })
    }
}

impl Caller {
    /// What is counted of the batches of this process's calls, as JSON.
    pub(super) fn batches(&self) -> String {
        let state = self.lock();
        tally::json(&Tallies::sum(std::iter::once(&state.router.tallies))).to_string()
    }
}
