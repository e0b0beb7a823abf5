//! The request's body: ASGI's `receive`, message by message, and the whole of it at once.
//!
//! `receive` gives what has come since the last message and after the body the real disconnect. Whoever wants nothing but
//! the whole body gets one bytes object that the frames were copied into as they came, and Python runs once.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict};
use rayserve_dataplane::wire::{Header, Kind};

use super::asgi::{Ready, is_done};
use super::gather::Gather;
use super::request::RequestHead;
use crate::worker::stream::{Answer, Stream};

/// The next message of the request; after the body, the disconnect.
pub(super) fn receive<'py>(py: Python<'py>, head: &RequestHead) -> PyResult<Bound<'py, PyAny>> {
    let stream = &head.stream;
    if let Some(message) = message(py, stream)? {
        head.replica.settle(py)?;
        return Ready::with(message.into_any());
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

/// The whole body, to be awaited; None if the client goes away before.
pub(super) fn read<'py>(py: Python<'py>, head: &RequestHead) -> PyResult<Bound<'py, PyAny>> {
    let stream = &head.stream;
    let future = head.replica.hooks.create_future.bind(py).call0()?;
    let mut state = stream.state();
    let inbox = &mut state.inbox;
    inbox.gatherers.push(future.clone().unbind());
    if inbox.gather.is_none() {
        let mut headers = head.view.headers();
        let length = headers.find(|(name, _)| *name == b"content-length").map(|(_, value)| value);
        let length = length.and_then(|value| str::from_utf8(value).ok()?.parse().ok());
        inbox.gather = Some(Gather::new(py, length));
    }
    inbox.gather_chunks(py);
    drop(state);
    wake_readers(py, stream)?;
    head.replica.settle(py)?;
    Ok(future)
}

/// Resolves the futures of those who wait for the body, as far as there is something for them now.
pub(crate) fn wake_readers(py: Python<'_>, stream: &Arc<Stream>) -> PyResult<()> {
    if !stream.state().inbox.gatherers.is_empty() {
        wake_gatherers(py, stream)?;
    }
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

/// The same for the whole body. Window is given back while somebody still waits: a body that nobody wants stops there.
fn wake_gatherers(py: Python<'_>, stream: &Arc<Stream>) -> PyResult<()> {
    let mut waiting = Vec::new();
    for gatherer in std::mem::take(&mut stream.state().inbox.gatherers) {
        if !is_done(gatherer.bind(py))? {
            waiting.push(gatherer);
        }
    }
    if waiting.is_empty() {
        return Ok(());
    }
    let mut state = stream.state();
    let fin = state.inbox.fin;
    let over = state.cancelled || (state.answer == Answer::Complete && !fin);
    let inbox = &mut state.inbox;
    if !over && !fin {
        inbox.gatherers = waiting;
        let credit = inbox.credit();
        drop(state);
        give_back(stream, credit);
        return Ok(());
    }
    (inbox.begun, inbox.taken) = (true, inbox.fin);
    let gather = inbox.gather.take();
    drop(state);
    let body = if over { Ok(None) } else { gather.map(|gather| gather.finish(py)).transpose() };
    for gatherer in waiting {
        let future = gatherer.bind(py);
        match &body {
            Ok(body) => future.call_method1(intern!(py, "set_result"), (body,))?,
            Err(error) => future.call_method1(intern!(py, "set_exception"), (error.value(py),))?,
        };
    }
    Ok(())
}

/// The whole body, if it has come and nothing of it was received; `receive` still gives it.
pub(super) fn whole_body<'py>(py: Python<'py>, stream: &Arc<Stream>) -> Option<Bound<'py, PyBytes>> {
    let chunks = {
        let state = stream.state();
        (state.inbox.fin && !state.inbox.begun && state.inbox.gather.is_none()).then(|| state.inbox.chunks.clone())?
    };
    joined(py, &chunks).ok()
}

/// What `receive` gives now, or None if it has to wait.
fn message<'py>(py: Python<'py>, stream: &Arc<Stream>) -> PyResult<Option<Bound<'py, PyDict>>> {
    let mut state = stream.state();
    // A request that goes on without its client has its body first: the rest of it comes, or CANCEL. What has not come
    // before the answer was complete never does.
    let (answered, inbox) = (state.answer == Answer::Complete, &state.inbox);
    let missing = inbox.chunks.is_empty() && !inbox.fin;
    let over = state.cancelled || (inbox.taken && (state.left || answered)) || (missing && answered);
    if let Some(gather) = state.inbox.gather.take_if(|_| !over) {
        // Who wanted the whole has given up.
        let begun = PyBackedBytes::from(gather.finish(py)?);
        state.inbox.chunks.push_front(Bytes::from_owner(begun));
    }
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
    give_back(stream, credit);
    message.set_item(kind, intern!(py, "http.request"))?;
    message.set_item(intern!(py, "body"), joined(py, &chunks)?)?;
    message.set_item(intern!(py, "more_body"), more)?;
    Ok(Some(message))
}

fn give_back(stream: &Stream, credit: u32) {
    if credit > 0 {
        stream.link.put(Header::new(Kind::Window, stream.id).aux(credit), &[]);
    }
}

fn joined<'py>(py: Python<'py>, chunks: &VecDeque<Bytes>) -> PyResult<Bound<'py, PyBytes>> {
    if let (Some(only), 1) = (chunks.front(), chunks.len()) {
        return Ok(PyBytes::new(py, only));
    }
    let mut whole = Gather::new(py, Some(chunks.iter().map(Bytes::len).sum()));
    for chunk in chunks {
        whole.push(py, chunk);
    }
    whole.finish(py)
}
