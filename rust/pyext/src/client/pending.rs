//! One call, from `.remote()` until its outcome is taken.
//!
//! It is shared by the response that Python holds, by the queue or the link that it stands in, and by whoever waits. The
//! outcome is written once. `place` and the waiters change only under the caller's lock; their own mutex is never
//! contended and keeps the compiler's promise.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::Thread,
};

use bytes::Bytes;
use rayserve_dataplane::{
    engine,
    error::Error,
    wire::{Fault, call::Value},
};

use super::mailbox::Mailbox;

/// How a call ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The method returned.
    Value(Value),
    /// The replica answered with an ERROR frame.
    Fault(Fault, Bytes),
    /// The replica died with the call begun.
    Died(String),
    /// The router refused it.
    Refused(Error),
    /// No snapshot holds the deployment.
    Unknown,
    /// Cancelled from here.
    Cancelled,
    /// This process closes its handles.
    Closed,
}

/// Where a call stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Until a snapshot holds its deployment.
    Unrouted,
    Queued(engine::Place),
    Sent {
        link: usize,
        stream: u32,
    },
    Done,
}

/// Whom the outcome wakes.
#[derive(Debug)]
enum Waiter {
    Thread(Thread),
    Mailbox(Arc<Mailbox>, u64),
}

#[derive(Debug)]
struct Inner {
    place: Place,
    payload: Bytes,
    waiters: Vec<Waiter>,
}

/// A call in flight.
#[derive(Debug)]
pub(super) struct Pending {
    /// `{app}#{deployment}`.
    pub(super) deployment: String,
    inner: Mutex<Inner>,
    outcome: OnceLock<Outcome>,
}

impl Pending {
    /// `payload` is the whole payload of the CALL frame.
    pub(super) fn new(deployment: String, payload: Bytes) -> Arc<Self> {
        let inner = Inner { place: Place::Unrouted, payload, waiters: Vec::new() };
        Arc::new(Self { deployment, inner: Mutex::new(inner), outcome: OnceLock::new() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn place(&self) -> Place {
        self.inner().place
    }

    pub(super) fn move_to(&self, place: Place) {
        self.inner().place = place;
    }

    /// The CALL frame's payload, which is kept until the call ends: it may have to be sent again.
    pub(super) fn payload(&self) -> Bytes {
        self.inner().payload.clone()
    }

    pub(super) fn outcome(&self) -> Option<&Outcome> {
        self.outcome.get()
    }

    /// Whether somebody waits.
    pub(super) fn attended(&self) -> bool {
        !self.inner().waiters.is_empty()
    }

    pub(super) fn wake_thread(&self, thread: Thread) {
        self.inner().waiters.push(Waiter::Thread(thread));
    }

    pub(super) fn forget_thread(&self, gone: &Thread) {
        let mut inner = self.inner();
        let is_gone = |waiter: &Waiter| matches!(waiter, Waiter::Thread(thread) if thread.id() == gone.id());
        if let Some(index) = inner.waiters.iter().position(is_gone) {
            inner.waiters.swap_remove(index);
        }
    }

    pub(super) fn notify(&self, mailbox: Arc<Mailbox>, token: u64) {
        self.inner().waiters.push(Waiter::Mailbox(mailbox, token));
    }

    pub(super) fn forget_mailbox(&self, token: u64) {
        self.inner().waiters.retain(|waiter| !matches!(waiter, Waiter::Mailbox(_, other) if *other == token));
    }

    /// Ends the call and wakes whoever waits; the second end of a call is ignored.
    pub(super) fn finish(&self, outcome: Outcome) {
        let waiters = {
            let mut inner = self.inner();
            inner.place = Place::Done;
            inner.payload = Bytes::new();
            std::mem::take(&mut inner.waiters)
        };
        if self.outcome.set(outcome).is_err() {
            return;
        }
        for waiter in waiters {
            match waiter {
                Waiter::Thread(thread) => thread.unpark(),
                Waiter::Mailbox(mailbox, token) => mailbox.deliver(token),
            }
        }
    }
}
