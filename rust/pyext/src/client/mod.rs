//! Handles: what Python calls to make calls. The engine is the proxy's; the driver is whichever thread waits.
//!
//! `turns.rs` decides which thread moves bytes and `tender.rs` does what is left; `router.rs` carries out the engine's
//! actions, `linking.rs` opens and closes links, `frames.rs` takes what they bring, `link.rs` owns a socket, `pending.rs` is
//! a call, `split.rs` the calls that several deployments may answer, `mailbox.rs` reaches asyncio loops. This file converts.

mod aim;
mod batches;
pub(crate) mod children;
mod choose;
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
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use pyo3::{
    buffer::PyBuffer,
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
    pybacked::PyBackedStr,
    sync::PyOnceLock,
    types::{PyBytes, PyDict},
};
use rayserve_dataplane::{
    engine::Affinity,
    error::Error,
    snapshot::{Snapshot, Version},
    wire::{
        LARGE, Payload,
        call::{CallHead, Value, put_call_head},
    },
};

pub(crate) use self::{
    choose::{Chooser, Reservation, Told, told, word},
    turns::Caller,
    waiting::Desk,
};
use self::{
    pending::{Outcome, Pending},
    turns::Wait,
    waiting::Waiting,
};
use crate::http::request as http;
use crate::value;
use crate::worker::{replica::Replica, stream::Stream};

/// How long the main thread sleeps before it looks for signals; other threads get none.
const SIGNALS: Duration = Duration::from_millis(100);

/// Method, request id, route, application, model id and session id of a call.
type Texts = (PyBackedStr, PyBackedStr, PyBackedStr, PyBackedStr, PyBackedStr, PyBackedStr);

/// All handle calls of one process.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Client {
    pub(crate) caller: Arc<Caller>,
    /// The replica whose loop flushes what it calls.
    home: Mutex<Weak<Replica>>,
}

#[pymethods]
impl Client {
    #[new]
    fn new(node_id: String, token: &[u8]) -> PyResult<Self> {
        Ok(Self { caller: Arc::new(Caller::new(node_id, token)?), home: Mutex::default() })
    }

    #[pyo3(signature = (deployment, texts, pickle, buffers, stream, parent, needs, keep, target=None))]
    #[expect(clippy::needless_pass_by_value, clippy::too_many_arguments, reason = "a call is many things")]
    fn begin(
        &self,
        py: Python<'_>,
        deployment: String,
        texts: Texts,
        pickle: &Bound<'_, PyBytes>,
        buffers: Vec<PyBuffer<u8>>,
        stream: bool,
        parent: &Bound<'_, PyAny>,
        needs: Vec<(u32, Bound<'_, Call>)>,
        keep: Option<Py<PyAny>>,
        target: Option<String>,
    ) -> PyResult<Option<Call>> {
        let (method, request_id, route, app, multiplexed_model_id, session_id) = &texts;
        let head = CallHead { method, request_id, route, app, multiplexed_model_id, session_id };
        let mut out = Payload::with_capacity(256 + pickle.as_bytes().len().min(LARGE));
        put_call_head(out.open(), &head);
        value::put(py, &mut out, pickle, &buffers);
        if needs.iter().any(|(_, call)| !Arc::ptr_eq(&call.get().caller, &self.caller) && !call.get().ready()) {
            return Err(PyRuntimeError::new_err(
                "an argument is the answer of a Serve instance that has been shut down",
            ));
        }
        if needs.iter().any(|(_, call)| call.get().told.get(py).is_some()) {
            return Ok(None); // to be passed on as the value that it has become
        }
        let needs = needs.iter().map(|(slot, call)| (*slot, Arc::clone(&call.get().pending))).collect();
        let parent = parent_of(parent);
        let deadline = parent.as_ref().and_then(|parent| parent.state().children.deadline);
        let affinity = Affinity::new(multiplexed_model_id.as_bytes(), session_id.as_bytes());
        let call = Pending::new(deployment, affinity, out, stream, deadline, needs, keep);
        if let Some(target) = target {
            let _ = call.target.set(target);
        }
        if let Some(parent) = parent {
            parent.state().children.add(&self.caller, &call);
        }
        let home = lock(&self.home).upgrade().filter(|replica| replica.on_loop());
        if !self.caller.begin(&call, home.is_some()) {
            return Err(PyRuntimeError::new_err("handles are closed: the interpreter exits"));
        }
        if let Some(replica) = home
            && !replica.called(py)?
        {
            self.caller.flush();
        }
        Ok(Some(Call { caller: Arc::clone(&self.caller), pending: call, told: PyOnceLock::new() }))
    }

    fn publish(&self, py: Python<'_>, snapshot: &[u8], fresh: bool) -> PyResult<()> {
        let snapshot = Snapshot::parse(snapshot).map_err(|error| PyValueError::new_err(error.to_string()))?;
        py.detach(|| self.caller.publish(snapshot, fresh));
        Ok(())
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
        self.desk.wait(py, &call.caller, &call.pending)
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
}

#[pymethods]
impl Call {
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

    /// What became of the call: a word and what belongs to it, or None while it runs.
    fn outcome<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(outcome) = self.pending.outcome() else { return Ok(None) };
        let told = self.told.get_or_try_init(py, || tell(py, outcome).map(Bound::unbind))?;
        Ok(Some(told.bind(py).clone()))
    }
}

impl Client {
    /// Has the replica's loop send what it calls with its own answers.
    pub(crate) fn settle_in(&self, replica: &Arc<Replica>) {
        *lock(&self.home) = Arc::downgrade(replica);
    }
}

/// The request on whose behalf a call is made, if its context is that of one of this process's own.
fn parent_of(context: &Bound<'_, PyAny>) -> Option<Arc<Stream>> {
    if let Ok(head) = context.cast::<http::CallHead>() {
        return Some(head.get().stream.clone());
    }
    context.cast::<http::RequestHead>().ok().map(|head| head.get().stream.clone())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tell<'py>(py: Python<'py>, outcome: &Outcome) -> PyResult<Bound<'py, PyAny>> {
    Ok(match outcome {
        Outcome::Value(value) => {
            let value = lock(value).take();
            let value = value.ok_or_else(|| PyRuntimeError::new_err("the value has been taken"))?;
            let (pickle, buffers) = value::of_result(py, value)?;
            ("value", pickle, buffers).into_pyobject(py)?.into_any()
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
        if self.pending.stream {
            self.caller.drop_items(&self.pending);
        }
    }
}
