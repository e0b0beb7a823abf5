//! What `await response` waits on: a future of asyncio's kind, resolved by whoever reads the answer on the loop's thread.
//!
//! A task that waits is stepped right where its answer is read, instead of by way of `loop.call_soon`: what it sends next
//! shares the flush of the same tick. It is awaited as tasks await futures (`awaited.rs`), and belongs to one wait of one
//! task; the call itself knows nothing of it.

use std::sync::{Arc, Mutex};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyWeakrefMethods, PyWeakrefReference};
use slab::Slab;

use super::{mailbox::Mailbox, pending::Pending, turns::Caller};
use crate::awaited::{self, Awaited, call_soon, is_in_task, step};
use crate::lock::lock;
use crate::worker::run::Running;

/// Of a token, its place in the slab; the rest is its serial number.
const INDEX_BITS: u32 = 24;

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Pending,
    Done,
    Cancelled,
}

#[derive(Default)]
struct Inner {
    state: State,
    awaited: Awaited,
}

/// One wait for one call.
#[pyclass(frozen, freelist = 128, module = "rayserve_fast._core")]
pub(crate) struct Waiting {
    desk: Arc<Desk>,
    /// To stop waiting: the caller, the call and the token in the mailbox.
    call: (Arc<Caller>, Arc<Pending>, u64),
    inner: Mutex<Inner>,
}

/// One loop's waits, by the tokens of its mailbox.
pub(crate) struct Desk {
    mailbox: Arc<Mailbox>,
    /// Weak, as the loop is the key under which this is kept.
    event_loop: Py<PyWeakrefReference>,
    waits: Mutex<Waits>,
}

#[derive(Default)]
struct Waits {
    open: Slab<(u64, Option<Py<Waiting>>)>,
    /// Makes tokens unique: one may lie in the mailbox when its place in the slab is taken again.
    serial: u64,
}

impl Waits {
    fn reserve(&mut self) -> u64 {
        self.serial += 1;
        let token = self.serial << INDEX_BITS | self.open.vacant_key() as u64;
        self.open.insert((token, None));
        token
    }

    fn remove(&mut self, token: u64) -> Option<Py<Waiting>> {
        let index = index_of(token);
        self.open.get(index).filter(|(other, _)| *other == token)?;
        self.open.remove(index).1
    }
}

fn index_of(token: u64) -> usize {
    (token & ((1 << INDEX_BITS) - 1)) as usize
}

impl Desk {
    pub(crate) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    pub(super) fn new(event_loop: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self {
            mailbox: Arc::new(Mailbox::new()?),
            event_loop: PyWeakrefReference::new(event_loop)?.unbind(),
            waits: Mutex::default(),
        })
    }

    /// A wait for the call, which is over at once if `notify` says that there is nothing to wait for.
    pub(super) fn wait(
        self: &Arc<Self>,
        py: Python<'_>,
        caller: &Arc<Caller>,
        call: &Arc<Pending>,
        notify: impl FnOnce(&Caller, &Arc<Pending>, &Arc<Mailbox>, u64) -> bool,
    ) -> PyResult<Py<Waiting>> {
        let token = lock(&self.waits).reserve();
        let call = (Arc::clone(caller), Arc::clone(call), token);
        let waiting = Py::new(py, Waiting { desk: Arc::clone(self), call, inner: Mutex::default() })?;
        lock(&self.waits).open[index_of(token)].1 = Some(waiting.clone_ref(py));
        let (caller, call, _) = &waiting.get().call;
        if !notify(caller, call, &self.mailbox, token) {
            let over = lock(&self.waits).remove(token);
            drop(over);
            lock(&waiting.get().inner).state = State::Done;
        }
        Ok(waiting)
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.waits).open.is_empty()
    }

    /// Ends the waits of what the mailbox holds; on the loop's thread, outside every task.
    pub(crate) fn wake(&self, py: Python<'_>) -> PyResult<()> {
        let tokens = self.mailbox.take();
        if tokens.is_empty() {
            return Ok(());
        }
        let entered = is_in_task(py)?;
        let mut outcome = Ok(());
        for token in tokens {
            let waiting = lock(&self.waits).remove(token);
            if let Some(waiting) = waiting {
                outcome = outcome.and(waiting.get().end(waiting.bind(py), State::Done, entered));
            }
        }
        outcome
    }
}

impl Waiting {
    /// Ends the wait and steps whoever waits: at once, or soon if no task can be entered here.
    fn end(&self, this: &Bound<'_, Self>, state: State, soon: bool) -> PyResult<()> {
        let waiters = {
            let mut inner = lock(&self.inner);
            if inner.state != State::Pending {
                return Ok(());
            }
            inner.state = state;
            inner.awaited.take()
        };
        if !soon {
            return step(this, waiters, None);
        }
        // Without its loop nobody can be stepped any more.
        let Some(event_loop) = self.get_loop(this.py()) else { return Ok(()) };
        step(this, waiters, Some(&event_loop))
    }

    /// See [`Awaited::adopt`].
    pub(crate) fn adopt(&self, handler: Running) -> Option<Running> {
        lock(&self.inner).awaited.adopt(handler)
    }
}

#[pymethods]
impl Waiting {
    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(slf: Bound<'_, Self>) -> PyResult<Option<Bound<'_, Self>>> {
        let mut inner = lock(&slf.get().inner);
        match inner.state {
            State::Done => Ok(None),
            State::Cancelled => Err(inner.awaited.cancelled(slf.py())),
            State::Pending => {
                inner.awaited.block()?;
                drop(inner);
                Ok(Some(slf))
            }
        }
    }

    #[getter]
    fn _asyncio_future_blocking(&self) -> bool {
        lock(&self.inner).awaited.blocking
    }

    #[setter(_asyncio_future_blocking)]
    fn set_blocking(&self, blocking: bool) {
        lock(&self.inner).awaited.blocking = blocking;
    }

    fn get_loop<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.desk.event_loop.bind(py).upgrade()
    }

    #[pyo3(signature = (callback, *, context=None))]
    fn add_done_callback(slf: &Bound<'_, Self>, callback: Py<PyAny>, context: Option<Py<PyAny>>) -> PyResult<()> {
        let this = slf.get();
        let mut inner = lock(&this.inner);
        if inner.state == State::Pending {
            inner.awaited.watch((callback, context));
            return Ok(());
        }
        drop(inner);
        this.get_loop(slf.py()).map_or(Ok(()), |event_loop| call_soon(&event_loop, (callback, context), slf))
    }

    fn remove_done_callback(&self, callback: &Bound<'_, PyAny>) -> PyResult<usize> {
        awaited::remove(&self.inner, |inner| &mut inner.awaited, callback)
    }

    #[pyo3(signature = (msg=None))]
    fn cancel(slf: &Bound<'_, Self>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        let this = slf.get();
        {
            let mut inner = lock(&this.inner);
            if inner.state != State::Pending {
                return Ok(false);
            }
            inner.awaited.cancel(msg);
        }
        let (caller, call, token) = &this.call;
        caller.forget(call, *token);
        let forgotten = lock(&this.desk.waits).remove(*token);
        drop(forgotten);
        this.end(slf, State::Cancelled, true)?;
        Ok(true)
    }

    fn cancelled(&self) -> bool {
        lock(&self.inner).state == State::Cancelled
    }

    fn done(&self) -> bool {
        lock(&self.inner).state != State::Pending
    }

    fn result(&self, py: Python<'_>) -> PyResult<()> {
        let inner = lock(&self.inner);
        match inner.state {
            State::Done => Ok(()),
            State::Cancelled => Err(inner.awaited.cancelled(py)),
            State::Pending => Err(PyRuntimeError::new_err("the call has not ended")),
        }
    }

    fn exception(&self, py: Python<'_>) -> PyResult<()> {
        self.result(py)
    }
}
