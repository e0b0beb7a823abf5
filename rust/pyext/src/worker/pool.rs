//! The queue from which the threads of `replica/sync_pool.py` pull sync handlers.
//!
//! A handler may block, so a busy thread must never keep others waiting, yet waking a thread costs more than a quick
//! handler: one thread is woken when the queue turns from empty to not empty, another when the oldest job has waited for
//! [`STALE`], which the loop and the threads notice alike. No lock is held while a thread waits or Python runs.
//! The user's code is called from Python, not from here: a thread that dies with the interpreter in the middle of a
//! handler must have no Rust frame below it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use pyo3::prelude::*;

use super::flush::STALE;
use super::jobs::Job;
use super::run::Running;
use super::stream::Stream;
use crate::lock::lock;

#[derive(Default)]
pub(crate) struct Pool {
    queue: Mutex<Queue>,
    /// Wakes that were given and not yet taken; apart from the queue, as threads hold this lock without the GIL.
    wakes: Mutex<usize>,
    bell: Condvar,
}

type Jobs = VecDeque<(Instant, Job)>;

#[derive(Default)]
struct Queue {
    jobs: Jobs,
    /// The queue was empty when the oldest job came, and nobody was woken for it yet.
    fresh: bool,
    woken: Option<Instant>,
    waiting: usize,
    threads: usize,
    most: usize,
    stopped: bool,
}

impl Pool {
    /// At most `most` threads; those that are there stay.
    pub(crate) fn resize(&self, most: usize) {
        lock(&self.queue).most = most;
    }

    pub(crate) fn push(&self, job: Job) {
        let mut queue = lock(&self.queue);
        queue.fresh |= queue.jobs.is_empty();
        queue.jobs.push_back((Instant::now(), job));
    }

    pub(crate) fn pop(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        queue.jobs.pop_front().map(|(_, job)| job)
    }

    /// The job of this stream, if no thread has begun it.
    pub(crate) fn remove(&self, stream: &Arc<Stream>) -> Option<Running> {
        let jobs = &mut lock(&self.queue).jobs;
        let at = place(jobs, stream)?;
        match jobs.remove(at) {
            Some((_, Job::One(running))) => Some(running),
            _ => None,
        }
    }

    /// Whether that job is there.
    pub(super) fn holds(&self, stream: &Arc<Stream>) -> bool {
        place(&lock(&self.queue).jobs, stream).is_some()
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.queue).jobs.is_empty()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        lock(&self.queue).stopped
    }

    /// Wakes a thread if it is time to; `true`: there is none to wake, and one has to be started.
    #[must_use]
    pub(crate) fn ring(&self, py: Python<'_>) -> bool {
        let mut queue = lock(&self.queue);
        let Some((oldest, _)) = queue.jobs.front() else { return false };
        let since = queue.woken.map_or(*oldest, |woken| woken.max(*oldest));
        if !queue.fresh && since.elapsed() < STALE {
            return false;
        }
        queue.fresh = false;
        queue.woken = Some(Instant::now());
        if queue.waiting > 0 {
            queue.waiting -= 1;
            drop(queue);
            // Often the thread is up at once, in place of this one: it must find the GIL free.
            py.detach(|| {
                *lock(&self.wakes) += 1;
                self.bell.notify_one();
            });
            return false;
        }
        let start = queue.threads < queue.most && !queue.stopped;
        queue.threads += usize::from(start);
        start
    }

    /// Waits for a wake, without the GIL.
    pub(crate) fn wait(&self, py: Python<'_>) {
        {
            let mut queue = lock(&self.queue);
            if queue.stopped {
                return;
            }
            queue.waiting += 1;
        }
        py.detach(|| {
            let mut wakes = lock(&self.wakes);
            while *wakes == 0 {
                wakes = self.bell.wait(wakes).unwrap_or_else(PoisonError::into_inner);
            }
            *wakes -= 1;
        });
    }

    /// Sends every thread home.
    pub(crate) fn stop(&self) {
        let mut queue = lock(&self.queue);
        queue.stopped = true;
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        *lock(&self.wakes) += waiting;
        self.bell.notify_all();
    }
}

fn place(jobs: &Jobs, stream: &Arc<Stream>) -> Option<usize> {
    jobs.iter().position(|(_, job)| matches!(job, Job::One(running) if Arc::ptr_eq(running.stream(), stream)))
}
