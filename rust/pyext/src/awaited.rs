//! What tasks of asyncio know of its futures (`_asyncio_future_blocking`), for objects of ours that they await.
//!
//! [`Awaited`] is what the protocol needs of such an object's state. What is waited for, and when it is there, is the
//! object's own; it steps whoever waits right where that comes, instead of by way of `loop.call_soon`.

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

/// Whom to call, and in which context.
pub(crate) type Callback = (Py<PyAny>, Option<Py<PyAny>>);

/// Hears of a step, by the context of the task.
pub(crate) type Stepped<'a> = &'a mut dyn FnMut(&Bound<'_, PyAny>) -> PyResult<()>;

/// See the module.
#[derive(Default)]
pub(crate) struct Awaited {
    /// Set while a task takes the object over, by the protocol.
    pub(crate) blocking: bool,
    callbacks: Vec<Callback>,
}

impl Awaited {
    /// The task that asks for the next step waits here.
    pub(crate) fn block(&mut self) -> PyResult<()> {
        if std::mem::replace(&mut self.blocking, true) {
            return Err(PyRuntimeError::new_err("await wasn't used with future"));
        }
        Ok(())
    }

    pub(crate) fn is_watched(&self) -> bool {
        !self.callbacks.is_empty()
    }

    pub(crate) fn watch(&mut self, callback: Callback) {
        self.callbacks.push(callback);
    }

    pub(crate) fn take(&mut self) -> Vec<Callback> {
        std::mem::take(&mut self.callbacks)
    }

    /// Before those that have come meanwhile.
    pub(crate) fn put_back(&mut self, callbacks: Vec<Callback>) {
        self.callbacks.splice(0..0, callbacks);
    }
}

/// Splits callbacks, outside of any lock, into those that are not equal to this one and how many are.
pub(crate) fn without(callbacks: Vec<Callback>, callback: &Bound<'_, PyAny>) -> PyResult<(Vec<Callback>, usize)> {
    let before = callbacks.len();
    let mut left = Vec::new();
    for (other, context) in callbacks {
        if !other.bind(callback.py()).eq(callback)? {
            left.push((other, context));
        }
    }
    let gone = before - left.len();
    Ok((left, gone))
}

/// Steps whoever waits for `this`: at once, or soon on this loop, where no task can be entered.
pub(crate) fn step(
    this: &Bound<'_, PyAny>,
    callbacks: Vec<Callback>,
    soon: Option<&Bound<'_, PyAny>>,
    stepped: Stepped<'_>,
) -> PyResult<()> {
    let py = this.py();
    let mut outcome = Ok(());
    for (callback, context) in callbacks {
        let called = match (soon, context) {
            (Some(event_loop), context) => call_soon(event_loop, (callback, context), this),
            (None, Some(context)) => {
                let context = context.into_bound(py);
                let called = context.call_method1(intern!(py, "run"), (callback, this)).map(drop);
                called.and(stepped(&context))
            }
            (None, None) => callback.call1(py, (this,)).map(drop),
        };
        outcome = outcome.and(called);
    }
    outcome
}

pub(crate) fn call_soon(
    event_loop: &Bound<'_, PyAny>,
    (callback, context): Callback,
    this: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let keywords = PyDict::new(this.py());
    keywords.set_item("context", context)?;
    event_loop.call_method("call_soon", (callback, this), Some(&keywords)).map(drop)
}

/// Whether a task runs on this thread now: somebody runs the loop from within it, and none can be entered.
pub(crate) fn is_in_task(py: Python<'_>) -> PyResult<bool> {
    static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    Ok(!CURRENT.import(py, "asyncio", "current_task")?.call0()?.is_none())
}
