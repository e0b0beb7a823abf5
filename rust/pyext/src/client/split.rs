//! Calls of a split: `split:{name}` stands where others name their deployment, and each call goes to one of its targets.
//!
//! The engine chooses, for a session always the same target while its weights let it. A call waits at a target as any other
//! does, and leaves when that one is not ready while another is; until there is any deployment it waits here.

use std::sync::Arc;

use rayserve_dataplane::{
    engine::{DeploymentKey, SplitKey, Turn},
    error::{Error, Retry},
    snapshot::{Deployment, Snapshot, Split},
};

use super::{
    pending::{Pending, Place},
    router::Router,
};

/// What the key of a split begins with. A deployment's holds a `#`, which the name of a split does not.
const PREFIX: &str = "split:";

/// Where a call of a split goes.
pub(super) enum Way {
    /// To this deployment.
    To(DeploymentKey),
    /// Nowhere yet: it stands among the roaming.
    Wait,
    /// No snapshot holds the split.
    Unknown,
    /// To nobody, for good.
    Refused(Error),
}

impl Router {
    fn split_of(&self, call: &Pending) -> Option<SplitKey> {
        self.engine.split(call.deployment.strip_prefix(PREFIX)?)
    }

    /// Whether the newest snapshot holds what a call names.
    pub(super) fn knows(&self, call: &Pending) -> bool {
        self.engine.deployment(&call.deployment).is_some() || self.split_of(call).is_some()
    }

    /// Where a call goes whose key is no deployment's.
    pub(super) fn way(&mut self, call: &Arc<Pending>) -> Way {
        let Some(split) = self.split_of(call) else { return Way::Unknown };
        match self.engine.choose_for(split, call.affinity) {
            Ok(Turn::To(target) | Turn::Wait(Some(target))) => {
                let deployment = self.engine.target(split, target);
                deployment.map_or(Way::Unknown, Way::To)
            }
            Ok(Turn::Wait(None)) => {
                self.park(call, Place::Unrouted);
                self.roam(call);
                Way::Wait
            }
            Err(error) => Way::Refused(error),
        }
    }

    /// A call has begun to wait at a deployment; one of a split does not stay where nobody is ready while others are.
    pub(super) fn settle_in(&mut self, call: &Arc<Pending>, deployment: DeploymentKey) {
        if let Some(split) = self.split_of(call)
            && !self.leave_stranded(call, split, deployment)
        {
            self.roam(call);
        }
    }

    fn leave_stranded(&mut self, call: &Arc<Pending>, split: SplitKey, deployment: DeploymentKey) -> bool {
        // One that an action has named already is on its way.
        let leaves = self.engine.strands(split, deployment)
            && matches!(call.place(), Place::Queued(place) if self.engine.cancel(place).is_some());
        if leaves {
            self.route(call);
        }
        leaves
    }

    /// Whether a refused call has found another way; one that has `waited` also leaves a target that has failed.
    pub(super) fn reroutes(&mut self, call: &Arc<Pending>, error: &Error, waited: bool) -> bool {
        let leaves = error.retry() == Retry::Reroute || (waited && matches!(error, Error::Unavailable(_)));
        let found = leaves && self.split_of(call).is_some();
        if found {
            self.route(call);
        }
        found
    }

    fn roam(&mut self, call: &Arc<Pending>) {
        if self.roaming.len() == self.roaming.capacity() {
            // Those that wait no more, before there is room for more of them.
            self.roaming.retain(|other| matches!(other.place(), Place::Queued(_) | Place::Unrouted));
        }
        self.roaming.push(Arc::clone(call));
    }

    /// Readiness has changed: those who wait for a target choose again.
    pub(super) fn turn(&mut self) {
        for call in std::mem::take(&mut self.roaming) {
            match (call.place(), self.split_of(&call)) {
                (Place::Unrouted, _) => self.route(&call),
                (Place::Queued(place), Some(split)) if !self.leave_stranded(&call, split, place.deployment) => {
                    self.roaming.push(call);
                }
                _ => {}
            }
        }
    }

    /// What a snapshot says of what this process calls.
    pub(super) fn relevant(&self, snapshot: &Snapshot) -> Snapshot {
        let called = |name: &String| self.used.contains(&format!("{PREFIX}{name}"));
        let splits = snapshot.splits.iter().filter(|(name, _)| called(name));
        let splits: std::collections::BTreeMap<_, _> = splits
            .map(|(name, Split { targets, .. })| (name.clone(), Split { targets: targets.clone(), ..Split::default() }))
            .collect();
        let targets: std::collections::HashSet<_> =
            splits.values().flat_map(|split| &split.targets).map(|target| target.deployment.clone()).collect();
        let called =
            snapshot.deployments.iter().filter(|(name, _)| self.used.contains(*name) || targets.contains(*name));
        let deployments = called.map(|(name, deployment)| (name.clone(), deployment.clone())).collect();
        Snapshot { version: snapshot.version, splits, deployments, ..Snapshot::default() }
    }

    /// The deployment at which a call waits: for one of a split that of its target.
    pub(super) fn whereabouts(&mut self, call: &Pending) -> String {
        match call.place() {
            Place::Queued(place) => self.engine.config(place.deployment).map(Deployment::key),
            _ => None,
        }
        .unwrap_or_else(|| call.deployment.to_string())
    }
}
