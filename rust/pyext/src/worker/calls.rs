//! The client side in a replica: its handle calls go through the worker's poller, tick and flush.
//!
//! The poller of the calls stands inside the worker's: one wake of the loop brings requests and answers, and a task whose
//! answer came is stepped within the tick. What the loop's thread calls is flushed with the tick's answers. Other threads
//! of the replica read and send for themselves, as in a driver.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use pyo3::prelude::*;

use super::flush::STALE;
use super::replica::Replica;
use crate::client::{Caller, Desk};
use crate::lock::lock;

/// The token of the calls' poller in the worker's.
pub(super) const CALLS: Token = Token(1);

/// The calls of this process, and the waits of its loop.
pub(crate) struct Calls {
    pub(crate) caller: Arc<Caller>,
    desk: Arc<Desk>,
    outbox: Mutex<Outbox>,
    /// The worker's poller reports what comes for calls.
    watched: AtomicBool,
}

#[derive(Default)]
struct Outbox {
    unsent: bool,
    flushed: Option<Instant>,
}

impl Calls {
    /// The loop has calls of its own.
    fn watch(&self, registry: &Registry) {
        if !self.watched.swap(true, Ordering::Relaxed) {
            // Cannot fail but for want of memory in the kernel; then the tender reads.
            let _ = registry.register(&mut SourceFd(&self.caller.as_raw_fd()), CALLS, Interest::READABLE);
        }
    }

    /// The loop waits for nothing, and a pool's thread reads its own answers: each of them would wake the loop.
    fn ignore(&self, registry: &Registry) {
        if self.watched.swap(false, Ordering::Relaxed) {
            let _ = registry.deregister(&mut SourceFd(&self.caller.as_raw_fd()));
        }
    }
}

impl Replica {
    /// From now on the loop makes its calls through `caller`; again after the cluster has changed.
    pub(crate) fn adopt(&self, caller: Arc<Caller>, desk: Arc<Desk>) -> PyResult<()> {
        let fd = caller.as_raw_fd();
        self.registry.register(&mut SourceFd(&fd), CALLS, Interest::READABLE)?;
        let calls = Arc::new(Calls { caller, desk, outbox: Mutex::default(), watched: AtomicBool::new(true) });
        if let Some(old) = lock(&self.calls).replace(calls) {
            let fd = old.caller.as_raw_fd();
            // Its descriptor may be closed by now, and has then left the poller by itself.
            let _ = self.registry.deregister(&mut SourceFd(&fd));
        }
        Ok(())
    }

    fn calls(&self) -> Option<Arc<Calls>> {
        lock(&self.calls).clone()
    }

    /// Where the loop's tasks wait for calls of `caller`, if it is the one that was adopted.
    pub(crate) fn desk_of(&self, caller: &Arc<Caller>) -> Option<Arc<Desk>> {
        let calls = self.calls().filter(|calls| Arc::ptr_eq(&calls.caller, caller))?;
        if self.forked.load(Ordering::Relaxed) {
            return None;
        }
        calls.watch(&self.registry);
        Some(calls.desk.clone())
    }

    /// Whether the loop has tasks that wait for an answer.
    pub(super) fn awaits(&self) -> bool {
        self.calls().is_some_and(|calls| !calls.desk.is_empty())
    }

    /// Reads the answers that have come and steps who waits for them.
    pub(super) fn read_calls(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        let Some(calls) = self.calls() else { return Ok(()) };
        if calls.desk.is_empty() && calls.caller.is_read() {
            calls.ignore(&self.registry);
            return Ok(());
        }
        calls.caller.pump(calls.desk.mailbox());
        calls.desk.wake(py)
    }

    /// The loop's thread has made a call that is not flushed. False: nobody would flush it.
    pub(crate) fn called(&self, py: Python<'_>) -> PyResult<bool> {
        if lock(&self.callbacks).is_none() {
            return Ok(false);
        }
        let Some(calls) = self.calls() else { return Ok(false) };
        calls.watch(&self.registry);
        let mut outbox = lock(&calls.outbox);
        outbox.unsent = true;
        let stale = outbox.flushed.is_none_or(|flushed| flushed.elapsed() >= STALE);
        drop(outbox);
        if stale && self.outgoing.load() <= 1 {
            // Alone for all we know, and its task may compute for long before it awaits; those that follow share a flush.
            // With other requests about, each flush would wake its callee for a call or two; a tick is short, and of a
            // loop that is blocked the client's tender takes the calls.
            self.flush_calls();
        } else {
            self.settle(py)?;
        }
        Ok(true)
    }

    /// Sends the calls that the loop's thread has made.
    pub(super) fn flush_calls(&self) {
        let Some(calls) = self.calls() else { return };
        let mut outbox = lock(&calls.outbox);
        if std::mem::take(&mut outbox.unsent) {
            outbox.flushed = Some(Instant::now());
            drop(outbox);
            calls.caller.flush();
        }
    }
}
