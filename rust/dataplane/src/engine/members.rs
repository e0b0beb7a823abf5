//! What exists: the deployments and replicas of the newest snapshot, and what becomes of those that it does not hold.

use slab::Slab;

use super::{Action, Deployment, DeploymentKey, Engine, Picker, Queue, Replica, ReplicaKey, Rule, Window};
use crate::{
    error::Error,
    snapshot::{self, Policy, Snapshot},
};

/// By the index of their keys.
#[derive(Debug)]
pub(super) struct Deployments<W>(pub(super) Slab<Deployment<W>>);

impl<W> Default for Deployments<W> {
    fn default() -> Self {
        Self(Slab::new())
    }
}

impl<W> Deployments<W> {
    /// The deployment of this key, if it has not been deleted.
    pub(super) fn at(&mut self, key: DeploymentKey) -> Option<&mut Deployment<W>> {
        self.0.get_mut(key.index as usize).filter(|deployment| deployment.life == key.life)
    }

    /// The same for a request, which is refused where nobody will serve it.
    pub(super) fn open(&mut self, key: DeploymentKey) -> Result<&mut Deployment<W>, Error> {
        let deployment = self.at(key).ok_or_else(|| Error::Deleted("The deployment was deleted.".into()))?;
        if let Some(error) = &deployment.gone {
            return Err(error.clone());
        }
        Ok(deployment)
    }
}

impl<W> Engine<W> {
    /// Makes `snapshot` the truth: what it does not hold is gone.
    pub fn apply(&mut self, snapshot: &Snapshot) {
        let absent: Vec<_> = self
            .by_name
            .iter()
            .filter(|(name, _)| !snapshot.deployments.contains_key(*name))
            .map(|(name, &key)| (name.clone(), key))
            .collect();
        for (name, key) in absent {
            self.by_name.remove(&name);
            self.list(key, &[]);
            if let Some(deployment) = self.deployments.at(key) {
                deployment.gone = Some(Error::deleted(&deployment.config));
                self.refuse_all(key);
                self.forget_alarm(key);
                self.deployments.0.remove(key.index as usize);
            }
        }
        for (name, config) in &snapshot.deployments {
            let key = self.declare(name, config);
            self.list(key, &config.replicas);
            if config.unavailable.is_some() {
                self.refuse_all(key);
            } else {
                self.reconsider(key);
            }
        }
        self.divide(snapshot);
    }

    fn declare(&mut self, name: &str, config: &snapshot::Deployment) -> DeploymentKey {
        let window = config.batch.map(Window::from);
        let gone = config.unavailable.clone().map(Error::Unavailable);
        let known = self.by_name.get(name).copied();
        if let Some(key) = known
            && let Some(deployment) = self.deployments.at(key)
        {
            let custom = |config: &snapshot::Deployment| config.router.policy == Policy::Custom;
            if custom(config) && !custom(&deployment.config) {
                self.actions.push_back(Action::Ask(key));
            }
            (deployment.config, deployment.gone, deployment.window) = (config.clone(), gone, window);
            return key;
        }
        let (life, config) = (self.lives, config.clone());
        self.lives = self.lives.wrapping_add(1);
        let (picker, queue) = (Picker::default(), Queue::default());
        let members = Vec::new();
        let deployment = Deployment { life, config, gone, members, picker, queue, window, alarm: None };
        let key = DeploymentKey { index: self.deployments.0.insert(deployment) as u32, life };
        self.by_name.insert(name.to_owned(), key);
        key
    }

    /// Makes `listed` the replicas of a deployment.
    fn list(&mut self, key: DeploymentKey, listed: &[snapshot::Replica]) {
        let Some(deployment) = self.deployments.at(key) else { return };
        let batch = deployment.config.batch;
        let max_ongoing = batch.map_or(deployment.config.max_ongoing_requests, |batch| batch.concurrent);
        for &member in &deployment.members {
            let replica = &mut self.replicas[member.0];
            replica.limit(max_ongoing, batch.is_some());
            if !listed.iter().any(|other| other.id == replica.id) {
                replica.listed = false;
                self.by_id.remove(&replica.id);
                self.actions.push_back(Action::Close(member));
            }
        }
        deployment.members.retain(|member| self.replicas[member.0].listed);
        for address in listed {
            if self.by_id.contains_key(&address.id) {
                continue;
            }
            let mut replica = Replica::new(address.id.clone(), key, max_ongoing);
            replica.near = self.node.as_ref() == Some(&address.node_id);
            let member = ReplicaKey(self.replicas.insert(replica));
            self.by_id.insert(address.id.clone(), member);
            deployment.members.push(member);
            self.actions.push_back(Action::Open(member, address.clone()));
        }
        let near = deployment.members.iter().filter(|member| self.replicas[member.0].near).count();
        let divided = (1..deployment.members.len()).contains(&near);
        deployment.picker.rule = Rule::new(deployment.config.router.policy, self.near_first && divided);
    }

    fn refuse_all(&mut self, key: DeploymentKey) {
        if let Some(deployment) = self.deployments.at(key)
            && let Some(error) = &deployment.gone
        {
            self.actions.extend(deployment.queue.clear().map(|waiter| Action::Refuse(waiter, error.clone())));
        }
    }
}
