//! ASGI over a stream: the scope and `send`; `receive.rs` has the other direction.
//!
//! Both callables do their work when they are called and return something to await: [`Done`] or a [`Ready`] when there is
//! nothing to wait for, so that the task goes on without going round the loop, else a future. What `send` is given waits in
//! the stream for the next flush, where pieces share a frame; `send` waits while much of it does, for the window. A stream
//! that never has to wait is made to after 64 KiB or a millisecond, or nobody else would run.

use std::time::Instant;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyStopIteration, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyString};
use rayserve_dataplane::wire::MAX_INLINE;

use super::receive::wake_readers;
use super::request::RequestHead;
use super::response;
use crate::worker::stream::{Answer, Head, Stream, Woken};
use crate::worker::{flush::STALE, replica::Replica};

/// The scope's keys besides its type.
const KEYS: [&str; 12] = [
    "asgi",
    "http_version",
    "server",
    "client",
    "scheme",
    "method",
    "root_path",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "state",
];

/// An awaitable that is done; with `pause`, it lets the loop go round once.
#[pyclass(module = "rayserve_fast._core")]
pub(super) struct Ready {
    value: Option<Py<PyAny>>,
    pause: bool,
}

impl Ready {
    pub(super) fn with(value: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyAny>> {
        let py = value.py();
        Ok(Bound::new(py, Self { value: Some(value.unbind()), pause: false })?.into_any())
    }
}

#[pymethods]
impl Ready {
    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&mut self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        if std::mem::take(&mut self.pause) {
            return Ok(Some(py.None())); // a bare yield, as asyncio.sleep(0) does
        }
        match self.value.take() {
            Some(value) => Err(PyStopIteration::new_err((value,))),
            None => Ok(None),
        }
    }
}

/// Done with None; one for all, as it has no state to change.
#[pyclass(frozen, module = "rayserve_fast._core")]
struct Done;

#[pymethods]
impl Done {
    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[expect(clippy::unused_self, reason = "the iterator protocol")]
    fn __next__(&self) -> Option<u8> {
        None
    }
}

fn done(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static DONE: PyOnceLock<Py<Done>> = PyOnceLock::new();
    Ok(DONE.get_or_try_init(py, || Py::new(py, Done))?.bind(py).clone().into_any())
}

/// The connection scope; see the ASGI specification, HTTP, version 2.4. A copy of one that has all the keys is made at
/// half the cost of a dict that grows.
pub(super) fn scope<'py>(head: &Bound<'py, RequestHead>) -> PyResult<Bound<'py, PyDict>> {
    static TEMPLATE: PyOnceLock<(Py<PyDict>, Py<PyDict>)> = PyOnceLock::new();
    let py = head.py();
    let (template, asgi) = TEMPLATE.get_or_try_init(py, || {
        let (template, asgi) = (PyDict::new(py), PyDict::new(py));
        asgi.set_item("version", "3.0")?;
        asgi.set_item("spec_version", "2.4")?;
        template.set_item("type", "http")?;
        for key in KEYS {
            template.set_item(key, py.None())?;
        }
        PyResult::Ok((template.unbind(), asgi.unbind()))
    })?;
    let scope = template.bind(py).copy()?;
    scope.set_item(intern!(py, "asgi"), asgi.bind(py).copy()?)?;
    let head = head.get();
    scope.set_item(intern!(py, "http_version"), head.http_version(py))?;
    scope.set_item(intern!(py, "server"), head.server(py))?;
    scope.set_item(intern!(py, "client"), head.client(py))?;
    scope.set_item(intern!(py, "scheme"), head.scheme(py))?;
    scope.set_item(intern!(py, "method"), head.method(py))?;
    scope.set_item(intern!(py, "root_path"), head.root_path(py))?;
    scope.set_item(intern!(py, "path"), head.path(py))?;
    scope.set_item(intern!(py, "raw_path"), head.raw_path(py))?;
    scope.set_item(intern!(py, "query_string"), head.query_string(py))?;
    scope.set_item(intern!(py, "headers"), head.headers(py)?)?;
    scope.set_item(intern!(py, "state"), PyDict::new(py))?;
    if head.view.params().next().is_some() {
        scope.set_item(intern!(py, "path_params"), head.path_params(py)?)?;
    }
    Ok(scope)
}

/// Takes one message of the application.
pub(super) fn send<'py>(head: &RequestHead, message: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyAny>> {
    let py = message.py();
    let kind =
        message.get_item(intern!(py, "type"))?.ok_or_else(|| PyTypeError::new_err("ASGI message has no type"))?;
    match kind.cast::<PyString>()?.to_str()? {
        "http.response.start" => start(head, message),
        "http.response.body" => body(head, message),
        other => Err(PyRuntimeError::new_err(format!("Unexpected ASGI message '{other}'."))),
    }
}

fn start<'py>(head: &RequestHead, message: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyAny>> {
    let py = message.py();
    let status =
        message.get_item(intern!(py, "status"))?.ok_or_else(|| PyTypeError::new_err("response start has no status"))?;
    let headers = match message.get_item(intern!(py, "headers"))? {
        Some(headers) => response::headers(&headers)?,
        None => Vec::new(),
    };
    let start = Head { status: response::status(&status)?, headers };
    let mut state = head.stream.state();
    if state.cancelled {
        return Err(disconnected());
    }
    if state.answer != Answer::Nothing {
        return Err(PyRuntimeError::new_err("Unexpected ASGI message 'http.response.start', response has started."));
    }
    state.answer = Answer::Headed;
    state.outbox.head = Some(start);
    drop(state);
    // Sent with the first body bytes, or with the next flush if they take longer.
    head.replica.headed(&head.stream);
    head.replica.settle(py)?;
    done(py)
}

fn body<'py>(head: &RequestHead, message: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyAny>> {
    let (py, stream, replica) = (message.py(), &head.stream, &head.replica);
    let piece = match message.get_item(intern!(py, "body"))? {
        Some(body) => response::body(&body)?,
        None => PyBytes::new(py, b"").into(),
    };
    let more = message.get_item(intern!(py, "more_body"))?.is_some_and(|more| more.is_truthy().unwrap_or(false));
    let len = piece.len();
    let mut state = stream.state();
    match state.answer {
        _ if state.cancelled => return Err(disconnected()),
        Answer::Headed => {}
        Answer::Nothing => {
            return Err(PyRuntimeError::new_err(
                "Expected ASGI message 'http.response.start', got 'http.response.body'.",
            ));
        }
        Answer::Complete => {
            return Err(PyRuntimeError::new_err(
                "Unexpected ASGI message 'http.response.body' sent, after response already completed.",
            ));
        }
    }
    if !more {
        state.answer = Answer::Complete;
        if len <= MAX_INLINE
            && !state.outbox.has_body()
            && let Some(start) = state.outbox.head.take()
        {
            drop(state);
            response::put_whole(stream, &start, &piece);
            wake_readers(py, stream)?;
            replica.settle(py)?;
            return done(py);
        }
    }
    let wants_turn = state.outbox.push(piece, !more);
    let (full, now, began) = (state.outbox.is_full(), Instant::now(), state.began);
    let pace = &mut state.outbox.pace;
    let slow = pace.last.replace(now).or(began).is_some_and(|last| now - last >= STALE);
    let breathless = !full && pace.is_breathless(replica.turn(), len, now);
    drop(state);
    if wants_turn {
        stream.link.enqueue(stream);
    }
    if !more {
        wake_readers(py, stream)?;
    }
    // A piece that took long to make is not held back for the next one.
    if slow {
        replica.flush(py)?;
    } else {
        replica.settle_at(py, now)?;
    }
    match (full, breathless) {
        (true, _) => wait_for_room(head, py),
        (false, true) => pause(py),
        (false, false) => done(py),
    }
}

/// Suspends the application while many of its bytes wait for the window.
fn wait_for_room<'py>(head: &RequestHead, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
    let future = head.replica.hooks.create_future.bind(py).call0()?;
    let mut state = head.stream.state();
    // What was flushed meanwhile may have been the most of it.
    if !state.outbox.is_full() {
        drop(state);
        return done(py);
    }
    let replaced = state.outbox.writer.replace(future.clone().unbind());
    drop(state);
    resolve(py, replaced.into_iter().collect())?;
    Ok(future)
}

/// Whether a stream that never has to wait should let others run, now that it has sent `len` bytes more.
pub(crate) fn is_breathless(replica: &Replica, stream: &Stream, len: usize) -> bool {
    stream.state().outbox.pace.is_breathless(replica.turn(), len, Instant::now())
}

/// Lets the loop go round once.
pub(crate) fn pause(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    Ok(Bound::new(py, Ready { value: None, pause: true })?.into_any())
}

/// Resolves futures with None, except those that are done.
pub(crate) fn resolve(py: Python<'_>, woken: Woken) -> PyResult<()> {
    for future in woken {
        let future = future.into_bound(py);
        if !is_done(&future)? {
            future.call_method1(intern!(py, "set_result"), (py.None(),))?;
        }
    }
    Ok(())
}

/// Fails the future of a `send()` that waits: the client has gone.
pub(crate) fn fail_writer(py: Python<'_>, stream: &Stream) -> PyResult<()> {
    let Some(writer) = stream.state().outbox.writer.take() else { return Ok(()) };
    let writer = writer.into_bound(py);
    if !is_done(&writer)? {
        writer.call_method1(intern!(py, "set_exception"), (disconnected().into_value(py),))?;
    }
    Ok(())
}

/// The error of an application that has ended, or of one that has not completed its response.
pub(crate) fn missing(outcome: PyResult<Bound<'_, PyAny>>, answer: Answer) -> Option<PyErr> {
    match (outcome, answer) {
        (Err(error), _) => Some(error),
        (Ok(_), Answer::Complete) => None,
        (Ok(_), Answer::Headed) => Some(PyRuntimeError::new_err("ASGI callable returned without completing response.")),
        (Ok(_), Answer::Nothing) => Some(PyRuntimeError::new_err("ASGI callable returned without starting response.")),
    }
}

pub(super) fn is_done(future: &Bound<'_, PyAny>) -> PyResult<bool> {
    future.call_method0(intern!(future.py(), "done"))?.is_truthy()
}

fn disconnected() -> PyErr {
    PyOSError::new_err("the client has disconnected")
}
