//! The splits of the newest snapshot, and which of their targets are ready: those with a replica that takes requests.
//!
//! Readiness is looked up when a link comes or goes, never for a request. When it has changed the driver is told
//! ([`Action::Readiness`]): whoever waits at a target that is not ready chooses again.

use super::{Action, Affinity, Deployment, DeploymentKey, Engine, Splitter};
use crate::{error::Error, snapshot::Snapshot};

/// A split, until the next snapshot; a request that outlives it looks it up again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitKey {
    index: u32,
    /// Of which snapshot.
    life: u32,
}

/// Where a request of a split goes; targets are known by their index in the snapshot's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// To this target, which is ready.
    To(usize),
    /// None is ready: it waits at this one, until another is; at none if there is no deployment yet.
    Wait(Option<usize>),
}

#[derive(Debug)]
pub(super) struct Split {
    name: String,
    splitter: Splitter,
    /// Of its targets.
    deployments: Vec<Option<DeploymentKey>>,
}

impl<W> Engine<W> {
    /// Takes over the splits of a snapshot whose deployments are known.
    pub(super) fn divide(&mut self, snapshot: &Snapshot) {
        let split = |(name, split): (&String, &crate::snapshot::Split)| Split {
            name: name.clone(),
            splitter: Splitter::new(name, split, &self.schedules),
            deployments: split.targets.iter().map(|target| self.deployment(&target.deployment)).collect(),
        };
        let splits: Vec<_> = snapshot.splits.iter().map(split).collect();
        let any = !(self.splits.is_empty() && splits.is_empty());
        self.splits = splits;
        self.split_life = self.split_life.wrapping_add(1);
        self.reckon();
        // Also without a change of readiness those who wait may be led elsewhere by now.
        if any {
            self.actions.push_back(Action::Readiness);
        }
    }

    /// Finds out which targets are ready.
    pub(super) fn reckon(&mut self) {
        let mut splits = std::mem::take(&mut self.splits);
        let mut changed = false;
        for Split { splitter, deployments, .. } in &mut splits {
            let ready: Vec<_> = deployments.iter().map(|key| key.is_some_and(|key| self.is_ready(key))).collect();
            changed |= splitter.note_ready(|at| ready[at]);
        }
        self.splits = splits;
        if changed {
            self.actions.push_back(Action::Readiness);
        }
    }

    /// Whether a deployment has a replica that takes requests.
    pub fn is_ready(&mut self, key: DeploymentKey) -> bool {
        let Some(Deployment { gone: None, members, .. }) = self.deployments.at(key) else { return false };
        members.iter().any(|member| self.replicas[member.index()].open())
    }

    /// The split of this name, a key of the snapshot's.
    pub fn split(&self, name: &str) -> Option<SplitKey> {
        let index = self.splits.binary_search_by(|split| split.name.as_str().cmp(name)).ok()?;
        Some(SplitKey { index: index as u32, life: self.split_life })
    }

    fn split_at(&mut self, key: SplitKey) -> Option<&mut Split> {
        self.splits.get_mut(key.index as usize).filter(|_| key.life == self.split_life)
    }

    /// The deployment of a split's target, if the snapshot holds it.
    pub fn target(&mut self, key: SplitKey, target: usize) -> Option<DeploymentKey> {
        self.split_at(key)?.deployments[target]
    }

    /// Whether a split has a ready target, while that of a request that waits is not.
    pub fn strands(&mut self, key: SplitKey, deployment: DeploymentKey) -> bool {
        self.split_at(key).is_some_and(|split| split.splitter.is_ready()) && !self.is_ready(deployment)
    }

    /// Where a request goes that `pick` finds a target for.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the split has no target with a weight, or all of them have failed to deploy;
    /// [`Error::Deleted`] if the key is of an earlier snapshot.
    pub fn choose(&mut self, key: SplitKey, pick: impl FnOnce(&mut Splitter) -> Option<usize>) -> Result<Turn, Error> {
        let Some(Split { name, splitter, .. }) = self.split_at(key) else {
            return Err(Error::Deleted("The split is another by now.".into()));
        };
        if let Some(target) = pick(splitter) {
            return Ok(Turn::To(target));
        }
        let weighted = splitter.weighted();
        if weighted.is_empty() {
            return Err(Error::Unavailable(format!(
                "The traffic of '{name}' has no target: give one a weight above 0 with serve.set_traffic."
            )));
        }
        let (mut failed, mut missing) = (None, false);
        for at in weighted {
            match self.target(key, at).map(|deployment| self.deployments.open(deployment).map(|_| at)) {
                Some(Ok(at)) => return Ok(Turn::Wait(Some(at))),
                Some(Err(error)) => failed = failed.or(Some(error)),
                None => missing = true,
            }
        }
        failed.filter(|_| !missing).map_or(Ok(Turn::Wait(None)), Err)
    }

    /// The same for a call, which stays where its session is and shows nothing else.
    ///
    /// # Errors
    /// As [`Engine::choose`].
    pub fn choose_for(&mut self, key: SplitKey, affinity: Affinity) -> Result<Turn, Error> {
        let session = if affinity.is_near() { 0 } else { affinity.session };
        self.choose(key, |splitter| splitter.choose_for(session))
    }
}
