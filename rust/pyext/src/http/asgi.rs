//! ASGI over a stream: the scope, `receive` and `send`.
//!
//! Both callables do their work when they are called and return something to await: the shared [`Ready`] when there is
//! nothing to wait for, so that the task goes on without going round the loop, else a future. `send` waits while body
//! bytes wait for the window; `receive` waits for body bytes and after them for the real disconnect. A stream that never
//! has to wait is made to after 64 KiB or a millisecond, or nobody else would run.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyStopIteration, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyString};
use rayserve_dataplane::wire::{Header, Kind, MAX_INLINE};

use super::request::RequestHead;
use super::response;
use crate::worker::replica::Replica;
use crate::worker::stream::{Answer, Head, Pace, Stream, Woken};

const STEADY_BYTES: usize = 64 * 1024;
const STEADY_TIME: Duration = Duration::from_millis(1);

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
struct Ready {
    value: Option<Py<PyAny>>,
    pause: bool,
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
    Ok(scope)
}

/// The next message of the request; after the body, the disconnect.
pub(super) fn receive<'py>(py: Python<'py>, head: &RequestHead) -> PyResult<Bound<'py, PyAny>> {
    let stream = &head.stream;
    if let Some(message) = message(py, stream)? {
        head.replica.settle(py)?;
        return Ok(Bound::new(py, Ready { value: Some(message.into_any().unbind()), pause: false })?.into_any());
    }
    let future = head.replica.hooks.create_future.bind(py).call0()?;
    let waiting = std::mem::take(&mut stream.state().inbox.readers);
    let mut readers = vec![future.clone().unbind()];
    for other in waiting {
        // One that was cancelled is forgotten: `is_disconnected()` leaves one behind each time.
        if !is_done(other.bind(py))? {
            readers.push(other);
        }
    }
    stream.state().inbox.readers = readers;
    Ok(future)
}

/// Resolves the futures of those `receive()` that wait, as far as there is something for them now.
pub(crate) fn wake_readers(py: Python<'_>, stream: &Arc<Stream>) -> PyResult<()> {
    let mut waiting = std::mem::take(&mut stream.state().inbox.readers);
    while let Some(reader) = waiting.pop() {
        let future = reader.bind(py);
        if is_done(future)? {
            continue;
        }
        let Some(message) = message(py, stream)? else {
            waiting.push(reader);
            break;
        };
        future.call_method1(intern!(py, "set_result"), (message,))?;
    }
    stream.state().inbox.readers = waiting;
    Ok(())
}

/// The whole body, if it has come and nothing of it was received; `receive` still gives it.
pub(super) fn whole_body<'py>(py: Python<'py>, stream: &Arc<Stream>) -> Option<Bound<'py, PyBytes>> {
    let chunks = {
        let state = stream.state();
        (state.inbox.fin && !state.inbox.begun).then(|| state.inbox.chunks.clone())?
    };
    Some(joined(py, &chunks))
}

/// What `receive` gives now, or None if it has to wait.
fn message<'py>(py: Python<'py>, stream: &Arc<Stream>) -> PyResult<Option<Bound<'py, PyDict>>> {
    let mut state = stream.state();
    let over = state.cancelled || (state.inbox.taken && state.answer == Answer::Complete);
    if !over && (state.inbox.taken || (state.inbox.chunks.is_empty() && !state.inbox.fin)) {
        return Ok(None);
    }
    let taken = (!over).then(|| (state.inbox.take(), !state.inbox.fin));
    drop(state);
    let message = PyDict::new(py);
    let kind = intern!(py, "type");
    let Some(((chunks, credit), more)) = taken else {
        message.set_item(kind, intern!(py, "http.disconnect"))?;
        return Ok(Some(message));
    };
    if credit > 0 {
        stream.link.put(Header::new(Kind::Window, stream.id).aux(credit), &[]);
    }
    message.set_item(kind, intern!(py, "http.request"))?;
    message.set_item(intern!(py, "body"), joined(py, &chunks))?;
    message.set_item(intern!(py, "more_body"), more)?;
    Ok(Some(message))
}

fn joined<'py>(py: Python<'py>, chunks: &VecDeque<Bytes>) -> Bound<'py, PyBytes> {
    if let (Some(only), 1) = (chunks.front(), chunks.len()) {
        return PyBytes::new(py, only);
    }
    let len = chunks.iter().map(Bytes::len).sum();
    PyBytes::new_with(py, len, |mut to| {
        for chunk in chunks {
            let (here, rest) = to.split_at_mut(chunk.len());
            here.copy_from_slice(chunk);
            to = rest;
        }
        Ok(())
    })
    .expect("memory for a body that is in memory already")
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
    drop(state);
    if wants_turn {
        let mut woken = Woken::new();
        stream.link.enqueue(stream, &mut woken);
        resolve(py, woken)?;
    }
    if !more {
        wake_readers(py, stream)?;
    }
    replica.settle(py)?;
    wait_for_room(head, py, len)
}

/// Suspends the application while its bytes wait for the window, and now and then in any case.
fn wait_for_room<'py>(head: &RequestHead, py: Python<'py>, len: usize) -> PyResult<Bound<'py, PyAny>> {
    let stream = &head.stream;
    let full = stream.state().outbox.is_full();
    if full {
        let future = head.replica.hooks.create_future.bind(py).call0()?;
        let mut state = stream.state();
        // What was put while the future was made may have been the last of it.
        if state.outbox.is_full() {
            let replaced = state.outbox.writer.replace(future.clone().unbind());
            drop(state);
            resolve(py, replaced.into_iter().collect())?;
            return Ok(future);
        }
    }
    if is_breathless(&head.replica, stream, len) { pause(py) } else { done(py) }
}

/// Whether a stream that never has to wait should let others run, now that it has sent `len` bytes more.
pub(crate) fn is_breathless(replica: &Replica, stream: &Stream, len: usize) -> bool {
    let turn = replica.turn();
    let mut state = stream.state();
    let (pace, now) = (&mut state.outbox.pace, Instant::now());
    let since = match pace.since {
        Some(since) if pace.turn == turn => since,
        _ => {
            *pace = Pace { turn, bytes: 0, since: Some(now) };
            now
        }
    };
    pace.bytes += len;
    let pause = pace.bytes >= STEADY_BYTES || now - since >= STEADY_TIME;
    if pause {
        *pace = Pace::default();
    }
    pause
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

fn is_done(future: &Bound<'_, PyAny>) -> PyResult<bool> {
    future.call_method0(intern!(future.py(), "done"))?.is_truthy()
}

fn disconnected() -> PyErr {
    PyOSError::new_err("the client has disconnected")
}
