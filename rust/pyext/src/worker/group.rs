//! A group of requests that one call of the user's code serves, from the call with lists to an answer for each.
//!
//! A coroutine runs as one task, a sync function in the pool. What it returns is judged once: as many results as there are
//! requests, or an error for all; a result that is an exception fails its own request. A call that is under way is not
//! cancelled when one of its requests is: the others still want it.

use std::sync::Arc;

use pyo3::exceptions::PyBaseException;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use rayserve_dataplane::wire::Fault;

use super::jobs::{Job, Ready};
use super::replica::{Posted, Replica, count};
use super::run::{HttpKind, Running};
use super::step::Started;
use crate::http::response;
use crate::lock::lock;

/// Requests that one call of the user's code serves.
#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Group {
    replica: Arc<Replica>,
    items: Vec<Running>,
    /// Of all of them; empty: none.
    model: Py<PyAny>,
    /// What a pool thread calls.
    job: Option<Call>,
}

/// The callback of a group's task that was suspended.
#[pyclass(frozen)]
struct Watch {
    group: Py<Group>,
    /// Of the task in the replica's table.
    task: usize,
}

#[pymethods]
impl Watch {
    fn __call__(&self, task: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = task.py();
        let replica = &self.group.get().replica;
        replica.leave_child(py)?;
        let started = lock(&replica.tasks).try_remove(self.task);
        let outcome = task.call_method0(intern!(py, "result"));
        replica.finish_group(py, self.group.get(), started.as_ref(), outcome);
        replica.run_ready(py)?;
        replica.settle(py)
    }
}

impl Replica {
    /// What the handler of HTTP is called with.
    pub(super) fn http_call(&self, py: Python<'_>, items: &[Running]) -> PyResult<Call> {
        let http = &self.http;
        let argument = match &http.request {
            Some(request) => {
                let made = items.iter().map(|item| request.bind(py).call1((item.object(py),)));
                Some(PyList::new(py, made.collect::<PyResult<Vec<_>>>()?)?.into_any().unbind())
            }
            None => None,
        };
        Ok(Call { function: http.handler.clone_ref(py), argument, sync: http.kind == HttpKind::Sync })
    }

    /// Has Python put handle calls together, as only it sees their arguments.
    pub(super) fn start_calls(self: &Arc<Self>, py: Python<'_>, calls: &[Running]) {
        let grouped = PyList::new(py, calls.iter().map(|call| call.object(py)))
            .and_then(|heads| self.hooks.group.bind(py).call1((heads,)))
            .and_then(|grouped| grouped.extract::<Grouped<'_>>());
        let (groups, failures) = match grouped {
            Ok(grouped) => grouped,
            Err(error) => {
                for call in calls {
                    self.finish(py, call, false, None, Err(error.clone_ref(py)));
                }
                return;
            }
        };
        for (call, error) in failures {
            self.finish(py, &call, false, None, Err(PyErr::from_value(error)));
        }
        for (items, sync, call, model) in groups {
            let (function, argument) =
                if sync { (self.hooks.run_group.clone_ref(py), Some(call.unbind())) } else { (call.unbind(), None) };
            self.start_group(py, items, model, Ok(Call { function, argument, sync }));
        }
    }

    pub(super) fn start_group(
        self: &Arc<Self>,
        py: Python<'_>,
        items: Vec<Running>,
        model: Bound<'_, PyAny>,
        call: PyResult<Call>,
    ) {
        let call = match call {
            Ok(call) => call,
            Err(error) => return self.fail_group(py, &items, error),
        };
        let (job, task) = if call.sync { (Some(call), None) } else { (None, Some(call)) };
        let group = match Bound::new(py, Group { replica: self.clone(), items, model: model.unbind(), job }) {
            Ok(group) => group,
            Err(error) => return error.write_unraisable(py, None), // no memory for an object: the links end with the process
        };
        let Some(call) = task else { return self.pool.push(Job::Group(group.unbind())) };
        match self.start_task(py, group.get(), &call) {
            Ok(started) => self.follow_group(&group, started),
            Err(error) => self.fail_group(py, &group.get().items, error),
        }
    }

    fn start_task(&self, py: Python<'_>, group: &Group, call: &Call) -> PyResult<Started> {
        self.enter_batch(py, group.items.len(), group.model.bind(py))?;
        let function = call.function.bind(py);
        let coroutine = match &call.argument {
            Some(argument) => function.call1((argument,)),
            None => function.call0(),
        };
        let started = coroutine.and_then(|coroutine| self.stepper.start(&coroutine));
        self.enter_batch(py, 0, intern!(py, ""))?;
        started
    }

    /// Makes what runs next see the size of its batch and, if all its requests name the same, their model; 0: none.
    fn enter_batch(&self, py: Python<'_>, size: usize, model: &Bound<'_, PyAny>) -> PyResult<()> {
        self.hooks.enter_batch.bind(py).call1((size, model)).map(drop)
    }

    /// A task that may be over or may be suspended.
    fn follow_group(self: &Arc<Self>, group: &Bound<'_, Group>, started: Started) {
        let py = group.py();
        let task = started.task.bind(py).clone();
        let done = task.call_method0(intern!(py, "done")).and_then(|done| done.is_truthy());
        if !matches!(done, Ok(false)) {
            let outcome = done.and_then(|_| task.call_method0(intern!(py, "result")));
            return self.finish_group(py, group.get(), Some(&started), outcome);
        }
        // The only strong reference to the task while it is suspended: the loop keeps a weak one.
        let watch = Watch { group: group.clone().unbind(), task: lock(&self.tasks).insert(started) };
        if let Err(error) = task.call_method1(intern!(py, "add_done_callback"), (watch,)) {
            error.write_unraisable(py, None);
        }
    }

    /// A pool thread's job; None: nobody wants it any more.
    pub(super) fn group_job<'py>(self: &Arc<Self>, py: Python<'py>, group: &Py<Group>) -> PyResult<Option<Ready<'py>>> {
        let it = group.get();
        if it.items.iter().all(|item| item.stream().state().cancelled) {
            for item in &it.items {
                self.finish(py, item, false, None, Ok(py.None().into_bound(py)));
            }
            return Ok(None);
        }
        let Some(Call { function, argument, .. }) = &it.job else { return Ok(None) };
        let argument = argument.as_ref().map_or_else(|| py.None(), |argument| argument.clone_ref(py));
        self.enter_batch(py, it.items.len(), it.model.bind(py))?;
        Ok(Some((function.bind(py).clone(), argument.into_bound(py), group.bind(py).clone().into_any())))
    }

    /// Answers with what a pool thread's job has come to.
    pub(super) fn group_done(
        self: &Arc<Self>,
        group: &Bound<'_, Group>,
        outcome: PyResult<(Bound<'_, PyAny>, Py<PyAny>)>,
    ) -> PyResult<()> {
        let (py, it) = (group.py(), group.get());
        self.enter_batch(py, 0, intern!(py, ""))?;
        match outcome {
            Ok((result, context)) if result.get_type().is(self.hooks.coroutine.bind(py)) => {
                self.post([Posted::FinishGroup { group: group.clone().unbind(), result: result.unbind(), context }]);
            }
            Ok((result, context)) => match self.results(it, result) {
                Ok(values) => {
                    for (item, value) in it.items.iter().zip(values) {
                        match failure(value) {
                            Ok(value) => self.finish_sync(py, item.clone_ref(py), value, context.clone_ref(py)),
                            Err(error) => self.finish(py, item, false, None, Err(error)),
                        }
                    }
                }
                Err(error) => self.fail_group(py, &it.items, error),
            },
            Err(error) => self.fail_group(py, &it.items, error),
        }
        Ok(())
    }

    /// The loop's part of a sync function that has returned a coroutine.
    pub(super) fn finish_group_coroutine(
        self: &Arc<Self>,
        group: &Bound<'_, Group>,
        coroutine: &Bound<'_, PyAny>,
        context: &Bound<'_, PyAny>,
    ) {
        match self.stepper.start_within(coroutine, context) {
            Ok(started) => self.follow_group(group, started),
            Err(error) => self.fail_group(group.py(), &group.get().items, error),
        }
    }

    fn finish_group(
        self: &Arc<Self>,
        py: Python<'_>,
        group: &Group,
        started: Option<&Started>,
        outcome: PyResult<Bound<'_, PyAny>>,
    ) {
        match outcome.and_then(|result| self.results(group, result)) {
            Ok(values) => {
                for (item, value) in group.items.iter().zip(values) {
                    self.finish(py, item, false, started, failure(value));
                }
            }
            Err(error) => self.fail_group(py, &group.items, error),
        }
    }

    /// As many results as there are requests; taken out of the user's list, which may change while they are sent.
    fn results<'py>(&self, group: &Group, result: Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let values = match result.cast_into_exact::<PyList>() {
            Ok(values) if values.len() == group.items.len() => values,
            Ok(values) => self.judge(group, values.as_any())?,
            Err(other) => self.judge(group, &other.into_inner())?,
        };
        Ok(values.iter().collect())
    }

    fn judge<'py>(&self, group: &Group, result: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let judged = self.hooks.results.bind(result.py()).call1((result, group.items.len()))?;
        Ok(judged.cast_into::<PyList>()?)
    }

    /// One error for all; it is told, and encoded, once.
    fn fail_group(self: &Arc<Self>, py: Python<'_>, items: &[Running], error: PyErr) {
        let (gone, wanted): (Vec<_>, Vec<_>) =
            items.iter().partition::<Vec<_>, _>(|item| item.stream().state().cancelled);
        for item in gone {
            self.finish(py, item, false, None, Ok(py.None().into_bound(py)));
        }
        if let Err(broken) = self.answer_all(py, &wanted, error.into_value(py).into_bound(py)) {
            for item in wanted {
                self.give_up(py, item.stream(), broken.clone_ref(py));
            }
            return;
        }
        for item in wanted {
            if let Err(error) = self.release(py, item.stream()) {
                self.give_up(py, item.stream(), error);
            }
        }
    }

    fn answer_all(&self, py: Python<'_>, items: &[&Running], error: Bound<'_, PyBaseException>) -> PyResult<()> {
        let Some(first) = items.first() else { return Ok(()) };
        if let Running::Call(head) = first {
            let dumped = self.hooks.dump_error.bind(py).call1((head, error))?;
            let (fault, payload): (u32, Bound<'_, PyBytes>) = dumped.extract()?;
            for item in items {
                self.end_with(item.stream(), Fault::from_aux(fault), payload.as_bytes());
            }
            return Ok(());
        }
        let heads = PyList::new(py, items.iter().map(|item| item.object(py)))?;
        let encoded = self.hooks.failed_batch.bind(py).call1((heads, error))?;
        let encoded = encoded.cast::<PyTuple>()?;
        for item in items {
            count(&self.counters.errors);
            response::put_encoded(item.stream(), encoded)?;
        }
        Ok(())
    }
}

/// What a group calls.
pub(super) struct Call {
    function: Py<PyAny>,
    argument: Option<Py<PyAny>>,
    sync: bool,
}

/// What Python makes of handle calls: groups of calls, each with whether a pool thread runs it, what to call and the
/// model; and calls that have failed already.
type Grouped<'py> =
    (Vec<(Vec<Running>, bool, Bound<'py, PyAny>, Bound<'py, PyAny>)>, Vec<(Running, Bound<'py, PyAny>)>);

/// A result that is an exception fails its request, and no other.
fn failure(value: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyAny>> {
    if value.is_instance_of::<PyBaseException>() { Err(PyErr::from_value(value)) } else { Ok(value) }
}
