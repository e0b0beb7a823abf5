//! Bodies between hyper and streams: the response's towards the client, the request's towards the replica.
//!
//! A response that came whole costs nothing; a streamed one gives window back as hyper takes it. A request's body keeps
//! what it has sent until the replica has accepted the request, so that BUSY, RETURNED and a death can send it again.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use hyper::body::{Body as _, Incoming};
use tokio::time::Sleep;

use super::{
    listen::Open,
    stream::{Sender, StreamRef},
};
use crate::{
    error::Error,
    wire::{MAX_CHUNK, MAX_INLINE},
};

/// A response's body.
pub(super) struct Body {
    content: Content,
    /// The request counts as open until its body is gone.
    _open: Open,
}

enum Content {
    Whole(Bytes),
    Streamed { first: Bytes, stream: StreamRef, deadline: Option<Pin<Box<Sleep>>> },
}

impl Body {
    pub(super) fn whole(bytes: Bytes, open: Open) -> Self {
        Self { content: Content::Whole(bytes), _open: open }
    }

    pub(super) fn streamed(first: Bytes, stream: StreamRef, deadline: Option<Pin<Box<Sleep>>>, open: Open) -> Self {
        Self { content: Content::Streamed { first, stream, deadline }, _open: open }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match &mut self.content {
            Content::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Content::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Content::Streamed { first, stream, .. } if !first.is_empty() => {
                stream.consumed(first.len());
                Poll::Ready(Some(Ok(Frame::data(std::mem::take(first)))))
            }
            Content::Streamed { stream, deadline, .. } => {
                if let Poll::Ready(chunk) = stream.poll_chunk(cx) {
                    return Poll::Ready(chunk.map(|chunk| chunk.map(Frame::data)));
                }
                match deadline {
                    Some(deadline) => {
                        ready!(deadline.as_mut().poll(cx));
                        stream.sender().cancel();
                        Poll::Ready(Some(Err(Error::Aborted)))
                    }
                    None => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole(bytes) => bytes.is_empty(),
            Content::Streamed { first, stream, .. } => first.is_empty() && stream.is_over(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Streamed { .. } => SizeHint::default(),
        }
    }
}

/// A request's body that travels in its REQUEST, or one that is streamed.
pub(super) enum Inbound {
    Whole(Bytes),
    Streamed(Upload),
}

impl Inbound {
    /// Small bodies of known length are read now, before the request asks for a replica.
    ///
    /// # Errors
    /// The body is too large, broken, or its client has gone.
    pub(super) async fn read(mut incoming: Incoming, limit: Option<u64>) -> Result<Self, Error> {
        if incoming.is_end_stream() {
            return Ok(Self::Whole(Bytes::new()));
        }
        let length = incoming.size_hint().exact();
        if let (Some(length), Some(limit)) = (length, limit)
            && length > limit
        {
            return Err(Error::BodyTooLarge { limit });
        }
        match length {
            Some(length) if length <= MAX_INLINE as u64 => {
                let mut whole: Option<BytesMut> = None;
                while let Some(bytes) = data(std::future::poll_fn(|cx| Pin::new(&mut incoming).poll_frame(cx)).await)? {
                    if bytes.len() as u64 == length {
                        return Ok(Self::Whole(bytes));
                    }
                    whole.get_or_insert_with(|| BytesMut::with_capacity(length as usize)).extend_from_slice(&bytes);
                }
                Ok(Self::Whole(whole.unwrap_or_default().freeze()))
            }
            _ => Ok(Self::Streamed(Upload::new(incoming, limit))),
        }
    }

    /// Prepares for being sent once more; `false` if part of it is gone.
    pub(super) fn rewind(&mut self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Streamed(upload) => upload.rewind(),
        }
    }
}

fn data(frame: Option<Result<Frame<Bytes>, hyper::Error>>) -> Result<Option<Bytes>, Error> {
    match frame {
        None => Ok(None),
        // Trailers have no place in the frames; they are read and left out.
        Some(Ok(frame)) => Ok(Some(frame.into_data().unwrap_or_default())),
        Some(Err(error)) if error.is_parse() || error.is_user() => Err(Error::Malformed),
        Some(Err(_)) => Err(Error::Disconnected),
    }
}

/// A large or chunked body on its way.
pub(super) struct Upload {
    incoming: Incoming,
    limit: Option<u64>,
    total: u64,
    /// What was read, until the replica accepts.
    kept: Vec<Bytes>,
    /// Of those, what was sent on the present stream.
    next: usize,
    pending: Bytes,
    read_all: bool,
    accepted: bool,
    done: bool,
}

impl Upload {
    fn new(incoming: Incoming, limit: Option<u64>) -> Self {
        Self {
            incoming,
            limit,
            total: 0,
            kept: Vec::new(),
            next: 0,
            pending: Bytes::new(),
            read_all: false,
            accepted: false,
            done: false,
        }
    }

    fn rewind(&mut self) -> bool {
        if self.accepted {
            return false;
        }
        (self.next, self.pending, self.done) = (0, Bytes::new(), false);
        true
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// Moves what can be moved; ready when the body is through or the replica wants no more.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, to: &Sender) -> Poll<Result<(), Error>> {
        while !self.done {
            if to.is_over() {
                break;
            }
            if !self.accepted && to.is_accepted() {
                self.accepted = true;
                self.kept.clear();
                self.next = 0;
            }
            if !self.pending.is_empty() {
                let room = ready!(to.poll_room(cx)).min(MAX_CHUNK).min(self.pending.len());
                to.send(&self.pending.split_to(room));
            } else if let Some(kept) = self.kept.get(self.next) {
                self.pending = kept.clone();
                self.next += 1;
            } else if self.read_all {
                to.finish();
                self.done = true;
            } else {
                to.watch(cx);
                let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
                self.take(data(frame)?)?;
            }
        }
        self.done = true;
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, bytes: Option<Bytes>) -> Result<(), Error> {
        let Some(bytes) = bytes else {
            self.read_all = true;
            return Ok(());
        };
        self.total += bytes.len() as u64;
        if let Some(limit) = self.limit
            && self.total > limit
        {
            return Err(Error::BodyTooLarge { limit });
        }
        if !self.accepted {
            self.kept.push(bytes.clone());
            self.next = self.kept.len();
        }
        self.pending = bytes;
        Ok(())
    }
}
