//! `Batcher`: what waits for a function decorated with `@serve.batch`, on one event loop, and when it goes.
//!
//! When a batch is released is decided by `engine/batch.rs`, as in the router. It is asked in a callback of the loop
//! ([`Batcher::turn`]), never where an item is put or a batch ends: what else the same turn of the loop brings joins the
//! batch, and the answers of the batch before are sent first, as the next may block the loop for its whole length.
//! What a batch runs is Python's (`batch_queue.py`); here are only its items, and their callers, who are stepped where the
//! results come in (`ticket.rs`). No lock is held while Python is called or an object let go.

mod queue;
mod ticket;
mod weigh;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple, PyType};
use rayserve_dataplane::engine::batch::{Verdict, Window};

use self::queue::{Queue, Taken};
pub(crate) use self::ticket::Ticket;
use crate::awaited::is_in_task;
use crate::http::request::{CallHead, RequestHead};
use crate::lock::lock;
use crate::worker::flush::STALE;
use crate::worker::step::Stepper;

/// The loop's timers may fire this much early, and are no finer.
const TIMER: Duration = Duration::from_millis(1);

#[pyclass(frozen, module = "rayserve_fast._core")]
pub(crate) struct Batcher {
    event_loop: Py<PyAny>,
    /// Looks at the arguments of a call: refuses them, or tells how many of them are the object of a method.
    check: Py<PyAny>,
    /// What it has told of the last call: type of the first argument, number of arguments, how many are the object.
    shape: Mutex<Option<(Py<PyType>, usize, usize)>>,
    /// Runs a batch; it ends with `release`.
    run: Py<PyAny>,
    /// The user's measure of a list of items.
    weigh: Option<Py<PyAny>>,
    stepper: Stepper,
    queue: Mutex<Queue>,
    /// Those whose callers are to be stepped.
    woken: Mutex<VecDeque<Py<Ticket>>>,
    /// The loop is going to call `wake`.
    waking: AtomicBool,
    /// What a caller has raised out of its task: `SystemExit` or `KeyboardInterrupt`.
    raised: Mutex<Option<PyErr>>,
}

#[pymethods]
impl Batcher {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "made in one place")]
    fn new(
        event_loop: &Bound<'_, PyAny>,
        check: Py<PyAny>,
        run: Py<PyAny>,
        weigh: Option<Py<PyAny>>,
        max_size: usize,
        wait_s: f64,
        concurrent: usize,
        name: &str,
    ) -> PyResult<Self> {
        Ok(Self {
            event_loop: event_loop.clone().unbind(),
            check,
            shape: Mutex::default(),
            run,
            weigh,
            stepper: Stepper::new(event_loop.py(), event_loop, name)?,
            queue: Mutex::new(Queue::new(window(max_size, wait_s), concurrent)),
            woken: Mutex::default(),
            waking: AtomicBool::new(false),
            raised: Mutex::default(),
        })
    }

    /// Queues one call of the function, or raises what `check` raises.
    fn put<'py>(
        slf: &Bound<'py, Self>,
        args: Bound<'py, PyTuple>,
        kwargs: Bound<'py, PyDict>,
        context: Py<PyAny>,
    ) -> PyResult<Bound<'py, Ticket>> {
        let (py, this) = (slf.py(), slf.get());
        let skip = this.checked(&args, &kwargs)?;
        let kwargs = (!kwargs.is_empty()).then(|| kwargs.unbind());
        let ticket = Ticket::new(slf.clone().unbind(), args.unbind(), kwargs, context, skip);
        let ticket = Bound::new(py, ticket)?;
        let ask = lock(&this.queue).push(ticket.clone().unbind(), this.weigh.is_some());
        if ask {
            this.soon(slf, intern!(py, "turn"))?;
        }
        Ok(ticket)
    }

    /// Begins what may begin; called by the loop.
    fn turn(slf: &Bound<'_, Self>) -> PyResult<()> {
        let this = slf.get();
        let waking = !lock(&this.woken).is_empty();
        if lock(&this.queue).postpone(waking) {
            return this.soon(slf, intern!(slf.py(), "turn"));
        }
        this.decide(slf, Duration::ZERO)
    }

    /// The same, by the timer.
    fn due(slf: &Bound<'_, Self>) -> PyResult<()> {
        let this = slf.get();
        let timer = lock(&this.queue).timer.take();
        drop(timer);
        if lock(&this.queue).asked() { Ok(()) } else { this.decide(slf, TIMER) }
    }

    /// A batch has ended: its slot is free, for the turn after the one that sends its answers.
    fn release(slf: &Bound<'_, Self>) -> PyResult<()> {
        let this = slf.get();
        if lock(&this.queue).release() { this.soon(slf, intern!(slf.py(), "turn")) } else { Ok(()) }
    }

    /// Of the next batches; on any thread. Have the loop call `turn` then.
    fn resize(&self, max_size: usize, wait_s: f64) {
        lock(&self.queue).resize(window(max_size, wait_s));
    }

    /// Items that wait, and batches that run.
    fn load(&self) -> (usize, usize) {
        lock(&self.queue).load()
    }

    /// A task that has made its first step.
    fn start(&self, coroutine: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        Ok(self.stepper.start(coroutine)?.task)
    }

    /// Gives each caller its result, in order.
    fn finish(slf: &Bound<'_, Self>, tickets: &Bound<'_, PyList>, results: &Bound<'_, PyList>) -> PyResult<()> {
        let this = slf.get();
        for (ticket, result) in tickets.iter().zip(results) {
            let ticket = ticket.cast::<Ticket>()?;
            this.resolved(ticket, ticket.get().give(result.unbind()));
        }
        this.step(slf)
    }

    /// Raises the error at each caller, after what has been given.
    fn fail(slf: &Bound<'_, Self>, tickets: &Bound<'_, PyList>, error: &Bound<'_, PyAny>) -> PyResult<()> {
        let this = slf.get();
        let traceback = error.getattr(intern!(slf.py(), "__traceback__"))?;
        for ticket in tickets {
            let ticket = ticket.cast::<Ticket>()?;
            let end = (error.clone().unbind(), traceback.clone().unbind());
            this.resolved(ticket, ticket.get().end(Some(end)));
        }
        this.step(slf)
    }

    /// The next item of a stream for each caller; `ended` is for one that gets none, neither now nor later.
    fn give(
        slf: &Bound<'_, Self>,
        tickets: &Bound<'_, PyList>,
        items: &Bound<'_, PyList>,
        ended: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let this = slf.get();
        for (ticket, item) in tickets.iter().zip(items) {
            let ticket = ticket.cast::<Ticket>()?;
            let waits = if item.is(ended) { ticket.get().end(None) } else { ticket.get().give(item.unbind()) };
            this.resolved(ticket, waits);
        }
        this.step(slf)
    }

    /// Steps the callers that have something to take; called by the loop, out of which it raises what they raise.
    fn wake(slf: &Bound<'_, Self>) -> PyResult<()> {
        let this = slf.get();
        this.waking.store(false, Ordering::Relaxed);
        let soon = is_in_task(slf.py())?;
        this.step_all(slf, soon)?;
        let raised = lock(&this.raised).take();
        raised.map_or(Ok(()), Err)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        visit.call(&self.check)?;
        visit.call(&self.run)?;
        visit.call(&self.weigh)
    }
}

impl Batcher {
    /// How many of `args` are the object of a method. A call without keywords that looks like the last one is as good.
    fn checked(&self, args: &Bound<'_, PyTuple>, kwargs: &Bound<'_, PyDict>) -> PyResult<usize> {
        let first = args.get_borrowed_item(0).ok().filter(|_| kwargs.is_empty());
        if let (Some(first), Some((kind, count, skip))) = (&first, &*lock(&self.shape))
            && first.get_type().is(kind)
            && args.len() == *count
        {
            return Ok(*skip);
        }
        let skip = self.check.bind(args.py()).call1((args, kwargs))?.extract()?;
        // What a class is told depends on the class, not on its type.
        if let Some(first) = first.filter(|first| !first.is_instance_of::<PyType>()) {
            let shape = Some((first.get_type().unbind(), args.len(), skip));
            let before = std::mem::replace(&mut *lock(&self.shape), shape);
            drop(before);
        }
        Ok(skip)
    }

    fn decide(&self, slf: &Bound<'_, Self>, timer: Duration) -> PyResult<()> {
        loop {
            if let Some(weigh) = &self.weigh {
                self.weigh(slf, weigh.bind(slf.py()))?;
            }
            let now = Instant::now();
            let mut gone = Vec::new();
            let (verdict, taken) = lock(&self.queue).decide(now, self.weigh.is_some(), &mut gone);
            drop(gone);
            if let Some(taken) = taken {
                self.begin(slf, taken)?;
                if lock(&self.queue).asked() {
                    return Ok(()); // it has ended already
                }
            } else if let Verdict::Until(due) = verdict {
                return self.arm(slf, due, due.saturating_duration_since(now).max(timer));
            } else {
                return Ok(());
            }
        }
    }

    /// Hands a batch to Python. One that cannot even begin fails as if its function had raised.
    fn begin(&self, slf: &Bound<'_, Self>, taken: Taken) -> PyResult<()> {
        let py = slf.py();
        let (size, waited) = (taken.size, taken.waited.as_secs_f64());
        let tickets = PyList::new(py, taken.tickets)?;
        let begun = contents(&tickets).and_then(|(items, contexts, mixed)| {
            self.run.bind(py).call1((&tickets, items, contexts, mixed, size, waited)).map(drop)
        });
        begun.or_else(|error| Self::fail(slf, &tickets, error.value(py)).and(Self::release(slf)))
    }

    fn arm(&self, slf: &Bound<'_, Self>, due: Instant, delay: Duration) -> PyResult<()> {
        let py = slf.py();
        let old = {
            let mut queue = lock(&self.queue);
            match &queue.timer {
                // An earlier one looks again.
                Some((at, _)) if *at <= due => return Ok(()),
                _ => queue.timer.take(),
            }
        };
        if let Some((_, handle)) = old {
            handle.call_method0(py, intern!(py, "cancel"))?;
        }
        let callback = slf.getattr(intern!(py, "due"))?;
        let handle = self.event_loop.call_method1(py, intern!(py, "call_later"), (delay.as_secs_f64(), callback))?;
        lock(&self.queue).timer = Some((due, handle));
        Ok(())
    }

    fn soon(&self, slf: &Bound<'_, Self>, method: &Bound<'_, PyString>) -> PyResult<()> {
        let py = slf.py();
        self.event_loop.call_method1(py, intern!(py, "call_soon"), (slf.getattr(method)?,)).map(drop)
    }

    fn resolved(&self, ticket: &Bound<'_, Ticket>, waits: bool) {
        if waits {
            lock(&self.woken).push_back(ticket.clone().unbind());
        }
    }

    /// Steps the callers now, or soon if a task runs: none can be entered then.
    fn step(&self, slf: &Bound<'_, Self>) -> PyResult<()> {
        if lock(&self.woken).is_empty() {
            return Ok(());
        }
        if is_in_task(slf.py())? { self.wake_soon(slf) } else { self.step_all(slf, false) }
    }

    /// Goes on in another turn when the first answers are due. `soon`: leaves each step to the loop.
    fn step_all(&self, slf: &Bound<'_, Self>, soon: bool) -> PyResult<()> {
        let py = slf.py();
        let began = Instant::now();
        loop {
            let ticket = lock(&self.woken).pop_front();
            let Some(ticket) = ticket else { return Ok(()) };
            let ticket = ticket.bind(py);
            if let Err(error) = ticket.get().wake(ticket, self.event_loop.bind(py), soon) {
                // It is no fault of the batch that is being handed out, nor of the other callers.
                let before = lock(&self.raised).replace(error);
                drop(before);
                self.wake_soon(slf)?;
            }
            if began.elapsed() >= STALE && !lock(&self.woken).is_empty() {
                return self.wake_soon(slf);
            }
        }
    }

    fn wake_soon(&self, slf: &Bound<'_, Self>) -> PyResult<()> {
        if self.waking.swap(true, Ordering::Relaxed) { Ok(()) } else { self.soon(slf, intern!(slf.py(), "wake")) }
    }

    /// A queued call whose caller has left.
    fn left(&self) {
        let gone = lock(&self.queue).left();
        drop(gone);
    }
}

/// What the batch is called with: the items, if each call has but one positional argument; the contexts of the requests;
/// whether these are for different models.
type Contents<'py> = (Option<Bound<'py, PyList>>, Bound<'py, PyList>, bool);

fn contents<'py>(tickets: &Bound<'py, PyList>) -> PyResult<Contents<'py>> {
    let py = tickets.py();
    let (items, contexts) = (PyList::empty(py), PyList::empty(py));
    let (mut mixed, mut single) = (false, true);
    let first = tickets.get_item(0)?.cast_into::<Ticket>()?;
    let model = model_of(first.get().context.bind(py))?;
    for ticket in tickets {
        let ticket = ticket.cast::<Ticket>()?.get();
        let context = ticket.context.bind(py);
        mixed = mixed || model_of(context)? != model;
        contexts.append(context)?;
        match ticket.only(py) {
            Some(item) if single => items.append(item)?,
            _ => single = false,
        }
    }
    Ok((single.then_some(items), contexts, mixed))
}

fn model_of<'a>(context: &'a Bound<'_, PyAny>) -> PyResult<Cow<'a, [u8]>> {
    if let Ok(head) = context.cast::<RequestHead>() {
        return Ok(Cow::Borrowed(head.get().model()));
    }
    if let Ok(head) = context.cast::<CallHead>() {
        return Ok(Cow::Borrowed(head.get().model().as_bytes()));
    }
    if context.is_none() {
        return Ok(Cow::Borrowed(b""));
    }
    let model: String = context.getattr(intern!(context.py(), "multiplexed_model_id"))?.extract()?;
    Ok(Cow::Owned(model.into_bytes()))
}

fn window(max_size: usize, wait_s: f64) -> Window {
    Window { max_size: max_size.max(1), wait: Duration::try_from_secs_f64(wait_s).unwrap_or(Duration::MAX) }
}

/// A size among those of the user's measure.
fn size_of(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
