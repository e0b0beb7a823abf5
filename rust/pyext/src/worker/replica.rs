//! What all links, streams and threads of a replica share: the limit and its queues, and what has to be flushed.
//!
//! Here requests are cancelled, links lost and the replica drained; `slots.rs` admits requests, `flush.rs` sends answers.
//! Nothing in the three runs user code: requests that may start wait in `ready` for whoever may run them (`run.rs`).

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};
use std::time::Duration;

use bytes::BytesMut;
use mio::{Registry, Token, Waker};
use pyo3::prelude::*;
use pyo3::types::PyString;
use rayserve_dataplane::engine::limit::Limit;
use rayserve_dataplane::wire::models::put_models;
use rayserve_dataplane::wire::{CallView, Fault, Header, Kind, Payload, RequestHeadView, flag};
use slab::Slab;

use super::calls::Calls;
use super::group::Group;
use super::hooks::Hooks;
use super::link::{Link, Outgoing};
use super::methods::Methods;
use super::pool::Pool;
use super::run::{Http, Running};
use super::step::{Started, Stepper};
use super::stream::{Stream, Woken};
use crate::http::{asgi, receive};
use crate::lock::lock;

/// What the worker has the loop call.
pub(crate) struct Callbacks {
    pub(crate) flush: Py<PyAny>,
    pub(crate) expire: Py<PyAny>,
    pub(crate) reclaim: Py<PyAny>,
}

/// A request that was taken in and has not been started.
pub(crate) struct Request {
    pub(crate) stream: Arc<Stream>,
    pub(crate) work: Work,
}

pub(crate) enum Work {
    Http(RequestHeadView),
    /// With whether the caller wants items.
    Call(CallView, bool),
}

/// What another thread leaves to the loop's.
pub(crate) enum Posted {
    /// A future to resolve with None.
    Resolve(Py<PyAny>),
    /// What a sync handler returned and only the loop can finish: a coroutine, or a response that must be run.
    Finish { head: Running, result: Py<PyAny>, context: Py<PyAny> },
    /// The same for a group, whose function returned a coroutine.
    FinishGroup { group: Py<Group>, result: Py<PyAny>, context: Py<PyAny> },
    /// Grants were given: come back for those that are not used.
    Reclaim,
}

/// Events since the start.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) busy: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) wakes: AtomicU64,
    pub(crate) flushes: AtomicU64,
}

pub(crate) struct Replica {
    pub(crate) app: Py<PyString>,
    /// The name of the header that carries a session's id.
    pub(crate) session_header: String,
    /// What MODELS says; empty: nothing to say.
    models: Mutex<BytesMut>,
    pub(crate) hooks: Hooks,
    pub(crate) http: Http,
    pub(super) methods: Methods,
    pub(crate) stepper: Stepper,
    /// The user's code takes lists.
    pub(super) batched: bool,
    /// The suspended tasks of groups.
    pub(super) tasks: Mutex<Slab<Started>>,
    pub(crate) pool: Pool,
    pub(crate) registry: Registry,
    pub(crate) waker: Waker,
    pub(crate) outgoing: Arc<Outgoing>,
    pub(crate) links: Mutex<HashMap<Token, Arc<Link>>>,
    pub(crate) counters: Counters,
    pub(crate) limit: Mutex<Limit>,
    pub(super) held: Mutex<VecDeque<Request>>,
    pub(crate) ready: Mutex<VecDeque<Request>>,
    /// Streams whose response head is given and perhaps not sent.
    pub(super) headed: Mutex<Vec<Arc<Stream>>>,
    /// The loop's thread is in the tick, which flushes at its end.
    pub(crate) ticking: AtomicBool,
    pub(super) scheduled: AtomicBool,
    pub(super) reclaiming: AtomicBool,
    /// The worker's own methods for the loop to call; taken out when it closes, as they hold the worker.
    pub(crate) callbacks: Mutex<Option<Callbacks>>,
    /// This is a child that user code has forked: it must never act for its parent.
    pub(crate) forked: AtomicBool,
    /// Another thread has asked the loop to flush.
    pub(super) nudged: AtomicBool,
    pub(super) turn: AtomicU64,
    draining: AtomicBool,
    pub(crate) posted: Mutex<VecDeque<Posted>>,
    pub(super) calls: Mutex<Option<Arc<Calls>>>,
    pub(crate) thread: OnceLock<ThreadId>,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Replica {
    #[expect(clippy::too_many_arguments, reason = "made in one place, of parts that are made there")]
    pub(crate) fn new(
        app: Py<PyString>,
        session_header: String,
        hooks: Hooks,
        http: Http,
        stepper: Stepper,
        pool: Pool,
        limit: usize,
        batched: bool,
        registry: Registry,
        waker: Waker,
    ) -> Self {
        Self {
            app,
            session_header,
            models: Mutex::default(),
            hooks,
            http,
            methods: Methods::default(),
            stepper,
            batched,
            tasks: Mutex::default(),
            pool,
            registry,
            waker,
            outgoing: Arc::default(),
            links: Mutex::default(),
            counters: Counters::default(),
            limit: Mutex::new(Limit::new(limit)),
            held: Mutex::default(),
            ready: Mutex::default(),
            headed: Mutex::default(),
            ticking: AtomicBool::new(false),
            scheduled: AtomicBool::new(false),
            reclaiming: AtomicBool::new(false),
            callbacks: Mutex::default(),
            forked: AtomicBool::new(false),
            nudged: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            posted: Mutex::default(),
            calls: Mutex::default(),
            thread: OnceLock::new(),
        }
    }

    /// A draining replica may leave when everything that was begun is answered, down to the last byte.
    pub(super) fn tell_if_idle(&self, py: Python<'_>) -> PyResult<()> {
        if self.is_draining() && lock(&self.limit).load() == 0 && lock(&self.links).values().all(|link| link.is_quiet())
        {
            self.hooks.idle.bind(py).call0()?;
        }
        Ok(())
    }

    /// Ends a stream that holds no slot.
    pub(super) fn turn_away(&self, stream: &Stream, kind: Kind, fault: u32) {
        let header = Header::new(kind, stream.id).aux(fault).with(flag::FIN);
        stream.link.put(self.outgoing.stamp(header, 0), &[]);
        stream.close();
    }

    /// Ends a stream that holds a slot with an error.
    pub(crate) fn end_with(&self, stream: &Arc<Stream>, fault: Fault, payload: &[u8]) {
        let cancelled = fault == Fault::Cancelled;
        count(if cancelled { &self.counters.cancelled } else { &self.counters.errors });
        {
            let mut state = stream.state();
            state.outbox.clear();
            if cancelled {
                state.outbox.clear_values();
            }
        }
        let mut whole = Payload::with_capacity(payload.len());
        whole.open().extend_from_slice(payload);
        whole.close();
        stream.put_value(Header::new(Kind::Error, stream.id).aux(fault as u32).with(flag::FIN), &whole);
        stream.close();
    }

    /// The caller has lost interest. What runs is told, what is held or in the pool's queue never starts.
    pub(crate) fn cancel(&self, py: Python<'_>, stream: &Arc<Stream>) -> PyResult<()> {
        let mut state = stream.state();
        state.cancelled = true;
        state.items.wake_thread();
        let task = state.task.as_ref().map(|suspended| suspended.started.task.clone_ref(py));
        let children = state.children.take();
        drop(state);
        let mut held = lock(&self.held);
        let at = held.iter().position(|request| Arc::ptr_eq(&request.stream, stream));
        let unheld = at.and_then(|at| held.remove(at));
        drop(held);
        if unheld.is_some() {
            self.with_limit(Limit::unheld);
        }
        if unheld.or_else(|| stream.link.parked.take(stream.id)).is_some() {
            count(&self.counters.cancelled);
            self.turn_away(stream, Kind::Error, Fault::Cancelled as u32);
        }
        if let Some(running) = self.pool.remove(stream) {
            running.replica().finish(py, &running, false, None, Ok(py.None().into_bound(py)));
        }
        // Both futures and the task belong to the loop, on whose thread this runs.
        receive::wake_readers(py, stream)?;
        asgi::fail_writer(py, stream)?;
        if let Some(task) = task {
            task.bind(py).call_method0(pyo3::intern!(py, "cancel"))?;
        }
        // After the task, which so hears of its own end and not of theirs.
        children.cancel();
        Ok(())
    }

    /// The link is dead, and with it every stream on it but those that go on: of these nobody takes the answer.
    pub(crate) fn lost(&self, py: Python<'_>, link: &Arc<Link>) -> PyResult<()> {
        self.end_link(py, link, |stream| !self.goes_on(stream))
    }

    /// Whether a stream goes on without its link: a call, as it may be of one who has not waited for its answer, that the
    /// user's code has begun. Calls with lists are not stopped anyway (`group.rs`).
    fn goes_on(&self, stream: &Arc<Stream>) -> bool {
        stream.unary && !self.batched && stream.state().began.is_some() && !self.pool.holds(stream)
    }

    /// Closes a link, and cancels these of its streams.
    pub(super) fn end_link(
        &self,
        py: Python<'_>,
        link: &Arc<Link>,
        ends: impl Fn(&Arc<Stream>) -> bool,
    ) -> PyResult<()> {
        lock(&self.links).remove(&link.token);
        for stream in link.close().iter().filter(|stream| ends(stream)) {
            self.cancel(py, stream)?;
        }
        self.with_limit(|limit| limit.forget(link.token.0));
        self.give_slots();
        // Not always within a tick, and nobody else would start who may start now.
        self.wake();
        self.tell_if_idle(py)
    }

    /// Takes no more work: says so on every link and gives held requests back.
    pub(crate) fn drain(&self, py: Python<'_>) -> PyResult<()> {
        self.draining.store(true, Ordering::Relaxed);
        self.with_limit(Limit::drain);
        let held = std::mem::take(&mut *lock(&self.held));
        for request in held {
            self.with_limit(Limit::unheld);
            self.turn_away(&request.stream, Kind::Returned, 0);
        }
        let links: Vec<_> = lock(&self.links).values().cloned().collect();
        for link in links {
            link.put(Header::new(Kind::Drain, 0), &[]);
        }
        self.flush(py)?;
        self.tell_if_idle(py)
    }

    /// Tells every caller which models the user's code holds or loads.
    pub(crate) fn announce(&self, py: Python<'_>, names: &[String]) -> PyResult<()> {
        let mut payload = BytesMut::new();
        put_models(&mut payload, names.iter().map(String::as_bytes));
        *lock(&self.models) = payload;
        let links: Vec<_> = lock(&self.links).values().cloned().collect();
        for link in links.iter().filter(|link| lock(&link.input).callee.is_none()) {
            self.tell_models(link);
        }
        self.settle(py)
    }

    pub(crate) fn tell_models(&self, link: &Arc<Link>) {
        link.put(Header::new(Kind::Models, 0), &[&lock(&self.models)]);
    }

    pub(crate) fn has_models(&self) -> bool {
        !lock(&self.models).is_empty()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub(crate) fn callback(&self, py: Python<'_>, which: impl FnOnce(&Callbacks) -> &Py<PyAny>) -> Option<Py<PyAny>> {
        lock(&self.callbacks).as_ref().map(|callbacks| which(callbacks).clone_ref(py))
    }

    /// Comes back for links that have not proven themselves.
    pub(super) fn expire_later(&self, py: Python<'_>, delay: Duration) -> PyResult<()> {
        if let Some(expire) = self.callback(py, |callbacks| &callbacks.expire) {
            self.hooks.call_later.bind(py).call1((delay.as_secs_f64(), expire))?;
        }
        Ok(())
    }

    /// Ends a forked child that has come out of the user's code: what is behind it belongs to the parent.
    pub(crate) fn leave_child(&self, py: Python<'_>) -> PyResult<()> {
        if self.forked.load(Ordering::Relaxed) {
            py.import("os")?.call_method1("_exit", (0,))?;
        }
        Ok(())
    }

    /// Whether this is the loop's thread; futures and tasks are touched nowhere else.
    pub(crate) fn on_loop(&self) -> bool {
        self.thread.get() == Some(&thread::current().id())
    }

    /// Resolves futures, here or on the loop's thread.
    pub(crate) fn resolve(&self, py: Python<'_>, woken: Woken) -> PyResult<()> {
        if woken.is_empty() {
            return Ok(());
        }
        if self.on_loop() {
            return asgi::resolve(py, woken);
        }
        self.post(woken.into_iter().map(Posted::Resolve));
        Ok(())
    }

    /// Leaves something to the loop's thread.
    pub(crate) fn post(&self, posted: impl IntoIterator<Item = Posted>) {
        lock(&self.posted).extend(posted);
        self.wake();
    }

    /// Makes the poller readable, so that the loop's thread comes round.
    pub(crate) fn wake(&self) {
        // Fails only without memory in the kernel; the next frame wakes the loop then.
        let _ = self.waker.wake();
    }
}
