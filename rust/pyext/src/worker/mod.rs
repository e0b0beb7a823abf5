//! The driver inside a replica: `Worker`, what Python sees of it.
//!
//! `replica/runtime.py` makes one on the user's event loop and has the loop watch [`Worker::fileno`]; everything else
//! happens in [`Worker::tick`] and in callbacks of the loop, or in the pool's threads when they take and finish jobs.

mod answer;
mod batch;
mod calls;
pub(crate) mod flush;
mod frames;
pub(crate) mod group;
pub(crate) mod hooks;
mod inbox;
pub(crate) mod items;
pub(crate) mod jobs;
pub(crate) mod link;
mod methods;
pub(crate) mod poll;
pub(crate) mod pool;
pub(crate) mod replica;
pub(crate) mod run;
mod slots;
pub(crate) mod step;
pub(crate) mod stream;
mod vigil;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use mio::Waker;
use mio::net::{TcpListener, UnixListener};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyString;

use self::hooks::Hooks;
use self::jobs::Ready;
use self::poll::{After, HELLO, Listener, Poller, Taken, WAKER};
use self::pool::Pool;
use self::replica::{Callbacks, Replica};
use self::run::{Http, HttpKind};
use self::step::Stepper;
use crate::client::{Client, Mailbox};
use crate::lock::lock;

/// While jobs are queued or answers unsent, somebody looks after them this often; the loop's timers are no finer.
const LOOK_S: f64 = 0.001;

#[pyclass(frozen, weakref, module = "rayserve_fast._core")]
pub(crate) struct Worker {
    replica: Arc<Replica>,
    poller: Mutex<Option<Poller>>,
    looking: AtomicBool,
}

#[pymethods]
impl Worker {
    #[new]
    #[pyo3(signature = (event_loop, hooks, *, app, name, replica_id, token, max_ongoing_requests, batched, session_header, kind, handler, request))]
    #[expect(clippy::too_many_arguments, reason = "keywords, made in one place")]
    fn new(
        event_loop: &Bound<'_, PyAny>,
        hooks: &Bound<'_, PyAny>,
        app: Py<PyString>,
        name: &str,
        replica_id: String,
        token: Vec<u8>,
        max_ongoing_requests: usize,
        batched: bool,
        session_header: String,
        kind: &str,
        handler: Py<PyAny>,
        request: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let py = event_loop.py();
        let kind = match kind {
            "async" => HttpKind::Async,
            "sync" => HttpKind::Sync,
            "asgi" => HttpKind::Asgi,
            other => return Err(PyValueError::new_err(format!("unknown kind of handler {other:?}"))),
        };
        let poller = Poller::new(token, replica_id)?;
        let registry = poller.poll.registry().try_clone()?;
        let waker = Waker::new(&registry, WAKER)?;
        let pool = Pool::default();
        pool.resize(max_ongoing_requests);
        let replica = Replica::new(
            app,
            session_header,
            Hooks::read(event_loop, hooks)?,
            Http { kind, handler, request },
            Stepper::new(py, event_loop, name)?,
            pool,
            max_ongoing_requests,
            batched,
            registry,
            waker,
        );
        Ok(Self { replica: Arc::new(replica), poller: Mutex::new(Some(poller)), looking: AtomicBool::new(false) })
    }

    fn listen_unix(&self, path: PathBuf) -> PyResult<()> {
        let listener = UnixListener::bind(path)?;
        self.with_poller(|poller| Ok(poller.listen(Listener::Unix(listener))?))
    }

    /// The port that was bound.
    fn listen_tcp(&self, host: &str) -> PyResult<u16> {
        let address = SocketAddr::new(host.parse()?, 0);
        let listener = TcpListener::bind(address)?;
        let port = listener.local_addr()?.port();
        self.with_poller(|poller| Ok(poller.listen(Listener::Tcp(listener))?))?;
        Ok(port)
    }

    fn fileno(&self) -> PyResult<i32> {
        self.with_poller(|poller| Ok(poller.poll.as_raw_fd()))
    }

    /// Makes the calling thread the loop's.
    fn attach(slf: &Bound<'_, Self>) -> PyResult<()> {
        let replica = &slf.get().replica;
        let _ = replica.thread.set(thread::current().id());
        let method = |name: &str| slf.getattr(name).map(Bound::unbind);
        let callbacks = Callbacks { flush: method("flush")?, expire: method("expire")?, reclaim: method("reclaim")? };
        *lock(&replica.callbacks) = Some(callbacks);
        Ok(())
    }

    /// Has the loop make its handle calls, and wait for them, through this worker's poller.
    fn adopt(&self, client: &Client, mailbox: &Mailbox) -> PyResult<()> {
        self.replica.adopt(client.caller.clone(), mailbox.desk.clone())?;
        client.settle_in(&self.replica);
        Ok(())
    }

    fn tick(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, it) = (slf.py(), slf.get());
        let Some(mut taken) = Taken::take(&it.poller, &it.replica) else { return Ok(()) };
        let mut after = poll::run(py, &it.replica, taken.poller());
        if matches!(after, Ok(After::Nothing)) && vigil::stay_up(py, &it.replica, taken.poller()) {
            after = Ok(After::Again);
        }
        drop(taken);
        // After an error too: what it has left over would not be reported again.
        if !matches!(after, Ok(After::Nothing)) {
            it.replica.hooks.call_soon.bind(py).call1((slf.getattr(intern!(py, "tick"))?,))?;
        }
        Self::look_soon(slf)?;
        after.map(drop)
    }

    /// Sends what callbacks have put since the last time.
    fn flush(slf: &Bound<'_, Self>) -> PyResult<()> {
        slf.get().replica.flush_turn(slf.py())?;
        Self::look_soon(slf)
    }

    fn look(slf: &Bound<'_, Self>) -> PyResult<()> {
        let it = slf.get();
        it.looking.store(false, Ordering::Relaxed);
        it.replica.flush(slf.py())?;
        Self::look_soon(slf)
    }

    fn expire(&self, py: Python<'_>) -> PyResult<()> {
        match Taken::take(&self.poller, &self.replica) {
            Some(mut taken) => taken.poller().expire(py, &self.replica),
            // A handler runs the loop from within a tick.
            None => self.replica.expire_later(py, HELLO),
        }
    }

    fn reclaim(&self, py: Python<'_>) -> PyResult<()> {
        self.replica.reclaim(py)?;
        self.replica.run_ready(py)?;
        self.replica.settle(py)
    }

    /// The next job, after a wait if there is none; None: the thread may go home.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Option<Ready<'py>>> {
        self.replica.next_job(py)
    }

    /// Answers with a job's result; `context` is what the job ran in.
    fn done(&self, head: &Bound<'_, PyAny>, result: Bound<'_, PyAny>, context: Py<PyAny>) -> PyResult<()> {
        self.replica.job_done(head, Ok((result, context)))?;
        self.replica.after_job(head.py(), &self.looking)
    }

    /// Answers with what a job has raised.
    fn fail(&self, head: &Bound<'_, PyAny>, error: Bound<'_, PyAny>) -> PyResult<()> {
        self.replica.job_done(head, Err(PyErr::from_value(error)))?;
        self.replica.after_job(head.py(), &self.looking)
    }

    fn stop_pool(&self) {
        self.replica.pool.stop();
    }

    fn resize(&self, py: Python<'_>, max_ongoing_requests: usize) -> PyResult<()> {
        let replica = &self.replica;
        replica.with_limit(|limit| limit.resize(max_ongoing_requests));
        replica.pool.resize(max_ongoing_requests);
        replica.give_slots();
        replica.flush(py)?;
        replica.wake();
        Ok(())
    }

    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        self.replica.drain(py)
    }

    /// On the loop's thread: the models that the user's code holds or loads from now on.
    #[expect(clippy::needless_pass_by_value, reason = "what a Python argument becomes is owned")]
    fn announce(&self, py: Python<'_>, models: Vec<String>) -> PyResult<()> {
        self.replica.announce(py, &models)
    }

    /// Requests that run or are held.
    fn load(&self) -> usize {
        lock(&self.replica.limit).load()
    }

    fn counters(&self) -> HashMap<&'static str, u64> {
        let replica = &self.replica;
        let (running, held) = {
            let limit = lock(&replica.limit);
            (limit.running(), limit.load() - limit.running())
        };
        let (links, streams) = {
            let links = lock(&replica.links);
            (links.len(), links.values().map(|link| link.open_streams()).sum::<usize>())
        };
        let events = &replica.counters;
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        HashMap::from([
            ("running", running as u64),
            ("held", held as u64),
            ("links", links as u64),
            ("streams", streams as u64),
            ("requests", read(&events.requests)),
            ("busy", read(&events.busy)),
            ("errors", read(&events.errors)),
            ("cancelled", read(&events.cancelled)),
            ("wakes", read(&events.wakes)),
            ("flushes", read(&events.flushes)),
        ])
    }

    /// Sends what is unsent and closes every socket; on the loop's thread, after it has stopped watching.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.replica.flush(py)?;
        let links: Vec<_> = lock(&self.replica.links).values().cloned().collect();
        for link in links {
            self.replica.end_link(py, &link, |_| true)?;
        }
        self.close_descriptors();
        let callbacks = lock(&self.replica.callbacks).take();
        drop(callbacks);
        Ok(())
    }

    /// In a forked child: it must not hold its parent's links open, and ends when it comes out of the user's code.
    fn abandon(&self) {
        self.replica.forked.store(true, Ordering::Relaxed);
        self.close_descriptors();
    }
}

impl Worker {
    fn close_descriptors(&self) {
        let poller = lock(&self.poller).take();
        drop(poller);
        let links = std::mem::take(&mut *lock(&self.replica.links));
        for link in links.into_values() {
            let streams = link.close();
            drop(streams);
        }
    }

    fn with_poller<T>(&self, f: impl FnOnce(&mut Poller) -> PyResult<T>) -> PyResult<T> {
        match &mut *lock(&self.poller) {
            Some(poller) => f(poller),
            None => Err(PyRuntimeError::new_err("the worker is closed or in a tick")),
        }
    }

    /// Looks again in a while if jobs are queued or answers unsent, as the thread that would see to them may be blocked.
    fn look_soon(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, it) = (slf.py(), slf.get());
        let replica = &it.replica;
        let idle = replica.pool.is_empty() && replica.outgoing.since().is_none();
        if !idle && !it.looking.swap(true, Ordering::Relaxed) {
            replica.hooks.call_later.bind(py).call1((LOOK_S, slf.getattr(intern!(py, "look"))?))?;
        }
        replica.ring(py)
    }
}
