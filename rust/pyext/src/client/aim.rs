//! Calls whose replica somebody else chooses: a router in Python, a broadcast, a caller that chose before it sends.
//!
//! One for a router waits in the engine's queue as others do, but is shown to Python in `fresh` whenever there is a choice to
//! make; one for a certain replica stands in no queue and waits in `aimed` until that one has room.

use std::sync::Arc;

use rayserve_dataplane::{
    engine::{Affinity, Assigned, Candidate, Lease},
    error::Error,
};

use super::{
    pending::{Outcome, Pending, Place},
    router::Router,
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Not yet shown.
    pub(super) fresh: Vec<Arc<Pending>>,
    aimed: Vec<Arc<Pending>>,
}

impl Held {
    pub(super) fn remove(&mut self, call: &Arc<Pending>) {
        self.aimed.retain(|other| !Arc::ptr_eq(other, call));
    }

    /// All of them, at the end.
    pub(super) fn take(&mut self) -> Vec<Arc<Pending>> {
        self.fresh.clear();
        std::mem::take(&mut self.aimed)
    }
}

impl Router {
    /// Whether the call is for a certain replica; then it is taken care of.
    pub(super) fn hold(&mut self, call: &Arc<Pending>) -> bool {
        if call.target.is_none() {
            return false;
        }
        self.park(call, Place::Held);
        self.held.aimed.push(Arc::clone(call));
        self.shoot();
        true
    }

    /// Sends those whose replica has room, and ends those whose replica has gone.
    pub(super) fn shoot(&mut self) {
        for call in std::mem::take(&mut self.held.aimed) {
            let Some(target) = &call.target else { continue };
            let key = self.engine.deployment(&call.deployment);
            let Some(key) = key.filter(|key| self.engine.replica(*key, target).is_some()) else {
                self.finish(&call, Outcome::Gone(target.clone()));
                continue;
            };
            match self.engine.reserve(key, call.affinity, Some(&[std::slice::from_ref(target)])) {
                Ok(Some(lease)) => self.send(&call, lease),
                Ok(None) => self.held.aimed.push(call),
                Err(error) => self.finish(&call, Outcome::Refused(error)),
            }
        }
    }

    pub(super) fn has_aimed(&self) -> bool {
        !self.held.aimed.is_empty()
    }

    /// Gives a call that waits for its router to a replica, see [`Engine::assign`](rayserve_dataplane::engine::Engine::assign).
    pub(super) fn assign(&mut self, call: &Arc<Pending>, ranks: &[Vec<String>]) -> Assigned {
        let Place::Queued(place) = call.place() else { return Assigned::Over };
        let assigned = self.engine.assign(place, ranks);
        self.settle();
        assigned
    }

    /// The replicas of a deployment; `None` until a snapshot holds it, which is then asked for.
    pub(super) fn candidates(&mut self, deployment: &str) -> Option<(Vec<Candidate>, Option<String>)> {
        self.use_deployment(deployment);
        let Some(key) = self.engine.deployment(deployment) else {
            self.doubts = true;
            return None;
        };
        let custom = self.engine.config(key).and_then(|config| config.router.custom.clone());
        Some((self.engine.candidates(key), custom))
    }

    /// A slot for a call that comes later, and the id of its replica.
    pub(super) fn reserve(
        &mut self,
        deployment: &str,
        affinity: Affinity,
        ranks: Option<&[Vec<String>]>,
    ) -> Result<Option<(Lease, String)>, Error> {
        let Some(key) = self.engine.deployment(deployment) else { return Ok(None) };
        let lease = self.engine.reserve(key, affinity, ranks)?;
        Ok(lease.and_then(|lease| {
            let index = *self.by_key.get(&lease.replica)?;
            Some((lease, self.links[index].replica.id.clone()))
        }))
    }

    /// A slot that was reserved is not used.
    pub(super) fn unreserve(&mut self, lease: Lease) {
        self.engine.unsent(lease);
        self.settle();
    }

    /// Sends a call for one replica with the slot that was reserved there.
    pub(super) fn redeem(&mut self, call: &Arc<Pending>, lease: Lease) {
        if call.place() == Place::Held {
            self.held.remove(call);
            self.send(call, lease);
            self.settle();
        } else {
            self.unreserve(lease);
        }
    }

    /// From now on this process calls that deployment, and holds it.
    pub(super) fn use_deployment(&mut self, deployment: &str) {
        if !self.used.contains(deployment) {
            self.used.insert(deployment.to_owned());
            self.apply();
        }
    }
}
