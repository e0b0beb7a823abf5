//! Slots for requests that do not queue here: somebody else has chosen the replica, or will send later.
//!
//! A router in Python is told the candidates and names those that it would like; a broadcast names every replica; a caller
//! that chooses first and sends later keeps the lease meanwhile. Whoever finds no room comes again.

use super::{Action, Affinity, Candidate, DeploymentKey, Engine, Lease, Picker, Place, Replica, ReplicaKey};
use crate::{error::Error, snapshot::Policy};

/// What came of an attempt to give a waiting request to a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Assigned {
    /// The id of the one that has got it.
    To(String),
    /// None of them has room.
    Full,
    /// It does not wait any more.
    Over,
}

impl<W> Engine<W> {
    /// Whether a router in Python chooses for this deployment.
    pub fn is_custom(&mut self, key: DeploymentKey) -> bool {
        self.deployments.at(key).is_some_and(|deployment| deployment.config.router.policy == Policy::Custom)
    }

    /// Who waits at a deployment.
    pub fn waiters(&mut self, key: DeploymentKey) -> impl Iterator<Item = &W> {
        self.deployments.at(key).into_iter().flat_map(|deployment| deployment.queue.waiters())
    }

    /// The replicas that are not about to leave.
    pub fn candidates(&mut self, key: DeploymentKey) -> Vec<Candidate> {
        let addresses = self.config(key).map_or(Vec::new(), |config| config.replicas.clone());
        let staying = addresses.into_iter().filter_map(|address| Some((self.replica(key, &address.id)?, address)));
        staying.map(|(member, address)| self.replicas[member.0].candidate(address)).collect()
    }

    /// The replica of this id, while the deployment has it and it takes requests.
    pub fn replica(&self, key: DeploymentKey, id: &str) -> Option<ReplicaKey> {
        let member = *self.by_id.get(id)?;
        let replica = self.replicas.get(member.0)?;
        (replica.deployment == key && !replica.draining).then_some(member)
    }

    /// A slot of the least loaded with a free one of the first of `ranks` that has such; if none has, the least loaded of the
    /// first with room for a backlog. Without ranks a slot of any replica, by the deployment's policy.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Deleted`].
    pub fn reserve<'r>(
        &mut self,
        key: DeploymentKey,
        affinity: Affinity,
        ranks: Option<&'r [impl AsRef<[String]>]>,
    ) -> Result<Option<Lease>, Error> {
        let deployment = self.deployments.open(key)?;
        let place = Place { deployment: key, seq: deployment.queue.arrive(), affinity, since: None };
        let Some(ranks) = ranks else {
            return Ok(if self.awaits_own(place) { None } else { self.lease(place) });
        };
        let first = |takes: fn(&Replica) -> bool| {
            let known = |rank: &'r [String]| rank.iter().filter_map(|id| self.replica(key, id));
            ranks.iter().find_map(|rank| Picker::among(&self.replicas, known(rank.as_ref()), takes))
        };
        let chosen = first(Replica::has_slot).or_else(|| first(Replica::has_room));
        Ok(chosen.and_then(|chosen| self.take(chosen, place)))
    }

    /// Starts a request that waits for its router, at one of `ranks` as [`Engine::reserve`] has it.
    pub fn assign(&mut self, place: Place, ranks: &[Vec<String>]) -> Assigned {
        if !self.deployments.at(place.deployment).is_some_and(|deployment| deployment.queue.contains(place.seq)) {
            return Assigned::Over;
        }
        let lease = match self.reserve(place.deployment, place.affinity, Some(ranks)) {
            Ok(Some(lease)) => Lease { place, ..lease },
            Ok(None) => return Assigned::Full,
            Err(_) => return Assigned::Over, // whoever waited has been refused
        };
        let id = self.replicas[lease.replica.0].id.clone();
        if let Some(waiter) = self.cancel(place) {
            self.actions.push_back(Action::Start(waiter, lease));
        }
        Assigned::To(id)
    }
}
