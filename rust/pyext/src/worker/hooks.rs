//! The functions in Python that the worker calls, resolved once.

use pyo3::prelude::*;

/// What the worker calls in Python; `replica/runtime.py` says what each does.
pub(crate) struct Hooks {
    pub(crate) call_soon: Py<PyAny>,
    pub(crate) call_later: Py<PyAny>,
    pub(crate) create_future: Py<PyAny>,
    pub(crate) context: Py<PyAny>,
    pub(crate) encode: Py<PyAny>,
    pub(crate) failed: Py<PyAny>,
    pub(crate) spawn: Py<PyAny>,
    pub(crate) find_method: Py<PyAny>,
    pub(crate) begin_call: Py<PyAny>,
    pub(crate) run_call: Py<PyAny>,
    pub(crate) dump_result: Py<PyAny>,
    pub(crate) dump_error: Py<PyAny>,
    pub(crate) idle: Py<PyAny>,
    pub(crate) enter_batch: Py<PyAny>,
    pub(crate) group: Py<PyAny>,
    pub(crate) run_group: Py<PyAny>,
    pub(crate) results: Py<PyAny>,
    pub(crate) failed_batch: Py<PyAny>,
    /// `types.CoroutineType`.
    pub(crate) coroutine: Py<PyAny>,
}

impl Hooks {
    pub(crate) fn read(event_loop: &Bound<'_, PyAny>, hooks: &Bound<'_, PyAny>) -> PyResult<Self> {
        let of_loop = |name: &str| event_loop.getattr(name).map(Bound::unbind);
        let hook = |name: &str| hooks.getattr(name).map(Bound::unbind);
        Ok(Self {
            call_soon: of_loop("call_soon")?,
            call_later: of_loop("call_later")?,
            create_future: of_loop("create_future")?,
            context: hook("context")?,
            encode: hook("encode")?,
            failed: hook("failed")?,
            spawn: hook("spawn")?,
            find_method: hook("find_method")?,
            begin_call: hook("begin_call")?,
            run_call: hook("run_call")?,
            dump_result: hook("dump_result")?,
            dump_error: hook("dump_error")?,
            idle: hook("idle")?,
            enter_batch: hook("enter_batch")?,
            group: hook("group")?,
            run_group: hook("run_group")?,
            results: hook("results")?,
            failed_batch: hook("failed_batch")?,
            coroutine: event_loop.py().import("types")?.getattr("CoroutineType")?.unbind(),
        })
    }
}
