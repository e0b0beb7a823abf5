//! What tasks of asyncio know of its futures (`_asyncio_future_blocking`), for objects of ours that they await.
//!
//! [`Awaited`] is what the protocol needs of such an object's state. What is waited for, and when it is there, is the
//! object's own; it steps whoever waits right where that comes, instead of by way of `loop.call_soon`. A handler that is
//! over with that step is answered there as well: its task needs no callback of its own, which the loop would have to run.

use std::sync::Mutex;

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use crate::lock::lock;
use crate::worker::run::Running;

pyo3::import_exception!(asyncio, CancelledError);

/// Whom to call, and in which context.
pub(crate) type Callback = (Py<PyAny>, Option<Py<PyAny>>);

/// See the module.
#[derive(Default)]
pub(crate) struct Awaited {
    /// Set while a task takes the object over, by the protocol.
    pub(crate) blocking: bool,
    waiters: Waiters,
    /// What `cancel` was told; whoever cancels a task knows its own cancellation by it, as anyio's scopes do.
    message: Option<Py<PyAny>>,
}

/// Who waits.
#[derive(Default)]
pub(crate) struct Waiters {
    callbacks: Vec<Callback>,
    /// The request whose handler's task is among them and is watched by nobody else.
    handler: Option<Running>,
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
        !self.waiters.callbacks.is_empty()
    }

    pub(crate) fn watch(&mut self, callback: Callback) {
        self.waiters.callbacks.push(callback);
    }

    /// Watches the task of a handler that waits here; the request comes back if nobody is going to be stepped from here.
    pub(crate) fn adopt(&mut self, handler: Running) -> Option<Running> {
        if !self.is_watched() || self.waiters.handler.is_some() {
            return Some(handler);
        }
        self.waiters.handler = Some(handler);
        None
    }

    pub(crate) fn cancel(&mut self, message: Option<Py<PyAny>>) {
        self.message = message;
    }

    /// What whoever waits for a cancelled one gets.
    pub(crate) fn cancelled(&self, py: Python<'_>) -> PyErr {
        match &self.message {
            Some(message) => CancelledError::new_err((message.clone_ref(py),)),
            None => CancelledError::new_err(()),
        }
    }

    pub(crate) fn take(&mut self) -> Waiters {
        std::mem::take(&mut self.waiters)
    }
}

/// Removes the callbacks that are equal to this one, and says how many. They are compared outside of the lock, as that is
/// code of the user's, and stay meanwhile: whoever waits is stepped though it fails, or an answer comes.
pub(crate) fn remove<S>(
    state: &Mutex<S>,
    awaited: impl Fn(&mut S) -> &mut Awaited,
    callback: &Bound<'_, PyAny>,
) -> PyResult<usize> {
    let py = callback.py();
    let copy = |(other, _): &Callback| other.clone_ref(py);
    let known: Vec<_> = awaited(&mut lock(state)).waiters.callbacks.iter().map(copy).collect();
    let mut equal = Vec::new();
    for other in known {
        if other.bind(py).eq(callback)? {
            equal.push(other);
        }
    }
    let is_equal = |(other, _): &mut Callback| equal.iter().any(|equal| equal.is(&*other));
    let gone: Vec<_> = awaited(&mut lock(state)).waiters.callbacks.extract_if(.., is_equal).collect();
    Ok(gone.len())
}

/// Steps whoever waits for `this`: at once, or soon on this loop, where no task can be entered.
pub(crate) fn step(
    this: &Bound<'_, PyAny>,
    Waiters { callbacks, handler }: Waiters,
    soon: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let py = this.py();
    let mut outcome = Ok(());
    for (callback, context) in callbacks {
        let called = match (soon, context) {
            (Some(event_loop), context) => call_soon(event_loop, (callback, context), this),
            (None, Some(context)) => context.call_method1(py, intern!(py, "run"), (callback, this)).map(drop),
            (None, None) => callback.call1(py, (this,)).map(drop),
        };
        outcome = outcome.and(called);
    }
    let Some(handler) = handler else { return outcome };
    outcome.and(if soon.is_some() { handler.watch(py) } else { handler.stepped(py) })
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
