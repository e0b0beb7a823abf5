//! Requests whose replica is still being linked to: that of their session, or that whose turn it is.
//!
//! A process that has just begun to call a deployment links to all its replicas at once, and the links come up one after
//! the other. A session that went to the first of them would move as soon as its own is there. So its requests wait for the
//! first attempt to link to that replica, which drivers bound by a time, and stand aside meanwhile: whoever has no session, or
//! another, passes. Nothing waits for a replica that was lost, whose attempt failed, that drains or that has left the
//! snapshot: then the session is the next one's. Batches do not wait: their requests go where the first of them goes.
//! Under round-robin those without a session wait likewise for all: who asked for turns counts them from the first call on.

use super::{Deployment, DeploymentKey, Engine, Place, replica::Replica};
use crate::snapshot::Policy;

impl<W> Engine<W> {
    /// Whether a request waits for the first link to its session's own replica, or to those that take turns.
    pub(super) fn awaits_own(&mut self, place: Place) -> bool {
        let replicas = &self.replicas;
        let Some(Deployment { members, config, window: None, .. }) = self.deployments.at(place.deployment) else {
            return false;
        };
        let (affinity, policy) = (place.affinity, config.router.policy);
        let in_turn = policy == Policy::RoundRobin && affinity.is_none();
        if policy == Policy::Custom || !(in_turn || affinity.has_session()) {
            return false;
        }
        let known = members.iter().filter_map(|member| replicas.get(member.index()));
        // Most of the time there is none on the way, and nothing to rank.
        known.clone().any(Replica::is_coming)
            && (in_turn
                || known
                    .filter_map(|replica| Some((replica.claim(affinity.session)?, replica.is_coming())))
                    .max()
                    .is_some_and(|(_, is_coming)| is_coming))
    }

    /// Looks at everybody who waits, also at those who stand aside: it may be decided what they wait for.
    pub(super) fn reconsider(&mut self, key: DeploymentKey) {
        if let Some(deployment) = self.deployments.at(key) {
            deployment.queue.rejoin();
            self.dispatch(key);
        }
    }
}
