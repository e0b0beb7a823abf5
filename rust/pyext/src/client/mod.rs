//! Handles: what Python calls to make calls. The engine is the proxy's; the driver is whichever thread waits.
//!
//! `turns.rs` decides which thread moves bytes and `tender.rs` does what is left; `router.rs` carries out the engine's
//! actions, `linking.rs` opens and closes links, `frames.rs` takes what they bring, `link.rs` owns a socket, `pending.rs` is
//! a call, `split.rs` the calls that several deployments may answer, `mailbox.rs` reaches asyncio loops. This file converts.

mod aim;
mod batches;
mod callee;
pub(crate) mod children;
mod choose;
mod deadlines;
mod frames;
mod link;
mod linking;
mod mailbox;
mod pending;
mod router;
mod split;
mod tender;
mod turns;
mod waiting;

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    intern,
    prelude::*,
    sync::PyOnceLock,
    types::{PyBytes, PyDict},
};
use rayserve_dataplane::{
    error::Error,
    snapshot::{Snapshot, Version},
    wire::call::Value,
};

pub(crate) use self::{
    callee::Callee,
    choose::{Chooser, Reservation, Told, told, word},
    turns::Caller,
    waiting::{Desk, Waiting},
};
use self::{
    pending::{Outcome, Pending},
    turns::Wait,
};
use crate::lock::lock;
use crate::proxy::refused;
use crate::value;
use crate::worker::replica::Replica;

/// How long the main thread sleeps before it looks for signals; other threads get none.
const SIGNALS: Duration = Duration::from_millis(100);

/// All handle calls of one process.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Client {
    pub(crate) caller: Arc<Caller>,
}

#[pymethods]
impl Client {
    #[new]
    fn new(node_id: String, token: &[u8]) -> PyResult<Self> {
        Ok(Self { caller: Arc::new(Caller::new(node_id, token)?) })
    }

    /// What handles of this deployment with these options call; `near`: rather a replica of this node; `target`: the one
    /// replica that answers.
    #[expect(clippy::needless_pass_by_value, reason = "what a Python argument becomes is owned")]
    #[expect(clippy::too_many_arguments, reason = "the options of a handle")]
    fn callee(
        &self,
        deployment: String,
        method: String,
        multiplexed_model_id: String,
        session_id: String,
        near: bool,
        stream: bool,
        target: Option<String>,
    ) -> Callee {
        Callee::new(&self.caller, &deployment, method, [multiplexed_model_id, session_id], near, stream, target)
    }

    fn publish(&self, py: Python<'_>, snapshot: &[u8], fresh: bool) -> PyResult<()> {
        py.detach(|| Snapshot::parse(snapshot).map(|snapshot| self.caller.publish(snapshot, fresh)))
            .map_err(|error| refused(&error))
    }

    fn unpublished(&self, py: Python<'_>, why: &str) {
        py.detach(|| self.caller.unpublished(why));
    }

    fn announce(&self) {
        self.caller.announce();
    }

    fn version(&self) -> Option<(u64, u64)> {
        self.caller.version().map(|Version(epoch, n)| (epoch, n))
    }

    /// The number of an `Errand`.
    fn tend(&self, py: Python<'_>) -> u8 {
        py.detach(|| self.caller.tend()) as u8
    }

    fn fileno(&self) -> RawFd {
        self.caller.as_raw_fd()
    }

    /// Reads what has come, and ends the waits that it ends.
    fn pump(&self, py: Python<'_>, mailbox: &Mailbox) -> PyResult<()> {
        py.detach(|| self.caller.pump(mailbox.desk.mailbox()));
        mailbox.desk.wake(py)
    }

    /// What is counted of batches, as JSON.
    fn batches(&self) -> String {
        self.caller.batches()
    }

    fn unsent(&self, py: Python<'_>) -> (usize, usize) {
        py.detach(|| self.caller.unsent())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.caller.close());
    }

    fn abandon(&self) {
        self.caller.abandon();
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, value) in self.caller.counters() {
            counters.set_item(name, value)?;
        }
        Ok(counters)
    }
}

/// Where the tasks of an asyncio loop wait for their calls.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Mailbox {
    pub(crate) desk: Arc<Desk>,
}

#[pymethods]
impl Mailbox {
    #[new]
    fn new(event_loop: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self { desk: Arc::new(Desk::new(event_loop)?) })
    }

    fn fileno(&self) -> RawFd {
        self.desk.mailbox().fd()
    }

    /// What `await` waits on.
    fn wait(&self, py: Python<'_>, call: &Call) -> PyResult<Py<Waiting>> {
        self.desk.wait(py, &call.caller, &call.pending, Caller::notify)
    }

    /// What waits that take nothing wait on.
    fn wait_for_end(&self, py: Python<'_>, call: &Call) -> PyResult<Py<Waiting>> {
        self.desk.wait(py, &call.caller, &call.pending, Caller::notify_of_end)
    }

    /// Whether no task waits.
    fn is_empty(&self) -> bool {
        self.desk.is_empty()
    }
}

/// One call, begun.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Call {
    caller: Arc<Caller>,
    pending: Arc<Pending>,
    /// The outcome as Python sees it: a value can be taken once.
    told: PyOnceLock<Py<PyAny>>,
    request_id: String,
    /// Its owner takes the items of a stream, which nobody does when this is gone.
    takes_items: bool,
}

impl Call {
    fn new(caller: &Arc<Caller>, pending: Arc<Pending>, request_id: String, takes_items: bool) -> Self {
        let takes_items = takes_items && pending.stream;
        Self { caller: Arc::clone(caller), pending, told: PyOnceLock::new(), request_id, takes_items }
    }
}

#[pymethods]
impl Call {
    #[getter]
    fn request_id(&self) -> &str {
        &self.request_id
    }

    /// What a task of the replica's own loop waits on; None: this is another thread or loop.
    fn waiting(&self, py: Python<'_>) -> PyResult<Option<Py<Waiting>>> {
        let desk = self.caller.home().and_then(|replica| replica.desk_of(&self.caller));
        desk.map(|desk| desk.wait(py, &self.caller, &self.pending, Caller::notify)).transpose()
    }

    /// Whether there is an outcome, or an item of a stream.
    fn ready(&self) -> bool {
        self.pending.is_ready()
    }

    /// Whether a replica has the call, or it has ended.
    fn assigned(&self) -> bool {
        self.pending.is_assigned()
    }

    /// The items that have come since the last time, each a pickle or a pickle and its buffers.
    fn items<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.caller.take_items(&self.pending).into_iter().map(|item| item_of(py, item)).collect()
    }

    /// False: the time is over. Only the main thread is told of signals.
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>, main: bool) -> PyResult<bool> {
        // A time that no Duration can hold is no limit.
        let limit = timeout_s.and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok());
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            let slice = main.then(|| Instant::now() + SIGNALS);
            let wake = [until, slice].into_iter().flatten().min();
            match py.detach(|| self.caller.wait(&self.pending, wake)) {
                Wait::Done => return Ok(true),
                Wait::Timeout if wake == until => return Ok(false),
                Wait::Timeout | Wait::Interrupted => py.check_signals()?,
            }
        }
    }

    fn cancel(&self, py: Python<'_>) -> bool {
        py.detach(|| self.caller.cancel(&self.pending))
    }

    /// What became of the call: a word and what belongs to it, such as the value, or None while it runs.
    fn outcome<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(outcome) = self.pending.outcome() else { return Ok(None) };
        let told = self.told.get_or_try_init(py, || tell(py, outcome, value_itself).map(Bound::unbind))?;
        Ok(Some(told.bind(py).clone()))
    }

    /// The same, with a value as its pickle and buffers: for somebody who only passes it on.
    fn sealed_outcome<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(outcome) = self.pending.outcome() else { return Ok(None) };
        let told = self.told.get_or_try_init(py, || tell(py, outcome, value_sealed).map(Bound::unbind))?;
        Ok(Some(told.bind(py).clone()))
    }
}

impl Client {
    /// Has the replica's loop send what it calls with its own answers.
    pub(crate) fn settle_in(&self, replica: &Arc<Replica>) {
        *lock(&self.caller.home) = Arc::downgrade(replica);
    }
}

fn value_itself(py: Python<'_>, value: Value) -> PyResult<Bound<'_, PyAny>> {
    Ok((intern!(py, "value"), value::load(py, value)?).into_pyobject(py)?.into_any())
}

fn value_sealed(py: Python<'_>, value: Value) -> PyResult<Bound<'_, PyAny>> {
    let (pickle, buffers) = value::of_result(py, value)?;
    Ok((intern!(py, "value"), pickle, buffers).into_pyobject(py)?.into_any())
}

fn tell<'py>(
    py: Python<'py>,
    outcome: &Outcome,
    of_value: fn(Python<'py>, Value) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    Ok(match outcome {
        Outcome::Value(value) => {
            let value = lock(value).take();
            let value = value.ok_or_else(|| PyRuntimeError::new_err("the value has been taken"))?;
            of_value(py, value)?
        }
        Outcome::End => ("end",).into_pyobject(py)?.into_any(),
        Outcome::Fault(fault, payload) => {
            ("fault", *fault as u32, PyBytes::new(py, payload)).into_pyobject(py)?.into_any()
        }
        Outcome::Died(why) => ("died", why).into_pyobject(py)?.into_any(),
        Outcome::Argument(index) => ("argument", index).into_pyobject(py)?.into_any(),
        Outcome::Refused(Error::Backpressure { queued, limit, policy }) => {
            ("backpressure", queued, limit, policy.status_code, policy.retry_after_s).into_pyobject(py)?.into_any()
        }
        Outcome::Refused(Error::Unavailable(why) | Error::Deleted(why)) => {
            ("unavailable", why).into_pyobject(py)?.into_any()
        }
        Outcome::Refused(error) => ("internal", error.to_string()).into_pyobject(py)?.into_any(),
        Outcome::Unknown => ("unknown",).into_pyobject(py)?.into_any(),
        Outcome::Gone(replica) => ("gone", replica).into_pyobject(py)?.into_any(),
        Outcome::Cancelled => ("cancelled",).into_pyobject(py)?.into_any(),
        Outcome::Closed => ("closed",).into_pyobject(py)?.into_any(),
    })
}

/// An item of a stream, as `values.loads` takes it.
fn item_of(py: Python<'_>, payload: Bytes) -> PyResult<Bound<'_, PyAny>> {
    let value = Value::parse(payload).map_err(|error| PyValueError::new_err(error.to_string()))?;
    let (pickle, buffers) = value::of_result(py, value)?;
    Ok(if buffers.is_empty() { pickle } else { (pickle, buffers).into_pyobject(py)?.into_any() })
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.takes_items {
            self.caller.drop_items(&self.pending);
        }
    }
}
