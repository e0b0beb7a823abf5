//! Requests that come as a batch: parked until all are there, admitted as one, sorted by what will be called.
//!
//! The streams of a batch share a slot, which is free when the last of them is answered. Where the user's code takes lists
//! a batch becomes a call or a few (`group.rs`); elsewhere, as while a deployment changes, its requests are single ones.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use rayserve_dataplane::wire::{Kind, MAX_BATCH};

use super::link::Link;
use super::replica::{Replica, Request, Work, count};
use super::run::Running;
use super::stream::Stream;
use crate::convert::text;
use crate::lock::lock;

/// Requests of batches whose BATCH has not come.
#[derive(Default)]
pub(crate) struct Parked(Mutex<VecDeque<Request>>);

impl Parked {
    /// Keeps a request; `false`: the caller has too many of them here.
    pub(super) fn push(&self, stream: Arc<Stream>, work: Work) -> bool {
        let mut parked = lock(&self.0);
        parked.push_back(Request { stream, work });
        parked.len() <= MAX_BATCH
    }

    /// Takes out the request of this stream.
    pub(super) fn take(&self, stream: u32) -> Option<Request> {
        let mut parked = lock(&self.0);
        if parked.front().is_some_and(|first| first.stream.id == stream) {
            return parked.pop_front();
        }
        let at = parked.iter().position(|request| request.stream.id == stream)?;
        parked.remove(at)
    }

    /// Forgets them all: the link is gone.
    pub(super) fn clear(&self) {
        let parked = std::mem::take(&mut *lock(&self.0));
        drop(parked);
    }
}

/// The slot of a batch, as its streams share it.
pub(crate) struct Slot(AtomicUsize);

impl Slot {
    /// One stream is answered; whether it was the last.
    pub(super) fn leave(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Replica {
    /// Admits or refuses a batch; on the loop's thread.
    pub(super) fn take_in_batch(
        self: &Arc<Self>,
        py: Python<'_>,
        link: &Link,
        requests: Vec<Request>,
        granted: bool,
    ) -> PyResult<()> {
        if requests.is_empty() {
            self.with_limit(|limit| limit.unused(link.token.0, u32::from(granted)));
            self.give_slots();
            return Ok(());
        }
        if !self.batched {
            for (at, request) in requests.into_iter().enumerate() {
                self.take_in(request, granted && at == 0);
            }
            return Ok(());
        }
        for _ in &requests {
            count(&self.counters.requests);
        }
        if self.with_limit(|limit| limit.admit_batch(link.token.0, granted)) {
            let slot = Arc::new(Slot(AtomicUsize::new(requests.len())));
            for request in &requests {
                request.stream.state().slot = Some(slot.clone());
            }
            self.call_batch(py, requests);
            self.leave_child(py)?;
        } else {
            for request in &requests {
                count(&self.counters.busy);
                self.turn_away(&request.stream, Kind::Busy, 0);
            }
        }
        self.give_slots();
        Ok(())
    }

    /// Calls the user's code with the lists of these requests.
    pub(super) fn call_batch(self: &Arc<Self>, py: Python<'_>, requests: Vec<Request>) {
        let (mut http, mut calls) = (Vec::with_capacity(requests.len()), Vec::new());
        for request in requests {
            let stream = request.stream.clone();
            match self.enter(py, request) {
                Ok(Some(running @ Running::Http(_))) => http.push(running),
                Ok(Some(running @ Running::Call(_))) => calls.push(running),
                Ok(None) => {}
                Err(error) => self.give_up(py, &stream, error),
            }
        }
        if !http.is_empty() {
            for (model, items) in by_model(http) {
                let model = text(py, &model).into_any();
                let call = self.http_call(py, &items);
                self.start_group(py, items, model, call);
            }
        }
        if !calls.is_empty() {
            self.start_calls(py, &calls);
        }
    }
}

/// HTTP requests by the model that they name, in the order of the first of each.
fn by_model(items: Vec<Running>) -> Vec<(Vec<u8>, Vec<Running>)> {
    let mut groups: Vec<(Vec<u8>, Vec<Running>)> = Vec::with_capacity(1);
    for item in items {
        let model = match &item {
            Running::Http(head) => head.get().model(),
            Running::Call(_) => b"",
        };
        if let Some(at) = groups.iter().position(|(known, _)| known == model) {
            groups[at].1.push(item);
        } else {
            let model = model.to_vec();
            groups.push((model, vec![item]));
        }
    }
    groups
}
