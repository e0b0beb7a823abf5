//! A body on its way into one bytes object, in the memory that the handler will get.

use std::io;
use std::mem::MaybeUninit;

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
        self.write(py, piece);
    }

    /// Has so many bytes read behind what has come; how many did. None: there is no room.
    pub(crate) fn read(
        &mut self,
        py: Python<'_>,
        len: usize,
        read: impl FnOnce(&mut [MaybeUninit<u8>]) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        let read = read(self.spare(py).get_mut(..len)?);
        self.filled += read.as_ref().copied().unwrap_or_default();
        Some(read)
    }

    /// The whole of it.
    pub(crate) fn finish(mut self, py: Python<'_>) -> PyResult<Bound<'_, PyBytes>> {
        if self.filled < self.room {
            self.resize(py, self.filled);
        }
        self.object.map(|object| object.into_bound(py))
    }

    fn resize(&mut self, py: Python<'_>, room: usize) {
        let filled = std::mem::take(&mut self.filled);
        self.room = room;
        match std::mem::replace(&mut self.object, raw(py, room)) {
            Ok(old) => self.write(py, &old.as_bytes(py)[..filled]),
            failed => self.object = failed,
        }
    }

    fn write(&mut self, py: Python<'_>, piece: &[u8]) {
        for (to, from) in self.spare(py).iter_mut().zip(piece) {
            to.write(*from);
        }
        self.filled += piece.len();
    }

    /// The memory behind what has come.
    #[expect(unsafe_code, reason = "a bytes object can be written to while nobody has seen it")]
    fn spare(&mut self, _py: Python<'_>) -> &mut [MaybeUninit<u8>] {
        let Ok(object) = &self.object else { return &mut [] };
        // SAFETY: the object is `room` bytes long, and `self`, borrowed for as long as the slice, shows it to nobody.
        unsafe {
            let start = ffi::PyBytes_AsString(object.as_ptr()).cast::<MaybeUninit<u8>>();
            std::slice::from_raw_parts_mut(start.add(self.filled), self.room - self.filled)
        }
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
