//! Which method a call is for, found out in Python once and remembered here.

use std::sync::Mutex;

use pyo3::prelude::*;

use super::hooks::Hooks;
use crate::lock::lock;

/// A function answers to every name, so that names need an end.
const MOST: usize = 64;

/// Methods by name, and by whether the call is a streaming one; few enough to look through.
#[derive(Default)]
pub(super) struct Methods {
    known: Mutex<Vec<Method>>,
}

struct Method {
    name: String,
    streaming: bool,
    function: Py<PyAny>,
    /// A pool thread runs it.
    sync: bool,
}

impl Methods {
    /// The method, and whether a pool thread runs it; an error is for the caller to be told.
    pub(super) fn find(
        &self,
        py: Python<'_>,
        hooks: &Hooks,
        name: &str,
        streaming: bool,
    ) -> PyResult<(Py<PyAny>, bool)> {
        {
            let known = lock(&self.known);
            if let Some(method) = known.iter().find(|known| known.streaming == streaming && known.name == name) {
                return Ok((method.function.clone_ref(py), method.sync));
            }
        }
        let found: (Py<PyAny>, bool) = hooks.find_method.bind(py).call1((name, streaming))?.extract()?;
        let mut known = lock(&self.known);
        if known.len() < MOST {
            known.push(Method { name: name.to_owned(), streaming, function: found.0.clone_ref(py), sync: found.1 });
        }
        Ok(found)
    }
}
