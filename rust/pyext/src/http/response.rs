//! What a handler returned, as frames.
//!
//! None, bytes, str and what `replica.responses.encode` makes of other values become one RESPONSE while they are short;
//! a response that is not complete is an ASGI application, and the caller has to run it.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyString, PyTuple};
use rayserve_dataplane::wire::head::put_response_head;
use rayserve_dataplane::wire::{Header, Kind, MAX_INLINE, flag, frame};

use crate::worker::replica::Replica;
use crate::worker::stream::{Answer, Head, Stream, pairs};

type Pairs = Vec<(PyBackedBytes, PyBackedBytes)>;

const TEXT: &[u8] = b"text/plain";
const TEXT_UTF8: &[u8] = b"text/plain; charset=utf-8";

/// Answers with a plain result; a response that must be run comes back.
pub(crate) fn put_result<'py>(
    replica: &Replica,
    stream: &Arc<Stream>,
    result: Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = result.py();
    if result.is_none() {
        put_text(stream, TEXT, b"");
    } else if let Ok(text) = result.cast_exact::<PyString>() {
        match text.to_str()? {
            short if short.len() <= MAX_INLINE => put_text(stream, TEXT_UTF8, short.as_bytes()),
            _ => put_long(py, stream, long_head(py, TEXT_UTF8), text.encode_utf8()?.into()),
        }
    } else if let Ok(body) = result.cast_exact::<PyBytes>() {
        match body.as_bytes() {
            short if short.len() <= MAX_INLINE => put_text(stream, TEXT, short),
            _ => put_long(py, stream, long_head(py, TEXT), body.clone().into()),
        }
    } else {
        let encoded = replica.hooks.encode.bind(py).call1((result,))?;
        match encoded.cast_exact::<PyTuple>() {
            Ok(encoded) => put_encoded(stream, encoded)?,
            Err(_) => return Ok(Some(encoded)),
        }
    }
    Ok(None)
}

/// Answers with (status, headers, body).
pub(crate) fn put_encoded(stream: &Arc<Stream>, encoded: &Bound<'_, PyTuple>) -> PyResult<()> {
    let (code, pairs, content) = (encoded.get_item(0)?, encoded.get_item(1)?, encoded.get_item(2)?);
    let (head, body) = (Head { status: status(&code)?, headers: headers(&pairs)? }, body(&content)?);
    if body.len() <= MAX_INLINE {
        put_whole(stream, &head, &body);
    } else {
        put_long(encoded.py(), stream, head, body);
    }
    Ok(())
}

fn put_text(stream: &Stream, content_type: &[u8], body: &[u8]) {
    put_frame(stream, 200, [(&b"content-type"[..], content_type)].into_iter(), body);
}

fn long_head(py: Python<'_>, content_type: &[u8]) -> Head {
    Head { status: 200, headers: vec![(owned(py, b"content-type"), owned(py, content_type))] }
}

fn owned(py: Python<'_>, part: &[u8]) -> PyBackedBytes {
    PyBytes::new(py, part).into()
}

/// Answers with a body that goes out in chunks, straight from Python's memory.
fn put_long(py: Python<'_>, stream: &Arc<Stream>, mut head: Head, body: PyBackedBytes) {
    // Only here is it known that nothing follows, and how long it is.
    let sized = head.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case(b"content-length"));
    if !sized && !matches!(head.status, 100..200 | 204 | 304) {
        head.headers.push((owned(py, b"content-length"), owned(py, body.len().to_string().as_bytes())));
    }
    let mut state = stream.state();
    state.outbox.head = Some(head);
    state.answer = Answer::Complete;
    let wants_turn = state.outbox.push(body, true);
    drop(state);
    if wants_turn {
        stream.link.enqueue(stream);
    }
}

/// Answers with one frame.
pub(super) fn put_whole(stream: &Stream, head: &Head, body: &[u8]) {
    put_frame(stream, head.status, pairs(&head.headers), body);
}

fn put_frame<'h>(
    stream: &Stream,
    status: u16,
    headers: impl Iterator<Item = (&'h [u8], &'h [u8])> + Clone,
    body: &[u8],
) {
    let header =
        stream.link.outgoing.stamp(Header::new(Kind::Response, stream.id).aux(status.into()).with(flag::FIN), 1);
    stream.link.put_with(|out| {
        frame::put_with(out, header, |out| {
            put_response_head(out, headers);
            out.extend_from_slice(body);
        });
    });
    stream.close();
}

/// A status that HTTP can carry in a final response.
pub(super) fn status(value: &Bound<'_, PyAny>) -> PyResult<u16> {
    match value.extract::<u16>() {
        Ok(status) if (100..1000).contains(&status) => Ok(status),
        Ok(_) => Err(PyValueError::new_err(format!("{value} is no HTTP status"))),
        Err(error) => Err(error),
    }
}

/// Headers from an iterable of pairs of bytes; one that would break the response apart is refused.
pub(super) fn headers(pairs: &Bound<'_, PyAny>) -> PyResult<Pairs> {
    let mut headers = Vec::with_capacity(pairs.len().unwrap_or(4));
    for pair in pairs.try_iter()? {
        let pair = pair?;
        let (name, value) = match pair.cast_exact::<PyTuple>() {
            Ok(pair) if pair.len() == 2 => (pair.get_item(0)?, pair.get_item(1)?),
            _ => pair.extract::<[Bound<'_, PyAny>; 2]>()?.into(),
        };
        let (name, value) = (body(&name)?, body(&value)?);
        if name.is_empty() || name.iter().any(|byte| !is_token(*byte)) {
            return Err(PyValueError::new_err(format!("invalid header name {:?}", String::from_utf8_lossy(&name))));
        }
        if value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
            return Err(PyValueError::new_err(format!("invalid value of header {:?}", String::from_utf8_lossy(&name))));
        }
        headers.push((name, value));
    }
    Ok(headers)
}

/// Bytes, or anything that `bytes()` takes for bytes.
pub(super) fn body(value: &Bound<'_, PyAny>) -> PyResult<PyBackedBytes> {
    if let Ok(bytes) = value.cast_exact::<PyBytes>() {
        return Ok(bytes.clone().into());
    }
    match value.extract::<pyo3::buffer::PyBuffer<u8>>() {
        Ok(buffer) => Ok(PyBytes::new(value.py(), &buffer.to_vec(value.py())?).into()),
        Err(_) => Err(PyTypeError::new_err(format!("expected bytes, got {}", value.get_type().name()?))),
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
