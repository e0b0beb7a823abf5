//! `Ticket`: one call of a batched function, from the queue to its result, and what its caller waits on meanwhile.
//!
//! It is awaited as tasks await futures (`awaited.rs`), so the caller's task is stepped where the results come in, all
//! callers of a batch in one callback of the loop. Awaiting is over when there is something to take: the result; or one
//! item after the other, until the end of the stream; or the error, which comes last.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use pyo3::exceptions::{PyRuntimeError, PyStopAsyncIteration};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::Batcher;
use crate::awaited::{self, Awaited, call_soon};
use crate::lock::lock;
use crate::worker::run::Running;

#[pyclass(frozen, freelist = 256, module = "rayserve_fast._core")]
pub(crate) struct Ticket {
    batcher: Py<Batcher>,
    /// Of the request that calls; None outside of one.
    #[pyo3(get)]
    pub(super) context: Py<PyAny>,
    pub(super) since: Instant,
    /// How many of the positional arguments are the object that the function is a method of: none or one.
    skip: usize,
    inner: Mutex<Inner>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Queued,
    /// In a batch that runs, or ended.
    Begun,
    /// Nobody takes anything any more.
    Left,
}

struct Inner {
    stage: Stage,
    cancelled: bool,
    /// None once the caller has left the queue.
    given: Option<(Py<PyTuple>, Option<Py<PyDict>>)>,
    values: VecDeque<Py<PyAny>>,
    end: Option<End>,
    /// It is among those whose callers are to be stepped.
    woken: bool,
    awaited: Awaited,
}

/// How it ends behind the last value: an error and its traceback, or simply so.
type End = Option<(Py<PyAny>, Py<PyAny>)>;

impl Inner {
    fn is_ready(&self) -> bool {
        self.cancelled || self.end.is_some() || !self.values.is_empty()
    }

    /// Whether somebody waits who has not been told; then that is done.
    fn is_to_be_woken(&mut self) -> bool {
        self.awaited.is_watched() && !std::mem::replace(&mut self.woken, true)
    }
}

impl Ticket {
    pub(super) fn new(
        batcher: Py<Batcher>,
        args: Py<PyTuple>,
        kwargs: Option<Py<PyDict>>,
        context: Py<PyAny>,
        skip: usize,
    ) -> Self {
        let inner = Inner {
            stage: Stage::Queued,
            cancelled: false,
            given: Some((args, kwargs)),
            values: VecDeque::new(),
            end: None,
            woken: false,
            awaited: Awaited::default(),
        };
        Self { batcher, context, since: Instant::now(), skip, inner: Mutex::new(inner) }
    }

    pub(super) fn is_queued(&self) -> bool {
        lock(&self.inner).stage == Stage::Queued
    }

    /// Whether it was in the queue still, which it leaves.
    pub(super) fn begin(&self) -> bool {
        let mut inner = lock(&self.inner);
        let queued = inner.stage == Stage::Queued;
        if queued {
            inner.stage = Stage::Begun;
        }
        queued
    }

    /// Whether somebody is to be woken now.
    pub(super) fn give(&self, value: Py<PyAny>) -> bool {
        let mut inner = lock(&self.inner);
        if inner.stage == Stage::Left || inner.end.is_some() {
            drop(inner);
            drop(value);
            return false;
        }
        inner.values.push_back(value);
        inner.is_to_be_woken()
    }

    /// Whether somebody is to be woken now.
    pub(super) fn end(&self, end: End) -> bool {
        let mut inner = lock(&self.inner);
        if inner.stage == Stage::Left || inner.end.is_some() {
            drop(inner);
            drop(end);
            return false;
        }
        inner.end = Some(end);
        inner.is_to_be_woken()
    }

    /// Steps whoever waits: at once, or soon if no task can be entered here.
    pub(super) fn wake(&self, this: &Bound<'_, Self>, event_loop: &Bound<'_, PyAny>, soon: bool) -> PyResult<()> {
        let waiters = {
            let mut inner = lock(&self.inner);
            inner.woken = false;
            inner.awaited.take()
        };
        awaited::step(this, waiters, soon.then_some(event_loop))
    }

    /// See [`Awaited::adopt`].
    pub(crate) fn adopt(&self, handler: Running) -> Option<Running> {
        lock(&self.inner).awaited.adopt(handler)
    }

    /// Its only argument, if it has one positional one and no other.
    pub(super) fn only<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        match &lock(&self.inner).given {
            Some((args, None)) if args.bind(py).len() == self.skip + 1 => args.bind(py).get_item(self.skip).ok(),
            _ => None,
        }
    }

    /// What a measure is given: its first argument.
    pub(super) fn item<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        let inner = lock(&self.inner);
        let (args, kwargs) = inner.given.as_ref()?;
        let first = args.bind(py).get_item(self.skip).ok();
        first.or_else(|| kwargs.as_ref()?.bind(py).values().get_item(0).ok())
    }

    fn leave(&self, mut inner: MutexGuard<'_, Inner>) {
        let queued = inner.stage == Stage::Queued;
        inner.stage = Stage::Left;
        let left = (queued.then(|| inner.given.take()), std::mem::take(&mut inner.values));
        drop(inner);
        if queued {
            self.batcher.get().left();
        }
        drop(left); // may run code of the user's
    }
}

#[pymethods]
impl Ticket {
    /// The object that the function is a method of.
    #[getter]
    fn owner<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        let inner = lock(&self.inner);
        let (args, _) = inner.given.as_ref().filter(|_| self.skip > 0)?;
        args.bind(py).get_item(0).ok()
    }

    /// The arguments without that object.
    fn arguments<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Option<Bound<'py, PyDict>>)> {
        let inner = lock(&self.inner);
        let (args, kwargs) = inner.given.as_ref().ok_or_else(|| PyRuntimeError::new_err("the caller has left"))?;
        let args = args.bind(py);
        Ok((args.get_slice(self.skip, args.len()), kwargs.as_ref().map(|kwargs| kwargs.bind(py).clone())))
    }

    /// What awaiting has waited for; `StopAsyncIteration` at the end of a stream.
    fn take(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let mut inner = lock(&self.inner);
        if let Some(value) = inner.values.pop_front() {
            return Ok(value);
        }
        match &inner.end {
            Some(Some((error, traceback))) => {
                let (error, traceback) = (error.clone_ref(py), traceback.clone_ref(py));
                drop(inner);
                // Each caller raises the same exception; without this its traceback would grow from one to the next.
                let error = error.bind(py).call_method1(intern!(py, "with_traceback"), (traceback,))?;
                Err(PyErr::from_value(error))
            }
            Some(None) => Err(PyStopAsyncIteration::new_err(())),
            None => Err(PyRuntimeError::new_err("nothing has come yet: await the ticket first")),
        }
    }

    /// The caller takes nothing any more.
    fn abandon(&self) {
        let inner = lock(&self.inner);
        if inner.stage != Stage::Left {
            self.leave(inner);
        }
    }

    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(slf: Bound<'_, Self>) -> PyResult<Option<Bound<'_, Self>>> {
        let mut inner = lock(&slf.get().inner);
        if inner.cancelled {
            return Err(inner.awaited.cancelled(slf.py()));
        }
        if inner.is_ready() {
            return Ok(None);
        }
        inner.awaited.block()?;
        drop(inner);
        Ok(Some(slf))
    }

    #[getter]
    fn _asyncio_future_blocking(&self) -> bool {
        lock(&self.inner).awaited.blocking
    }

    #[setter(_asyncio_future_blocking)]
    fn set_blocking(&self, blocking: bool) {
        lock(&self.inner).awaited.blocking = blocking;
    }

    fn get_loop<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        self.batcher.get().event_loop.bind(py).clone()
    }

    #[pyo3(signature = (callback, *, context=None))]
    fn add_done_callback(slf: &Bound<'_, Self>, callback: Py<PyAny>, context: Option<Py<PyAny>>) -> PyResult<()> {
        let mut inner = lock(&slf.get().inner);
        if !inner.is_ready() {
            inner.awaited.watch((callback, context));
            return Ok(());
        }
        drop(inner);
        call_soon(&slf.get().get_loop(slf.py()), (callback, context), slf)
    }

    fn remove_done_callback(&self, callback: &Bound<'_, PyAny>) -> PyResult<usize> {
        awaited::remove(&self.inner, |inner| &mut inner.awaited, callback)
    }

    /// The caller is cancelled: queued, it leaves the queue; in a batch that runs, its result is dropped.
    #[pyo3(signature = (msg=None))]
    fn cancel(slf: &Bound<'_, Self>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        let this = slf.get();
        let mut inner = lock(&this.inner);
        if inner.stage == Stage::Left || inner.is_ready() {
            return Ok(false);
        }
        inner.cancelled = true;
        inner.awaited.cancel(msg);
        this.leave(inner);
        this.wake(slf, &this.get_loop(slf.py()), true)?;
        Ok(true)
    }

    fn cancelled(&self) -> bool {
        lock(&self.inner).cancelled
    }

    fn done(&self) -> bool {
        lock(&self.inner).is_ready()
    }

    /// What a task asks before it goes on; what there is to take, `take` gives.
    fn result(&self, py: Python<'_>) -> PyResult<()> {
        let inner = lock(&self.inner);
        if inner.cancelled {
            return Err(inner.awaited.cancelled(py));
        }
        if inner.is_ready() { Ok(()) } else { Err(PyRuntimeError::new_err("Result is not ready.")) }
    }
}
