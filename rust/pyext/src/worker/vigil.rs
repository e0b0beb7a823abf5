//! Keeps the loop's thread from sleeping where that pays.

use std::{thread, time::Instant};

use pyo3::prelude::*;

use super::{poll::Poller, replica::Replica};
use crate::lock::lock;

/// Looks out for the next frame if no request is in flight, or one that waits for another replica; whether there is one.
/// The loop's other work is held up for the time of a [`Vigil`](rayserve_dataplane::vigil::Vigil) at most, and other
/// threads have the interpreter meanwhile.
pub(crate) fn stay_up(py: Python<'_>, replica: &Replica, poller: &mut Poller) -> bool {
    let now = Instant::now();
    poller.vigil.event(now);
    let busy = lock(&replica.limit).load() > 0 && !replica.awaits();
    if busy || !poller.vigil.stays(now) {
        return false;
    }
    py.detach(|| {
        while poller.vigil.stays(Instant::now()) {
            if poller.look().is_ok() && !poller.events.is_empty() {
                return true;
            }
            thread::yield_now();
        }
        false
    })
}
