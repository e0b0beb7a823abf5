//! Who has a replica's slots: a request that came is admitted, held or refused, and one that is over gives its slot to the next.
//!
//! Held requests come first, then the callers that were refused, in their order; they get a grant. One that its caller does
//! not use is taken back after a while: no slot stays empty while others wait.

use std::sync::atomic::Ordering;
use std::time::Duration;

use mio::Token;
use pyo3::prelude::*;
use rayserve_dataplane::engine::limit::{Admission, Limit, Next};
use rayserve_dataplane::wire::{Header, Kind};

use super::replica::{Posted, Replica, Request, count};
use super::stream::Stream;
use crate::lock::lock;

/// Grants are taken back that were unused for this long, or up to twice as long. Callers use theirs within milliseconds.
const GRANT: Duration = Duration::from_millis(500);

impl Replica {
    /// Admits, holds or refuses a request.
    pub(crate) fn take_in(&self, request: Request, granted: bool) {
        count(&self.counters.requests);
        let stream = request.stream.clone();
        let (admission, owes) = self.with_limit(|limit| (limit.admit(stream.link.token.0, granted), limit.owes()));
        match admission {
            Admission::Run => lock(&self.ready).push_back(request),
            Admission::Hold => lock(&self.held).push_back(request),
            Admission::Busy => {
                count(&self.counters.busy);
                self.turn_away(&stream, Kind::Busy, 0);
            }
        }
        if owes {
            self.give_slots();
        }
    }

    /// A request is over; its slot goes to the next.
    pub(crate) fn release(&self, py: Python<'_>, stream: &Stream) -> PyResult<()> {
        let (began, slot) = {
            let mut state = stream.state();
            if std::mem::replace(&mut state.released, true) {
                return Ok(());
            }
            (state.began, state.slot.take())
        };
        if slot.is_some_and(|slot| !slot.leave()) {
            return Ok(()); // others of its batch have no answer yet
        }
        let service = began.map_or(Duration::ZERO, |began| began.elapsed());
        self.with_limit(|limit| limit.finished(service));
        self.give_slots();
        self.tell_if_idle(py)
    }

    /// Gives free slots to held requests and to callers that are owed one.
    pub(crate) fn give_slots(&self) {
        while let Some(next) = self.with_limit(Limit::next_free) {
            match next {
                Next::Start => {
                    let request = lock(&self.held).pop_front().expect("the limit counts the held requests");
                    lock(&self.ready).push_back(request);
                }
                Next::Grant(link) => {
                    let link = lock(&self.links).get(&Token(link)).cloned();
                    if let Some(link) = link {
                        link.put(Header::new(Kind::Credit, 0).aux(1), &[]);
                    }
                    if !self.reclaiming.swap(true, Ordering::Relaxed) {
                        self.post([Posted::Reclaim]);
                    }
                }
            }
        }
    }

    /// Comes back for unused grants in a while; on the loop's thread.
    pub(crate) fn reclaim_later(&self, py: Python<'_>) -> PyResult<()> {
        if let Some(reclaim) = self.callback(py, |callbacks| &callbacks.reclaim) {
            self.hooks.call_later.bind(py).call1((GRANT.as_secs_f64(), reclaim))?;
        }
        Ok(())
    }

    /// Takes back what callers had time to use.
    pub(crate) fn reclaim(&self, py: Python<'_>) -> PyResult<()> {
        if self.with_limit(Limit::reclaim) {
            self.reclaim_later(py)?;
        } else {
            self.reclaiming.store(false, Ordering::Relaxed);
        }
        self.give_slots();
        Ok(())
    }

    pub(crate) fn with_limit<T>(&self, change: impl FnOnce(&mut Limit) -> T) -> T {
        let mut limit = lock(&self.limit);
        let result = change(&mut limit);
        self.outgoing.set_load(limit.load(), limit.is_fast());
        result
    }
}
