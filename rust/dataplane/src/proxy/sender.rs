//! The direction from the client to the replica of one stream: body frames within the window, CANCEL and WINDOW with LEFT.
//!
//! It does not keep the stream alive; what it asks of one that has gone is answered as of one that is over.

use std::{
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{departure::Fate, link::Link, shard::Shard, stream::wake};
use crate::wire::{Header, Kind, flag};

/// The sending half, for the request's body.
pub(super) struct Sender {
    shard: Rc<Shard>,
    link: Rc<Link>,
    id: u32,
}

impl Sender {
    pub(super) fn new(shard: Rc<Shard>, link: Rc<Link>, id: u32) -> Self {
        Self { shard, link, id }
    }

    /// The replica has ended the stream; there is no use in sending more.
    pub(super) fn is_over(&self) -> bool {
        self.link.with(self.id, |stream| stream.end.is_some() || stream.fate == Fate::Cancelled).unwrap_or(true)
    }

    /// Ready when the stream is over, of which nobody reads the answer; its body may be on its way still.
    pub(super) fn poll_over(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_over() {
            return Poll::Ready(());
        }
        self.link.with(self.id, |stream| stream.reader = Some(cx.waker().clone()));
        Poll::Pending
    }

    pub(super) fn is_accepted(&self) -> bool {
        self.link.with(self.id, |stream| stream.accepted).unwrap_or(true)
    }

    /// How much may be sent now: the stream's window, while the link is not congested. Ready with 0 when the stream is over.
    pub(super) fn poll_room(&self, cx: &Context<'_>) -> Poll<usize> {
        let window = self.link.with(self.id, |stream| {
            if stream.window == 0 {
                stream.sender = Some(cx.waker().clone());
            }
            stream.window
        });
        match window {
            None => Poll::Ready(0),
            Some(_) if self.is_over() => Poll::Ready(0),
            Some(0) => Poll::Pending,
            Some(window) => self.link.poll_room(cx).map(|()| window as usize),
        }
    }

    /// Is woken when the replica ends the stream.
    pub(super) fn watch(&self, cx: &Context<'_>) {
        self.link.with(self.id, |stream| stream.sender = Some(cx.waker().clone()));
    }

    pub(super) fn send(&self, bytes: Bytes) {
        self.link.with(self.id, |stream| stream.window = stream.window.saturating_sub(bytes.len() as u32));
        self.link.write_shared(Header::new(Kind::Body, self.id), bytes);
    }

    pub(super) fn finish(&self) {
        self.link.signal(Header::new(Kind::Body, self.id).with(flag::FIN));
    }

    /// Tells the replica that the client has left and that this is no reason to stop.
    pub(super) fn leave(&self) {
        if !self.is_over() {
            self.link.signal(Header::new(Kind::Window, self.id).with(flag::LEFT));
        }
    }

    /// Asks the replica to stop, once, if it has not ended the stream by itself.
    pub(super) fn cancel(&self) {
        let window = self.link.with(self.id, |stream| {
            if stream.end.is_some() || stream.fate == Fate::Cancelled {
                return None;
            }
            stream.fate = Fate::Cancelled;
            stream.drop_frame(); // the entry may stay for long
            wake(&mut stream.reader);
            wake(&mut stream.sender);
            Some(stream.discard())
        });
        let Some(Some(window)) = window else { return };
        self.shard.metrics.cancelled.up();
        self.link.signal(Header::new(Kind::Cancel, self.id));
        if window > 0 {
            self.link.signal(Header::new(Kind::Window, self.id).aux(window));
        }
    }
}
