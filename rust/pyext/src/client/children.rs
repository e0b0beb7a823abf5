//! The calls that a request has made: when it is cancelled, so are they, also those that nobody awaits.
//!
//! A request that ends by itself leaves its calls alone. Only weak references are kept, and those of calls that have ended
//! are thrown out whenever the list has doubled: a request may make calls for days.

use std::{
    sync::{Arc, Weak},
    time::Instant,
};

use super::{pending::Pending, turns::Caller};

/// What is short enough to be kept as it is.
const FEW: usize = 32;

/// See the module.
#[derive(Default)]
pub(crate) struct Children {
    calls: Vec<(Weak<Caller>, Weak<Pending>)>,
    /// The length at which to look for calls that have ended.
    full: usize,
    /// When the request's time is over, and that of its calls.
    pub(crate) deadline: Option<Instant>,
}

impl Children {
    pub(super) fn add(&mut self, caller: &Arc<Caller>, call: &Arc<Pending>) {
        if self.calls.len() >= self.full.max(FEW) {
            self.calls.retain(|(_, call)| call.upgrade().is_some_and(|call| call.outcome().is_none()));
            self.full = 2 * self.calls.len();
        }
        self.calls.push((Arc::downgrade(caller), Arc::downgrade(call)));
    }

    /// Takes the calls out, to be cancelled when no lock is held.
    pub(crate) fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    pub(crate) fn cancel(self) {
        for (caller, call) in self.calls {
            if let (Some(caller), Some(call)) = (caller.upgrade(), call.upgrade()) {
                caller.cancel(&call);
            }
        }
    }
}
