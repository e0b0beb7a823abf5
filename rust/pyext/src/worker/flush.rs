//! When a replica's answers are sent: together at the end of a tick or of a turn of the loop, none later than [`STALE`].
//!
//! Any thread may flush. What a flush makes known, a dead socket or room for a writer, is acted upon on the loop's thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::link::Link;
use super::replica::{Replica, count};
use super::stream::{Stream, Woken};
use crate::lock::lock;

/// Unsent answers are flushed when the oldest is older than this.
pub(crate) const STALE: Duration = Duration::from_micros(200);

impl Replica {
    /// The response head of this stream goes out with the next flush, if no body byte takes it along before.
    pub(crate) fn headed(&self, stream: &Arc<Stream>) {
        lock(&self.headed).push(stream.clone());
    }

    /// How often the loop's thread has flushed; a task that sees it change has let the loop go round.
    pub(crate) fn turn(&self) -> u64 {
        self.turn.load(Ordering::Relaxed)
    }

    /// Called on the loop's thread after something was put: flushes what is stale, and sees to it that the rest is flushed.
    pub(crate) fn settle(&self, py: Python<'_>) -> PyResult<()> {
        self.settle_at(py, Instant::now())
    }

    /// The same by the caller's clock.
    pub(crate) fn settle_at(&self, py: Python<'_>, now: Instant) -> PyResult<()> {
        if self.outgoing.since().is_some_and(|since| now.saturating_duration_since(since) >= STALE) {
            self.flush_answers(py)?;
        }
        if self.ticking.load(Ordering::Relaxed) || self.scheduled.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(flush) = self.callback(py, |callbacks| &callbacks.flush) {
            self.hooks.call_soon.bind(py).call1((flush,))?;
        }
        Ok(())
    }

    /// The loop has gone round: what was put since is sent.
    pub(crate) fn flush_turn(&self, py: Python<'_>) -> PyResult<()> {
        self.scheduled.store(false, Ordering::Relaxed);
        self.nudged.store(false, Ordering::Relaxed);
        self.turn.fetch_add(1, Ordering::Relaxed);
        let headed = std::mem::take(&mut *lock(&self.headed));
        for stream in headed {
            if stream.wants_head() {
                stream.link.enqueue(&stream);
            }
        }
        self.flush(py)
    }

    /// Sends what all links have to send, calls included.
    pub(crate) fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.flush_calls();
        self.flush_answers(py)
    }

    pub(super) fn flush_answers(&self, py: Python<'_>) -> PyResult<()> {
        let mut outcome = Ok(());
        for link in self.outgoing.take_dirty() {
            // An error of one link must not leave the others marked as being flushed.
            outcome = outcome.and(self.flush_link(py, &link));
        }
        outcome
    }

    pub(crate) fn flush_link(&self, py: Python<'_>, link: &Arc<Link>) -> PyResult<()> {
        count(&self.counters.flushes);
        let mut woken = Woken::new();
        let flushed = link.flush(&self.registry, &mut woken);
        self.resolve(py, woken)?;
        // A dead socket is left to the poller, which hears of it too: what its peer has sent is still to be read.
        if flushed.is_err() { Ok(()) } else { self.tell_if_idle(py) }
    }

    /// Has the loop flush, from another thread.
    pub(crate) fn nudge(&self) {
        if !self.nudged.swap(true, Ordering::Relaxed) {
            self.wake();
        }
    }
}
