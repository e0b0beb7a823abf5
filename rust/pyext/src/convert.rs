//! Bytes of the wire to Python's values.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

/// Text that is UTF-8, or else latin-1, which every byte is.
pub(crate) fn text<'py>(py: Python<'py>, bytes: &[u8]) -> Bound<'py, PyString> {
    match std::str::from_utf8(bytes) {
        Ok(text) => PyString::new(py, text),
        Err(_) => PyString::new(py, &bytes.iter().map(|byte| char::from(*byte)).collect::<String>()),
    }
}

/// A path with its percent-escapes resolved; what is not UTF-8 then becomes U+FFFD.
pub(crate) fn unquoted<'py>(py: Python<'py>, path: &[u8]) -> Bound<'py, PyString> {
    if !path.contains(&b'%') {
        return PyString::new(py, &String::from_utf8_lossy(path));
    }
    let digit = |at: usize| path.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let (mut out, mut at) = (Vec::with_capacity(path.len()), 0);
    while at < path.len() {
        let escape = (path[at] == b'%').then(|| digit(at + 1).zip(digit(at + 2))).flatten();
        out.push(escape.map_or(path[at], |(high, low)| (high << 4 | low) as u8));
        at += if escape.is_some() { 3 } else { 1 };
    }
    PyString::new(py, &String::from_utf8_lossy(&out))
}

/// A pair of name and value.
pub(crate) fn pair<'py>(py: Python<'py>, name: &[u8], value: &[u8]) -> (Bound<'py, PyBytes>, Bound<'py, PyBytes>) {
    (PyBytes::new(py, name), PyBytes::new(py, value))
}
