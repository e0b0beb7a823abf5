//! Runs a coroutine's first step at once, inside a genuine `asyncio.Task`.
//!
//! `current_task()`, `timeout()`, task groups, anyio and cancellation compare the task's identity across suspensions, so
//! nothing but the real class will do. Python 3.12 has eager tasks. Before, a task's constructor hands its first step to
//! `loop.call_soon`; while it runs, an attribute of the loop's instance keeps that one step, forwards everything else, and
//! the step is run at once in the task's own context. Where a task is current already (somebody runs the loop from within
//! a task), a step cannot be entered, and the loop takes it as usual.

use std::sync::Mutex;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

use crate::lock::lock;

pub(crate) struct Stepper {
    task: Py<PyAny>,
    /// The constructor's keywords: the same dict every time.
    keywords: Py<PyDict>,
    capture: Option<Capture>,
}

struct Capture {
    event_loop: Py<PyAny>,
    /// Which task each loop runs.
    current: Py<PyDict>,
    keeper: Py<Keeper>,
}

/// A task and, where Python does not tell, its context.
pub(crate) struct Started {
    pub(crate) task: Py<PyAny>,
    context: Option<Py<PyAny>>,
}

/// Stands in for `loop.call_soon` while a task is constructed.
#[pyclass(frozen)]
struct Keeper {
    call_soon: Py<PyAny>,
    kept: Mutex<Option<(Py<PyAny>, Py<PyAny>)>>,
}

#[pymethods]
impl Keeper {
    #[pyo3(signature = (callback, *args, context=None))]
    fn __call__<'py>(
        &self,
        callback: Bound<'py, PyAny>,
        args: &Bound<'py, PyTuple>,
        context: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = callback.py();
        if let Some(context) = &context
            && args.is_empty()
            && is_step(&callback)?
        {
            let mut kept = lock(&self.kept);
            if kept.is_none() {
                *kept = Some((callback.unbind(), context.clone().unbind()));
                return Ok(py.None().into_bound(py));
            }
        }
        let keywords = PyDict::new(py);
        keywords.set_item(intern!(py, "context"), context)?;
        let mut all = vec![callback];
        all.extend(args.iter());
        self.call_soon.bind(py).call(PyTuple::new(py, all)?, Some(&keywords))
    }
}

/// Whether the callback is a step of a task of C's, whose type has no name in Python.
fn is_step(callback: &Bound<'_, PyAny>) -> PyResult<bool> {
    static STEP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let (py, kind) = (callback.py(), callback.get_type());
    match STEP.get(py) {
        Some(step) => Ok(kind.is(step)),
        None if kind.name()? == "TaskStepMethWrapper" => {
            let _ = STEP.set(py, kind.unbind());
            Ok(true)
        }
        None => Ok(false),
    }
}

impl Stepper {
    pub(crate) fn new(py: Python<'_>, event_loop: &Bound<'_, PyAny>, name: &str) -> PyResult<Self> {
        let asyncio = py.import("asyncio")?;
        let keywords = PyDict::new(py);
        keywords.set_item("loop", event_loop)?;
        keywords.set_item("name", name)?; // otherwise each task formats a name of its own
        let capture = if py.version_info() >= (3, 12) {
            keywords.set_item("eager_start", true)?;
            None
        } else {
            let keeper = Keeper { call_soon: event_loop.getattr("call_soon")?.unbind(), kept: Mutex::default() };
            Some(Capture {
                event_loop: event_loop.clone().unbind(),
                current: asyncio.getattr("tasks")?.getattr("_current_tasks")?.cast_into::<PyDict>()?.unbind(),
                keeper: Py::new(py, keeper)?,
            })
        };
        Ok(Self { task: asyncio.getattr("Task")?.unbind(), keywords: keywords.unbind(), capture })
    }

    /// The task after its first step. `SystemExit` and `KeyboardInterrupt` of an eager step come as an error.
    pub(crate) fn start(&self, coroutine: &Bound<'_, PyAny>) -> PyResult<Started> {
        let py = coroutine.py();
        let Some(capture) = &self.capture else { return self.plain(coroutine) };
        let event_loop = capture.event_loop.bind(py);
        if capture.current.bind(py).contains(event_loop)? {
            return self.plain(coroutine);
        }
        let name = intern!(py, "call_soon");
        let keeper = capture.keeper.bind(py);
        event_loop.setattr(name, keeper)?;
        let started = self.plain(coroutine);
        event_loop.delattr(name)?;
        let Some((step, context)) = lock(&keeper.get().kept).take() else { return started };
        let (step, context) = (step.into_bound(py), context.into_bound(py));
        match started {
            Ok(Started { task, .. }) if step.getattr(intern!(py, "__self__"))?.is(&task) => {
                // What the step raises is the task's outcome already.
                let _ = context.call_method1(intern!(py, "run"), (step,));
                Ok(Started { task, context: Some(context.unbind()) })
            }
            // The step of another task, which somebody made meanwhile.
            started => {
                event_loop.call_method1(name, (step,))?;
                started
            }
        }
    }

    /// A task in a copy of `context`; before Python 3.12 its first step is left to the loop.
    pub(crate) fn start_within(&self, coroutine: &Bound<'_, PyAny>, context: &Bound<'_, PyAny>) -> PyResult<Started> {
        let py = coroutine.py();
        let task =
            context.call_method(intern!(py, "run"), (self.task.bind(py), coroutine), Some(self.keywords.bind(py)))?;
        Ok(Started { task: task.unbind(), context: Some(context.clone().unbind()) })
    }

    fn plain(&self, coroutine: &Bound<'_, PyAny>) -> PyResult<Started> {
        let py = coroutine.py();
        let task = self.task.bind(py).call((coroutine,), Some(self.keywords.bind(py)))?;
        Ok(Started { task: task.unbind(), context: None })
    }
}

impl Started {
    /// The context that the task runs in.
    pub(crate) fn context<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match &self.context {
            Some(context) => Ok(context.bind(py).clone()),
            None if py.version_info() >= (3, 12) => self.task.bind(py).call_method0(intern!(py, "get_context")),
            None => py.import("contextvars")?.call_method0("copy_context"),
        }
    }
}
