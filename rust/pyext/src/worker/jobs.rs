//! Sync handlers as a pool thread meets them: jobs handed out, and what came of them answered.
//!
//! A job is one request, or a group of requests that one call serves (`group.rs`). Results go straight into the link's
//! buffer; what only the loop can finish is posted to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::intern;
use pyo3::prelude::*;

use super::flush;
use super::group::Group;
use super::replica::{Posted, Replica};
use super::run::Running;

/// What the pool's queue holds.
pub(crate) enum Job {
    One(Running),
    Group(Py<Group>),
}

/// A sync handler to run: the callable, its argument, and what to give back with the result.
pub(crate) type Ready<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

impl Replica {
    /// The next job, after a wait if there is none; None: the thread may go home.
    pub(super) fn next_job<'py>(self: &Arc<Self>, py: Python<'py>) -> PyResult<Option<Ready<'py>>> {
        self.leave_child(py)?;
        loop {
            match self.pool.pop() {
                Some(Job::One(running)) => {
                    if self.begin(py, running.stream())? {
                        self.ring(py)?;
                        return self.job(py, &running).map(Some);
                    }
                    self.sort_ready(py);
                }
                Some(Job::Group(group)) => {
                    if let Some(job) = self.group_job(py, &group)? {
                        self.ring(py)?;
                        return Ok(Some(job));
                    }
                    self.sort_ready(py);
                }
                None if self.pool.is_stopped() => return Ok(None),
                None => {
                    self.hooks.context.bind(py).call_method1(intern!(py, "set"), (py.None(),))?;
                    self.flush(py)?;
                    self.pool.wait(py);
                }
            }
        }
    }

    /// Has a thread started if the pool wants one more.
    pub(super) fn ring(&self, py: Python<'_>) -> PyResult<()> {
        if self.pool.ring(py) {
            self.hooks.spawn.bind(py).call0()?;
        }
        Ok(())
    }

    fn job<'py>(&self, py: Python<'py>, running: &Running) -> PyResult<Ready<'py>> {
        let head = running.object(py);
        self.hooks.context.bind(py).call_method1(intern!(py, "set"), (&head,))?;
        Ok(match running {
            Running::Call(_) => (self.hooks.run_call.bind(py).clone(), head.clone(), head),
            Running::Http(_) => {
                let argument = match &self.http.request {
                    Some(request) => request.bind(py).call1((&head,))?,
                    None => head.clone(),
                };
                (self.http.handler.bind(py).clone(), argument, head)
            }
        })
    }

    /// Answers with what a job has come to; `context` is what it ran in.
    pub(super) fn job_done(
        self: &Arc<Self>,
        head: &Bound<'_, PyAny>,
        outcome: PyResult<(Bound<'_, PyAny>, Py<PyAny>)>,
    ) -> PyResult<()> {
        let py = head.py();
        self.leave_child(py)?;
        if let Ok(group) = head.cast::<Group>() {
            return self.group_done(group, outcome);
        }
        let running = head.extract::<Running>()?;
        match outcome {
            Ok((result, context)) => self.finish_sync(py, running, result, context),
            Err(error) => self.finish(py, &running, false, None, Err(error)),
        }
        Ok(())
    }

    /// Answers with a sync handler's result; what only the loop can finish goes there.
    pub(super) fn finish_sync(
        self: &Arc<Self>,
        py: Python<'_>,
        running: Running,
        result: Bound<'_, PyAny>,
        context: Py<PyAny>,
    ) {
        if running.stream().state().cancelled {
            return self.finish(py, &running, false, None, Ok(result));
        }
        let outcome = if result.get_type().is(self.hooks.coroutine.bind(py)) {
            Ok(Some(result))
        } else {
            self.answer(&running, result)
        };
        match outcome {
            Ok(None) => {
                if let Err(error) = self.release(py, running.stream()) {
                    self.give_up(py, running.stream(), error);
                }
            }
            Ok(Some(result)) => self.post([Posted::Finish { head: running, result: result.unbind(), context }]),
            Err(error) => self.finish(py, &running, false, None, Err(error)),
        }
    }

    /// A job is over and its thread may go into the next.
    pub(super) fn after_job(self: &Arc<Self>, py: Python<'_>, looking: &AtomicBool) -> PyResult<()> {
        self.sort_ready(py);
        let stale = self.outgoing.since().is_some_and(|since| since.elapsed() >= flush::STALE);
        // With slow handlers the next one would hold this answer up; and so it might if the loop does not look.
        if stale || !self.outgoing.is_fast() || !looking.load(Ordering::Relaxed) {
            self.flush(py)?;
        }
        Ok(())
    }
}
