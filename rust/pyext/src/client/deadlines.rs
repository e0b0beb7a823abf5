//! When the time of calls that wait is over: one that no replica has got by then never begins.
//!
//! Calls are looked at by whoever ticks the router: the thread that has the turn, or the tender. What a replica has got is
//! not its caller's any more: the ingress's proxy ends the whole request.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use rayserve_dataplane::wire::Fault;

use super::{
    pending::{Outcome, Pending, Place},
    router::{LATE, Router},
};

/// Calls that have gone elsewhere are thrown out when there are so many more than could wait.
const SLACK: usize = 64;

/// Calls that wait, or did, by deadline and address: one that waits several times stands here once.
#[derive(Debug, Default)]
pub(super) struct Deadlines(BTreeMap<(Instant, usize), Arc<Pending>>);

impl Deadlines {
    pub(super) fn first(&self) -> Option<Instant> {
        self.0.first_key_value().map(|((at, _), _)| *at)
    }
}

impl Router {
    /// A call waits there, for its deadline at most.
    pub(super) fn park(&mut self, call: &Arc<Pending>, place: Place) {
        call.move_to(place);
        let Some(deadline) = call.deadline else { return };
        let waiting = &mut self.deadlines.0;
        if waiting.len() > 2 * self.outstanding + SLACK {
            waiting.retain(|_, call| call.waits());
        }
        waiting.insert((deadline, Arc::as_ptr(call).addr()), Arc::clone(call));
    }

    /// Ends the calls whose time is over; whether there were any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let mut ended = false;
        while self.deadlines.first().is_some_and(|at| at <= now) {
            let Some((_, call)) = self.deadlines.0.pop_first() else { break };
            if call.waits() {
                self.withdraw(&call);
                self.refuse_late(&call);
                ended = true;
            }
        }
        ended
    }

    pub(super) fn refuse_late(&mut self, call: &Arc<Pending>) {
        self.finish(call, Outcome::Fault(Fault::Deadline, LATE));
    }
}
