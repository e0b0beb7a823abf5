//! A body on its way into one bytes object, in the memory that the handler will get.

use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Room that is made at once for a body of known length. What is longer, or of unknown length, doubles its room as it
/// comes: a client gets no memory for bytes that it only announces.
const AHEAD: usize = 4 * 1024 * 1024;
const LEAST: usize = 64 * 1024;

/// See the module. Nobody else sees the object before it is finished.
pub(crate) struct Gather {
    /// Or why there is no memory for it.
    object: PyResult<Py<PyBytes>>,
    filled: usize,
    room: usize,
    expected: Option<usize>,
}

impl Gather {
    pub(crate) fn new(py: Python<'_>, expected: Option<usize>) -> Self {
        let room = expected.unwrap_or(LEAST).min(AHEAD);
        Self { object: raw(py, room), filled: 0, room, expected }
    }

    pub(crate) fn push(&mut self, py: Python<'_>, piece: &[u8]) {
        let end = self.filled + piece.len();
        if end > self.room {
            let doubled = 2 * self.room;
            self.resize(py, end.max(self.expected.map_or(doubled, |expected| expected.min(doubled))));
        }
        if let Ok(object) = &self.object {
            write(object.bind(py), self.filled, piece);
            self.filled = end;
        }
    }

    /// The whole of it.
    pub(crate) fn finish(mut self, py: Python<'_>) -> PyResult<Bound<'_, PyBytes>> {
        if self.filled < self.room {
            self.resize(py, self.filled);
        }
        self.object.map(|object| object.into_bound(py))
    }

    fn resize(&mut self, py: Python<'_>, room: usize) {
        let larger = self.object.as_ref().map_err(|error| error.clone_ref(py)).and_then(|old| {
            let larger = raw(py, room)?;
            write(larger.bind(py), 0, &old.as_bytes(py)[..self.filled]);
            Ok(larger)
        });
        (self.object, self.room) = (larger, room);
    }
}

/// A bytes object that is not initialised.
#[expect(unsafe_code, reason = "PyO3 clears the memory of a new object, which would be a second pass over each body")]
fn raw(py: Python<'_>, len: usize) -> PyResult<Py<PyBytes>> {
    let len = len.try_into().map_err(|_| PyMemoryError::new_err(()))?;
    // SAFETY: a new reference to a bytes object, or null and an error.
    unsafe {
        let object = Bound::from_owned_ptr_or_err(py, ffi::PyBytes_FromStringAndSize(std::ptr::null(), len))?;
        Ok(object.cast_into_unchecked().unbind())
    }
}

#[expect(unsafe_code, reason = "a bytes object can be written to while nobody has seen it")]
fn write(object: &Bound<'_, PyBytes>, at: usize, piece: &[u8]) {
    assert!(at + piece.len() <= object.as_bytes().len(), "room was made");
    // SAFETY: the object belongs to a Gather, which shows it to nobody, and is long enough.
    unsafe {
        let to = ffi::PyBytes_AsString(object.as_ptr()).cast::<u8>();
        std::ptr::copy_nonoverlapping(piece.as_ptr(), to.add(at), piece.len());
    }
}
