//! When the time of calls that wait is over: one that no replica has got by then never begins.
//!
//! Calls are looked at by whoever ticks the router: the thread that has the turn, or the tender. What a replica has got is
//! not its caller's any more: the ingress's proxy ends the whole request.

use std::{cmp::Reverse, collections::BinaryHeap, sync::Arc, time::Instant};

use rayserve_dataplane::wire::Fault;

use super::{
    pending::{Outcome, Pending, Place},
    router::{LATE, Router},
};

/// Calls that have gone elsewhere are thrown out when there are so many more than could wait.
const SLACK: usize = 64;

/// Calls that wait, or did; the earliest deadline first.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    waiting: BinaryHeap<Reverse<Due>>,
    /// One came that is earlier than all that were there.
    pub(super) sooner: bool,
}

#[derive(Debug)]
struct Due(Instant, Arc<Pending>);

impl Deadlines {
    fn first(&self) -> Option<Instant> {
        self.waiting.peek().map(|Reverse(due)| due.0)
    }
}

impl Router {
    /// A call waits there, for its deadline at most.
    pub(super) fn park(&mut self, call: &Arc<Pending>, place: Place) {
        call.move_to(place);
        let Some(deadline) = call.deadline else { return };
        let Deadlines { waiting, sooner } = &mut self.deadlines;
        if waiting.len() > 2 * self.outstanding + SLACK {
            waiting.retain(|Reverse(due)| due.1.waits());
        }
        *sooner |= waiting.peek().is_none_or(|Reverse(first)| deadline < first.0);
        waiting.push(Reverse(Due(deadline, Arc::clone(call))));
    }

    /// Ends the calls whose time is over; when to come back, or now if there were any.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        let mut ended = false;
        while self.deadlines.first().is_some_and(|at| at <= now) {
            let Some(Reverse(Due(_, call))) = self.deadlines.waiting.pop() else { break };
            if call.waits() {
                self.withdraw(&call);
                self.refuse_late(&call);
                ended = true;
            }
        }
        if ended { Some(now) } else { self.deadlines.first() }
    }

    pub(super) fn refuse_late(&mut self, call: &Arc<Pending>) {
        self.finish(call, Outcome::Fault(Fault::Deadline, LATE));
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}
