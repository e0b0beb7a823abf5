//! `batch_size_fn`: how many of the items at the front fit, by the user's measure of a list of items.
//!
//! The measure need not be a sum, so each list that could be a batch is measured, from the front, one item longer each time,
//! and each list once. An item that fits into no batch, or that cannot be measured, is refused alone.

use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyList;

use super::queue::Weighed;
use super::{Batcher, Ticket, size_of};
use crate::lock::lock;

const TOO_LARGE: &str = "Size of item is greater than max_batch_size. Please increase the max_batch_size or check the \
                         implementation of the batch_size_fn.";

impl Batcher {
    /// Weighs what is not weighed yet, if it may go.
    pub(super) fn weigh(&self, slf: &Bound<'_, Self>, measure: &Bound<'_, PyAny>) -> PyResult<()> {
        loop {
            let (tickets, before, changes, max_size) = {
                let queue = lock(&self.queue);
                let Weighed { fits, full, .. } = queue.weighed;
                if full || !queue.has_slot() {
                    return Ok(());
                }
                let tickets: Vec<_> = queue.front(fits + 1).map(|ticket| ticket.clone_ref(slf.py())).collect();
                if tickets.len() <= fits {
                    return Ok(());
                }
                (tickets, fits, queue.changes, size_of(queue.window.max_size))
            };
            let measured = measure_of(slf.py(), measure, &tickets);
            drop(tickets);
            let refused = {
                let mut queue = lock(&self.queue);
                if queue.changes != changes {
                    continue; // the measure itself has changed the queue
                }
                match measured {
                    Ok(size) if size <= max_size => {
                        queue.weighed = Weighed { fits: before + 1, size, full: size >= max_size };
                        continue;
                    }
                    Ok(_) if before > 0 => {
                        queue.weighed.full = true;
                        continue;
                    }
                    Ok(_) => (PyRuntimeError::new_err(TOO_LARGE), queue.remove_next()),
                    Err(error) => (error, queue.remove_next()),
                }
            };
            let (error, Some(ticket)) = refused else { continue };
            Self::fail(slf, &PyList::new(slf.py(), [ticket])?, error.value(slf.py()))?;
        }
    }
}

fn measure_of(py: Python<'_>, measure: &Bound<'_, PyAny>, tickets: &[Py<Ticket>]) -> PyResult<f64> {
    let items = PyList::empty(py);
    for ticket in tickets {
        items.append(ticket.get().item(py))?;
    }
    let size = measure.call1((items,))?;
    size.extract()
        .map_err(|_| PyTypeError::new_err(format!("batch_size_fn must return a number, got {}", size.get_type())))
}
