//! Values between Python and payloads: a pickle, and the buffers beside it.
//!
//! On the way out the buffers are copied once, all into one piece of memory, as the caller may change them as soon as it
//! has them back; a large pickle is immutable and stays where it is. On the way in a large payload is not copied at all:
//! Python gets its memory to keep and to change, unless somebody else reads it too (a value that is being relayed).

use std::{ops::Range, os::raw::c_int, sync::atomic::AtomicPtr, sync::atomic::Ordering::Relaxed};

use bytes::{Buf, Bytes, BytesMut};
use pyo3::{
    buffer::PyBuffer,
    exceptions::PyBufferError,
    ffi,
    prelude::*,
    pybacked::PyBackedBytes,
    sync::PyOnceLock,
    types::{PyByteArray, PyBytes, PyDict, PyList, PyTuple},
};
use rayserve_dataplane::wire::{
    LARGE, Payload,
    call::{ALIGN, Arguments, Span, Value, put_value_head},
};

use crate::plain;

/// Appends a value.
pub(crate) fn put(py: Python<'_>, out: &mut Payload, pickle: &Bound<'_, PyBytes>, buffers: &[PyBuffer<u8>]) {
    let bytes = pickle.as_bytes();
    out.align(ALIGN);
    put_value_head(out.open(), bytes.len(), buffers.iter().map(|buffer| buffer.len_bytes()));
    if bytes.len() < LARGE {
        out.open().extend_from_slice(bytes);
    } else {
        out.push(Bytes::from_owner(PyBackedBytes::from(pickle.clone())));
    }
    let total = buffers.iter().map(|buffer| buffer.len_bytes().next_multiple_of(ALIGN)).sum();
    if total >= LARGE {
        out.align(ALIGN);
        let mut memory = BytesMut::with_capacity(total);
        for buffer in buffers {
            memory.resize(memory.len().next_multiple_of(ALIGN), 0);
            memory.extend_from_slice(bytes_of(py, buffer));
        }
        out.push(memory.freeze());
    } else {
        for buffer in buffers {
            out.align(ALIGN);
            out.open().extend_from_slice(bytes_of(py, buffer));
        }
    }
}

#[expect(
    unsafe_code,
    reason = "PyO3 offers a slice of cells, which cannot be copied at once, or a copy into zeroed memory"
)]
fn bytes_of<'a>(_: Python<'a>, buffer: &'a PyBuffer<u8>) -> &'a [u8] {
    assert!(buffer.is_c_contiguous(), "pickle's raw buffers are flat");
    if buffer.len_bytes() == 0 {
        return &[]; // its pointer may be null
    }
    // SAFETY: the view keeps the memory alive and says how long it is; whoever writes to it needs the interpreter, which
    // the caller does not let go of before it has copied.
    unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.len_bytes()) }
}

/// Appends a value that Python need not pickle; `false`, and nothing appended: it must.
pub(crate) fn put_plain(out: &mut Payload, value: &Bound<'_, PyAny>) -> bool {
    put_with(out, |out| plain::put(out, value))
}

/// The same for the arguments of a call.
pub(crate) fn put_plain_arguments(out: &mut Payload, args: &Bound<'_, PyTuple>, kwargs: &Bound<'_, PyDict>) -> bool {
    put_with(out, |out| plain::put_arguments(out, args, kwargs))
}

fn put_with(out: &mut Payload, put: impl FnOnce(&mut BytesMut) -> bool) -> bool {
    out.align(ALIGN);
    let out = out.open();
    let head = out.len();
    put_value_head(out, 0, std::iter::empty());
    let start = out.len();
    if !put(out) {
        out.truncate(head);
        return false;
    }
    // How long the pickle is, the head can only say now.
    let end = out.len();
    put_value_head(out, end - start, std::iter::empty());
    out.copy_within(end.., head);
    out.truncate(end);
    true
}

/// A result, decoded.
pub(crate) fn load(py: Python<'_>, value: Value) -> PyResult<Bound<'_, PyAny>> {
    static LOADS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if value.span.buffers.is_empty()
        && let Some(plain) = plain::read(py, &value.payload[value.span.pickle.clone()])
    {
        return Ok(plain);
    }
    let (pickle, buffers) = of_result(py, value)?;
    LOADS.import(py, "rayserve_fast.values", "loads")?.call1((pickle, buffers))
}

/// The arguments of a call, if Python's pickle is not needed to decode them.
pub(crate) fn plain_arguments<'py>(
    py: Python<'py>,
    arguments: &Arguments,
) -> Option<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
    if !arguments.relayed.is_empty() || !arguments.own.buffers.is_empty() {
        return None;
    }
    plain::read_arguments(py, &arguments.payload[arguments.own.pickle.clone()])
}

/// What `values.loads` takes: a pickle, and a list of buffers.
type Loadable<'py> = (Bound<'py, PyAny>, Bound<'py, PyList>);

/// A result as Python decodes it.
pub(crate) fn of_result(py: Python<'_>, Value { payload, span }: Value) -> PyResult<Loadable<'_>> {
    Pieces::new(payload).value(py, span)
}

/// A call's arguments: the pair of tuple and dict, and the relayed ones with their places.
pub(crate) fn of_call(py: Python<'_>, arguments: Arguments) -> PyResult<Bound<'_, PyTuple>> {
    let mut pieces = Pieces::new(arguments.payload);
    let (pickle, buffers) = pieces.value(py, arguments.own)?;
    let relayed = PyList::empty(py);
    for (slot, span) in arguments.relayed {
        let (pickle, buffers) = pieces.value(py, span)?;
        relayed.append((slot, pickle, buffers))?;
    }
    (pickle, buffers, relayed).into_pyobject(py)
}

/// A payload that is taken apart from front to back.
enum Pieces {
    Owned { rest: BytesMut, at: usize },
    Shared(Bytes),
}

impl Pieces {
    fn new(payload: Bytes) -> Self {
        if payload.len() < LARGE {
            return Self::Shared(payload);
        }
        match payload.try_into_mut() {
            // Arrays in odd places would be slow, or refused by who cannot read them.
            Ok(rest) if rest.as_ptr().addr() % ALIGN == 0 => Self::Owned { rest, at: 0 },
            Ok(rest) => Self::Shared(rest.freeze()),
            Err(payload) => Self::Shared(payload),
        }
    }

    fn value<'py>(&mut self, py: Python<'py>, span: Span) -> PyResult<Loadable<'py>> {
        let pickle = match self {
            Self::Owned { .. } if span.pickle.len() >= LARGE => self.piece(py, span.pickle)?,
            Self::Owned { rest, at } => {
                PyBytes::new(py, &rest[span.pickle.start - *at..span.pickle.end - *at]).into_any()
            }
            Self::Shared(payload) => PyBytes::new(py, &payload[span.pickle]).into_any(),
        };
        let buffers = PyList::empty(py);
        for buffer in span.buffers {
            buffers.append(self.piece(py, buffer)?)?;
        }
        Ok((pickle, buffers))
    }

    fn piece<'py>(&mut self, py: Python<'py>, range: Range<usize>) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Self::Shared(payload) => Ok(PyByteArray::new(py, &payload[range]).into_any()),
            Self::Owned { rest, at } => {
                rest.advance(range.start - *at);
                *at = range.end;
                Ok(Bound::new(py, Memory::new(rest.split_to(range.len())))?.into_any())
            }
        }
    }
}

/// Memory that came from a socket; arrays of a decoded value live in it.
#[pyclass(frozen, module = "rayserve_fast._core")]
struct Memory {
    start: AtomicPtr<u8>,
    bytes: BytesMut,
}

impl Memory {
    fn new(mut bytes: BytesMut) -> Self {
        Self { start: AtomicPtr::new(bytes.as_mut_ptr()), bytes }
    }
}

#[pymethods]
#[expect(unsafe_code, reason = "Python's buffer protocol is a C struct")]
#[expect(clippy::needless_pass_by_value, reason = "the protocol's signature")]
impl Memory {
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        let memory = slf.get();
        let (start, len) = (memory.start.load(Relaxed), memory.bytes.len().cast_signed());
        // SAFETY: the view holds a reference to this object, whose bytes neither move nor are touched from here any more;
        // nobody else has them, or they would not be a BytesMut.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast(), len, 0, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }

    #[expect(clippy::unused_self, reason = "the protocol's signature")]
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}
