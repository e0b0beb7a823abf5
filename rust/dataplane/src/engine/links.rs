//! What the links to replicas tell: that they are up or gone, that a replica drains or is silent, its models and credits.

use super::{Action, Engine, ReplicaKey};

impl<W> Engine<W> {
    /// A link is up; `max_ongoing` comes from its WELCOME. The next snapshot knows better: a replica whose limit is changed in
    /// place does not say so, and one that is believed to have more slots than it has answers BUSY.
    pub fn linked(&mut self, key: ReplicaKey, max_ongoing: u32) {
        self.sessions += 1;
        let deployment = self.replicas[key.0].deployment;
        let batches = self.config(deployment).and_then(|config| config.batch);
        let replica = &mut self.replicas[key.0];
        replica.reset(Some(self.sessions));
        // One that does not batch yet has more slots than it can have batches.
        replica.max_ongoing = batches.map_or(max_ongoing, |batch| batch.concurrent.min(max_ongoing));
        self.reconsider(deployment);
        self.reckon();
    }

    /// A link is gone with all its leases, or an attempt to link has failed. Returns whether the replica is still wanted:
    /// then the driver links again.
    pub fn closed(&mut self, key: ReplicaKey) -> bool {
        let Some(replica) = self.replicas.get_mut(key.0) else { return false };
        let (untried, deployment) = (replica.untried, replica.deployment);
        replica.reset(None);
        if !replica.listed {
            self.replicas.remove(key.0);
            return false;
        }
        if untried {
            self.reconsider(deployment);
        }
        self.reckon();
        self.wants(key)
    }

    /// Whether requests for this replica are to come: it is listed and has not said DRAIN.
    pub fn wants(&self, key: ReplicaKey) -> bool {
        self.replicas.get(key.0).is_some_and(|replica| replica.listed && !replica.draining)
    }

    /// DRAIN: the replica takes no new work, whatever a snapshot says.
    pub fn draining(&mut self, key: ReplicaKey) {
        if let Some(replica) = self.replicas.get_mut(key.0) {
            replica.draining = true;
            let deployment = replica.deployment;
            self.reconsider(deployment);
            self.reckon();
        }
    }

    /// The replica does, or does not, answer PING.
    pub fn silent(&mut self, key: ReplicaKey, silent: bool) {
        if let Some(replica) = self.replicas.get_mut(key.0)
            && std::mem::replace(&mut replica.silent, silent) != silent
        {
            let deployment = replica.deployment;
            self.reconsider(deployment);
            self.reckon();
        }
    }

    /// MODELS: what the replica holds or loads now.
    pub fn models(&mut self, key: ReplicaKey, names: &[&[u8]]) {
        if let Some(replica) = self.replicas.get_mut(key.0) {
            replica.hold(names);
        }
    }

    /// CREDIT: slots reserved for this caller; what nobody waits for goes back at once.
    pub fn credit(&mut self, key: ReplicaKey, count: u32) {
        if let Some(replica) = self.replicas.get_mut(key.0) {
            replica.credit(count);
            self.spend(key);
        }
    }

    /// Whoever waits takes the room that there is; credits that are left go back.
    pub(super) fn spend(&mut self, key: ReplicaKey) {
        let deployment = self.replicas[key.0].deployment;
        if self.touch(deployment) {
            return; // what is left goes back when the batches are bound
        }
        self.dispatch(deployment);
        let unused = self.replicas[key.0].unused();
        if unused > 0 {
            self.actions.push_back(Action::Unused(key, unused));
        }
    }
}
