//! From an admitted request to the user's code, and from what it did to the answer.
//!
//! Coroutines start on the loop's thread, in a task that has taken its first step when [`Replica::run_ready`] returns; sync
//! handlers go to the pool. Every outcome, `BaseException` included, becomes exactly one answer and gives the slot back.

use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use rayserve_dataplane::wire::Fault;

use super::jobs::Job;
use super::replica::{Posted, Replica, Request, Work};
use super::step::Started;
use super::stream::{Answer, Stream, Suspended};
use crate::batcher::Ticket;
use crate::client::Waiting;
use crate::http::asgi;
use crate::http::request::{CallHead, RequestHead};
use crate::lock::lock;

/// Why a request is not begun.
const LATE: &[u8] = b"the time of the request was over before it could start";

/// What serves HTTP, as the user's code was found to be when the replica started.
pub(crate) struct Http {
    pub(crate) kind: HttpKind,
    pub(crate) handler: Py<PyAny>,
    /// Makes the handler's argument of the head; without, it is called with none.
    pub(crate) request: Option<Py<PyAny>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum HttpKind {
    Async,
    Sync,
    Asgi,
}

/// A request in Python's hands.
#[derive(FromPyObject)]
pub(crate) enum Running {
    #[pyo3(transparent)]
    Http(Py<RequestHead>),
    #[pyo3(transparent)]
    Call(Py<CallHead>),
}

impl Running {
    pub(super) fn clone_ref(&self, py: Python<'_>) -> Self {
        match self {
            Self::Http(head) => Self::Http(head.clone_ref(py)),
            Self::Call(head) => Self::Call(head.clone_ref(py)),
        }
    }

    pub(crate) fn stream(&self) -> &Arc<Stream> {
        match self {
            Self::Http(head) => &head.get().stream,
            Self::Call(head) => &head.get().stream,
        }
    }

    pub(crate) fn replica(&self) -> &Arc<Replica> {
        match self {
            Self::Http(head) => &head.get().replica,
            Self::Call(head) => &head.get().replica,
        }
    }

    /// The suspended task of its handler or response.
    fn task<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.stream().state().task.as_ref().map(|suspended| suspended.started.task.bind(py).clone())
    }

    /// Its task was stepped by what it has waited for, and is over or waits for something else.
    pub(crate) fn stepped(self, py: Python<'_>) -> PyResult<()> {
        let Some(task) = self.task(py) else { return Ok(()) };
        if task.call_method0(intern!(py, "done"))?.is_truthy()? {
            return self.replica().conclude(&task, &self);
        }
        self.replica().leave_child(py)?;
        self.follow(&task)
    }

    /// Has the end of its suspended task noticed: by what it waits for, if that will step it, else by the loop.
    fn follow(self, task: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = task.py();
        let awaited = task.getattr(intern!(py, "_fut_waiter"))?;
        let left = if let Ok(ticket) = awaited.cast_exact::<Ticket>() {
            ticket.get().adopt(self)
        } else if let Ok(waiting) = awaited.cast_exact::<Waiting>() {
            waiting.get().adopt(self)
        } else {
            Some(self)
        };
        left.map_or(Ok(()), |running| running.watch(py))
    }

    /// Has the loop tell of the end of its task.
    pub(crate) fn watch(self, py: Python<'_>) -> PyResult<()> {
        let Some(task) = self.task(py) else { return Ok(()) };
        task.call_method1(intern!(py, "add_done_callback"), (Watch(self),)).map(drop)
    }

    pub(crate) fn object<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        match self {
            Self::Http(head) => head.bind(py).clone().into_any(),
            Self::Call(head) => head.bind(py).clone().into_any(),
        }
    }
}

/// The callback of a task that was suspended, where nobody else tells of its end.
#[pyclass(frozen)]
struct Watch(Running);

#[pymethods]
impl Watch {
    fn __call__(&self, task: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.replica().conclude(task, &self.0)
    }
}

impl Replica {
    /// Starts what may start; on the loop's thread.
    pub(crate) fn run_ready(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        loop {
            let Some(request) = lock(&self.ready).pop_front() else { return Ok(()) };
            self.start(py, request);
            self.leave_child(py)?;
        }
    }

    /// What a pool thread may do of the same: sync handlers join the pool's queue, the rest waits for the loop.
    pub(crate) fn sort_ready(self: &Arc<Self>, py: Python<'_>) {
        let ready = std::mem::take(&mut *lock(&self.ready));
        for request in ready {
            match &request.work {
                Work::Http(_) if self.http.kind == HttpKind::Sync => self.start(py, request),
                _ => {
                    lock(&self.ready).push_back(request);
                    self.wake();
                }
            }
        }
    }

    pub(super) fn start(self: &Arc<Self>, py: Python<'_>, request: Request) {
        if self.batched {
            return self.call_batch(py, vec![request]);
        }
        let stream = request.stream.clone();
        if let Err(error) = self.try_start(py, request) {
            self.give_up(py, &stream, error);
        }
    }

    fn try_start(self: &Arc<Self>, py: Python<'_>, request: Request) -> PyResult<()> {
        let Some(running) = self.enter(py, request)? else { return Ok(()) };
        let (method, sync) = match &running {
            Running::Http(_) => (None, self.http.kind == HttpKind::Sync),
            Running::Call(head) => {
                let CallHead { view, streaming, .. } = head.get();
                match self.methods.find(py, &self.hooks, view.head().method, *streaming) {
                    Ok((method, sync)) => (Some(method), sync),
                    Err(error) => {
                        self.finish(py, &running, false, None, Err(error));
                        return Ok(());
                    }
                }
            }
        };
        if sync {
            self.pool.push(Job::One(running));
            return Ok(());
        }
        let object = running.object(py);
        self.hooks.context.bind(py).call_method1(intern!(py, "set"), (&object,))?;
        let asgi = matches!(running, Running::Http(_)) && self.http.kind == HttpKind::Asgi;
        match self.coroutine(&running, method.as_ref(), &object).and_then(|coroutine| self.stepper.start(&coroutine)) {
            Ok(started) => self.follow(py, running, asgi, started),
            Err(error) => {
                self.finish(py, &running, asgi, None, Err(error));
                Ok(())
            }
        }
    }

    /// A request in Python's hands, unless it is over before it begins.
    pub(super) fn enter(self: &Arc<Self>, py: Python<'_>, request: Request) -> PyResult<Option<Running>> {
        let Request { stream, work } = request;
        if !self.begin(py, &stream)? {
            return Ok(None);
        }
        let replica = self.clone();
        Ok(Some(match work {
            Work::Http(view) => Running::Http(Py::new(py, RequestHead { view, stream, replica })?),
            Work::Call(view, streaming) => Running::Call(Py::new(py, CallHead { view, stream, streaming, replica })?),
        }))
    }

    /// A request is about to run; `false`: its caller has lost interest or its time is over, and that is its answer.
    pub(super) fn begin(&self, py: Python<'_>, stream: &Arc<Stream>) -> PyResult<bool> {
        match stream.begin() {
            (true, _) => self.end_with(stream, Fault::Cancelled, b""),
            (false, true) => self.end_with(stream, Fault::Deadline, LATE),
            (false, false) => return Ok(true),
        }
        self.release(py, stream).map(|()| false)
    }

    fn coroutine<'py>(
        &self,
        running: &Running,
        method: Option<&Py<PyAny>>,
        object: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = object.py();
        if let (Running::Call(head), Some(method)) = (running, method) {
            return match head.get().plain_arguments(py) {
                Some((args, kwargs)) => method.bind(py).call(args, (!kwargs.is_empty()).then_some(&kwargs)),
                None => self.hooks.begin_call.bind(py).call1((object,)),
            };
        }
        let handler = self.http.handler.bind(py);
        match (&self.http.request, self.http.kind) {
            (_, HttpKind::Asgi) => handler.call1(asgi_arguments(object)?),
            (Some(request), _) => handler.call1((request.bind(py).call1((object,))?,)),
            (None, _) => handler.call0(),
        }
    }

    /// A task that may be over or may be suspended.
    fn follow(self: &Arc<Self>, py: Python<'_>, running: Running, asgi: bool, started: Started) -> PyResult<()> {
        let task = started.task.bind(py).clone();
        if task.call_method0(intern!(py, "done"))?.is_truthy()? {
            let outcome = task.call_method0(intern!(py, "result"));
            self.finish(py, &running, asgi, Some(&started), outcome);
            return Ok(());
        }
        let mut state = running.stream().state();
        state.task = Some(Suspended { started, asgi });
        let cancelled = state.cancelled;
        drop(state);
        running.follow(&task)?;
        if cancelled {
            task.call_method0(intern!(py, "cancel"))?;
        }
        Ok(())
    }

    /// Answers a request whose task is over, with what else has come since the loop went round, and frees its slot.
    fn conclude(self: &Arc<Self>, task: &Bound<'_, PyAny>, running: &Running) -> PyResult<()> {
        let py = task.py();
        self.leave_child(py)?;
        let suspended = running.stream().state().task.take_if(|suspended| suspended.started.task.is(task));
        if let Some(Suspended { started, asgi }) = suspended {
            let outcome = task.call_method0(intern!(py, "result"));
            self.finish(py, running, asgi, Some(&started), outcome);
        }
        self.run_ready(py)?;
        self.settle(py)
    }

    /// Answers with what the user's code did and gives the slot back, unless a response remains to be run.
    pub(crate) fn finish(
        self: &Arc<Self>,
        py: Python<'_>,
        running: &Running,
        asgi: bool,
        started: Option<&Started>,
        outcome: PyResult<Bound<'_, PyAny>>,
    ) {
        if let Err(error) = self.try_finish(py, running, asgi, started, outcome) {
            self.give_up(py, running.stream(), error);
        }
    }

    /// A request that Python failed outside the user's code, such as a broken log handler: nobody waits for ever.
    pub(super) fn give_up(&self, py: Python<'_>, stream: &Arc<Stream>, error: PyErr) {
        error.write_unraisable(py, None);
        if stream.state().answer != Answer::Complete {
            self.end_with(stream, Fault::Internal, b"");
        }
        if let Err(error) = self.release(py, stream) {
            error.write_unraisable(py, None);
        }
    }

    fn try_finish(
        self: &Arc<Self>,
        py: Python<'_>,
        running: &Running,
        asgi: bool,
        started: Option<&Started>,
        outcome: PyResult<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let stream = running.stream();
        let (cancelled, answer) = {
            let state = stream.state();
            (state.cancelled, state.answer)
        };
        let failed = if cancelled {
            if answer != Answer::Complete {
                self.end_with(stream, Fault::Cancelled, b"");
            }
            None
        } else if asgi {
            asgi::missing(outcome, answer)
        } else {
            match outcome.and_then(|result| self.answer(running, result)) {
                Ok(None) => None,
                Ok(Some(response)) => match self.respond(py, running, started, &response) {
                    Ok(()) => return Ok(()),
                    Err(error) => Some(error),
                },
                Err(error) => Some(error),
            }
        };
        if let Some(error) = failed {
            self.fail(py, running, error)?;
        }
        self.release(py, stream)
    }

    /// Runs a response in the context of the handler that returned it.
    fn respond(
        self: &Arc<Self>,
        py: Python<'_>,
        running: &Running,
        started: Option<&Started>,
        response: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let Some(started) = started else {
            return Err(pyo3::exceptions::PyRuntimeError::new_err("a response outlived its handler's task"));
        };
        self.respond_within(py, running, &started.context(py)?, response)
    }

    pub(crate) fn respond_within(
        self: &Arc<Self>,
        py: Python<'_>,
        running: &Running,
        context: &Bound<'_, PyAny>,
        response: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let object = running.object(py);
        let coroutine = response.call1(asgi_arguments(&object)?)?;
        let started = self.stepper.start_within(&coroutine, context)?;
        self.follow(py, running.clone_ref(py), true, started)
    }

    /// What a sync handler left to the loop.
    pub(crate) fn run_posted(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        let posted = std::mem::take(&mut *lock(&self.posted));
        for posted in posted {
            match posted {
                Posted::Resolve(future) => asgi::resolve(py, vec![future])?,
                Posted::Reclaim => self.reclaim_later(py)?,
                Posted::FinishGroup { group, result, context } => {
                    self.finish_group_coroutine(group.bind(py), result.bind(py), context.bind(py));
                }
                Posted::Finish { head, result, context } => {
                    let (result, context) = (result.bind(py), context.bind(py));
                    let outcome = if result.get_type().is(self.hooks.coroutine.bind(py)) {
                        let started = self.stepper.start_within(result, context);
                        started.and_then(|started| self.follow(py, head.clone_ref(py), false, started))
                    } else {
                        self.respond_within(py, &head, context, result)
                    };
                    if let Err(error) = outcome {
                        self.finish(py, &head, false, None, Err(error));
                    }
                }
            }
        }
        Ok(())
    }
}

fn asgi_arguments<'py>(
    head: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let py = head.py();
    let scope = head.call_method0(intern!(py, "scope"))?;
    Ok((scope, head.getattr(intern!(py, "receive"))?, head.getattr(intern!(py, "send"))?))
}
