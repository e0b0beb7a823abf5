//! `Chooser`: what routers in Python, broadcasts and `choose_replica` see of the replicas, and how they take a slot.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use pyo3::{exceptions::PyValueError, prelude::*, types::PyTuple};
use rayserve_dataplane::{
    engine::{Affinity, Assigned, Candidate, Lease},
    wire::CallView,
};

use super::{
    Call, Client,
    turns::{Caller, Turn},
};
use crate::lock::lock;
use crate::value;

/// See the module.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Chooser {
    caller: Arc<Caller>,
}

/// Id, node, address of TCP, whether it is open and has room, load, `max_ongoing_requests`, models, metadata and routing
/// stats of a replica.
pub(crate) type Told =
    (String, String, Option<String>, bool, bool, u32, u32, Vec<String>, Option<String>, Option<String>);

pub(crate) fn told(candidate: Candidate) -> Told {
    let Candidate { address: at, open, load, room, max_ongoing, models } = candidate;
    (at.id, at.node_id, at.tcp, open, room, load, max_ongoing, models, at.metadata, at.routing_stats)
}

/// A replica's id; None: no room; empty: the request has ended.
pub(crate) fn word(assigned: Assigned) -> Option<String> {
    match assigned {
        Assigned::To(id) => Some(id),
        Assigned::Full => None,
        Assigned::Over => Some(String::new()),
    }
}

#[pymethods]
impl Chooser {
    #[new]
    fn new(client: &Bound<'_, Client>) -> Self {
        Self { caller: Arc::clone(&client.get().caller) }
    }

    /// Calls that wait for their router since the last time, each with its deployment, the texts of its
    /// head, whether it streams and prefers this node, and its arguments as `values.load_arguments` takes them.
    fn choosing<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let calls: Vec<_> = {
            let router = &mut self.caller.lock().router;
            let fresh = std::mem::take(&mut router.held.fresh).into_iter();
            // One that has ended meanwhile has no payload any more, nor anything to wait for.
            let waiting = fresh.filter(|call| call.outcome().is_none());
            waiting.map(|call| (router.whereabouts(&call), call.payload(), call)).collect()
        };
        let mut chosen = Vec::with_capacity(calls.len());
        for (deployment, payload, pending) in calls {
            // A copy: what routers do with arrays among the arguments must not reach the replica.
            let view = CallView::parse(payload.concat()).map_err(|error| PyValueError::new_err(error.to_string()))?;
            let head = view.head();
            let call = Call::new(&self.caller, Arc::clone(&pending), head.request_id.to_owned(), false);
            let texts =
                (head.method, head.request_id, head.route, head.app, head.multiplexed_model_id, head.session_id);
            let texts = texts.into_pyobject(py)?;
            let arguments = view.take_arguments().map(|arguments| value::of_call(py, arguments)).transpose()?;
            let flags = (pending.stream, pending.affinity.is_near());
            chosen.push((call, deployment, texts, flags, arguments).into_pyobject(py)?);
        }
        Ok(chosen)
    }

    /// Replicas, and the user's router; None until a snapshot holds the deployment, which is on its way then.
    fn replicas(&self, deployment: &str) -> Option<(Vec<Told>, Option<String>)> {
        let (candidates, custom) = self.caller.candidates(deployment)?;
        Some((candidates.into_iter().map(told).collect(), custom))
    }

    /// The replica that has got the call; None: none of these has room; empty: the call has ended.
    #[expect(clippy::needless_pass_by_value, reason = "what a Python argument becomes is owned")]
    fn assign(&self, call: &Call, ranks: Vec<Vec<String>>) -> Option<String> {
        word(self.caller.assign(&call.pending, &ranks))
    }

    /// A slot of one of `ranks`, or by the deployment's policy of any replica; None: there is no room.
    #[expect(clippy::needless_pass_by_value, reason = "what a Python argument becomes is owned")]
    fn reserve(
        &self,
        py: Python<'_>,
        deployment: &str,
        model: &str,
        session: &str,
        near: bool,
        ranks: Option<Vec<Vec<String>>>,
    ) -> PyResult<Option<Reservation>> {
        let affinity = Affinity::new(model.as_bytes(), session.as_bytes()).or_near(near);
        let reserve = || self.caller.lock().router.reserve(deployment, affinity, ranks.as_deref());
        let mut reserved = reserve();
        if matches!(reserved, Ok(None)) {
            py.detach(|| self.caller.glance());
            reserved = reserve();
        }
        let reserved = reserved.map_err(|error| PyValueError::new_err(error.to_string()))?;
        let made = |(lease, replica)| Reservation {
            caller: Arc::clone(&self.caller),
            replica,
            lease: Mutex::new(Some(lease)),
        };
        Ok(reserved.map(made))
    }
}

/// A slot that nobody uses yet; it is free again when this is gone.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Reservation {
    caller: Arc<Caller>,
    #[pyo3(get)]
    replica: String,
    lease: Mutex<Option<Lease>>,
}

#[pymethods]
impl Reservation {
    /// Sends a call that is for this replica, with this slot if it has not found another.
    fn redeem(&self, call: &Call) {
        let lease = lock(&self.lease).take();
        if let Some(lease) = lease {
            let mut state = self.caller.lock();
            state.router.redeem(&call.pending, lease);
            self.caller.remind(&mut state);
        }
    }

    /// Gives the slot back.
    fn release(&self) {
        let lease = lock(&self.lease).take();
        if let Some(lease) = lease {
            self.caller.unreserve(lease);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

impl Caller {
    /// See [`Router::candidates`](super::router::Router::candidates).
    fn candidates(&self, deployment: &str) -> Option<(Vec<Candidate>, Option<String>)> {
        let mut state = self.lock();
        let known = state.router.candidates(deployment);
        if known.is_none() {
            self.summon(&mut state);
        }
        known
    }

    fn assign(&self, call: &Arc<super::Pending>, ranks: &[Vec<String>]) -> Assigned {
        let mut state = self.lock();
        let assigned = state.router.assign(call, ranks);
        self.nudge(&state);
        assigned
    }

    /// Reads what has come, as no call may be out for which anybody would: links are made so, and slots become free.
    fn glance(&self) {
        let state = self.lock();
        if state.turn == Turn::Free {
            drop(self.lead(state, Turn::Waiter, Some(Instant::now()), |_| true));
        }
    }

    fn unreserve(&self, lease: Lease) {
        let mut state = self.lock();
        state.router.unreserve(lease);
        self.remind(&mut state);
    }
}
