//! A client that leaves a request, or has its answer, while that goes on without it; and how the replica is told.
//!
//! Such a request has a task of its own. Until its answer begins nothing of it is dropped when the client leaves, so what
//! hyper drops then tells the stream that the request is on, or the next one that it comes to.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use super::sender::Sender;

/// What becomes of a request whose answer is not read to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unread {
    Cancelled,
    /// It goes on, and its replica is told that the client has left.
    Told,
    /// It goes on: the answer has a body that its client is not to get.
    Ignored,
    /// It goes on: the client has every byte that the answer declared, and what the handler does now is after it.
    Answered,
}

/// Who cares about a stream's answer.
#[derive(PartialEq)]
pub(super) enum Fate {
    /// Somebody waits for the answer.
    Wanted,
    /// The answer is read to its end and thrown away.
    Unwanted,
    /// The client has all that was declared; one byte more and the handler, which may have no end, is cancelled.
    Answered,
    /// CANCEL was sent.
    Cancelled,
}

/// Where a request is whose client may leave, and whether it has.
#[derive(Default)]
pub(super) struct Departure {
    left: Cell<bool>,
    stream: RefCell<Option<Sender>>,
}

impl Departure {
    /// The request is on this stream now.
    pub(super) fn follow(&self, stream: Sender) {
        if self.left.get() {
            stream.leave();
        } else {
            *self.stream.borrow_mut() = Some(stream);
        }
    }

    /// The answer has begun: what reads it tells from now on.
    pub(super) fn hand_over(&self) {
        *self.stream.borrow_mut() = None;
    }
}

/// The client; dropped when it leaves, or has its answer.
pub(super) struct Presence(pub(super) Rc<Departure>);

impl Drop for Presence {
    fn drop(&mut self) {
        self.0.left.set(true);
        if let Some(stream) = self.0.stream.take() {
            stream.leave();
        }
    }
}
