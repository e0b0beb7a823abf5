//! Bodies between hyper and streams: the response's towards the client, the request's towards the replica.
//!
//! A response that came whole costs nothing; a streamed one gives window back as hyper takes it. A request's body keeps
//! what it has sent until the replica has accepted the request, so that BUSY, RETURNED and a death can send it again.
//! A small one that is there travels in its REQUEST; a handler never waits for one that is not.

use std::{
    future::{Future, poll_fn},
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, header::EXPECT};
use http_body::{Frame, SizeHint};
use hyper::body::{Body as _, Incoming};
use tokio::time::{Instant, Sleep, timeout, timeout_at};

use super::{departure::Unread, listen::Open, sender::Sender, shadow::Late, stream::StreamRef};
use crate::{
    error::Error,
    wire::{MAX_INLINE, PIECE},
};

/// A body that nobody wants, of a request or an answer, is read no longer than this.
pub(super) const LINGER: Duration = Duration::from_secs(30);

/// A small body that comes within this travels in its REQUEST. Clients that send head and body apart are through in a
/// fraction of it; what takes longer should not keep a handler from starting.
const MOMENT: Duration = Duration::from_millis(5);

/// What serves several requests at once should wait for none of their clients: a body up to this size is taken whole first.
const WHOLE: u64 = 16 * 1024 * 1024;

/// A response's body.
pub(super) struct Body {
    content: Content,
    /// The request counts as open until its body is gone.
    _open: Open,
}

enum Content {
    Whole(Bytes),
    Streamed {
        first: Bytes,
        stream: StreamRef,
        /// What hyper still takes, if the answer has declared its length: it drops the body then, whether or not the
        /// replica has said its last.
        left: Option<u64>,
        deadline: Option<Pin<Box<Sleep>>>,
        broken: Option<Error>,
    },
}

impl Body {
    pub(super) fn whole(bytes: Bytes, open: Open) -> Self {
        Self { content: Content::Whole(bytes), _open: open }
    }

    /// `length`: what the answer declares.
    pub(super) fn streamed(
        first: Bytes,
        mut stream: StreamRef,
        length: Option<u64>,
        deadline: Option<Pin<Box<Sleep>>>,
        open: Open,
    ) -> Self {
        let left = give(&mut stream, length, 0);
        Self { content: Content::Streamed { first, stream, left, deadline, broken: None }, _open: open }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Content::Streamed { stream, deadline: Some(deadline), .. } = &self.content
            && matches!(stream.unread, Unread::Told | Unread::Ignored)
        {
            let sender = stream.sender();
            if !sender.is_over() {
                tokio::task::spawn_local(see_out(sender, deadline.deadline()));
            }
        }
    }
}

/// A handler whose answer nobody reads may come to its end; an endless one would keep its slot for ever.
async fn see_out(stream: Sender, until: Instant) {
    if timeout_at(until, poll_fn(|cx| stream.poll_over(cx))).await.is_err() {
        stream.cancel();
    }
}

/// So much of what is left goes to hyper now. After the last of it the request is answered.
fn give(stream: &mut StreamRef, left: Option<u64>, len: usize) -> Option<u64> {
    let left = left?.saturating_sub(len as u64);
    if left == 0 {
        stream.unread = Unread::Answered;
    }
    Some(left)
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match &mut self.content {
            Content::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Content::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Content::Streamed { first, stream, left, .. } if !first.is_empty() => {
                stream.consumed(first.len());
                *left = give(stream, *left, first.len());
                Poll::Ready(Some(Ok(Frame::data(std::mem::take(first)))))
            }
            Content::Streamed { stream, left, deadline, broken, .. } => {
                if let Some(error) = broken.take() {
                    return Poll::Ready(Some(Err(error)));
                }
                let error = match (stream.poll_chunk(cx), deadline) {
                    (Poll::Ready(Some(Err(error))), _) => error,
                    (Poll::Ready(None), _) => return Poll::Ready(None),
                    (Poll::Ready(Some(Ok(chunk))), _) => {
                        *left = give(stream, *left, chunk.len());
                        return Poll::Ready(Some(Ok(Frame::data(chunk))));
                    }
                    (Poll::Pending, None) => return Poll::Pending,
                    (Poll::Pending, Some(deadline)) => {
                        ready!(deadline.as_mut().poll(cx));
                        stream.sender().cancel();
                        Error::Aborted
                    }
                };
                stream.broke(&error);
                // hyper drops what it has not flushed when it meets an error; now it flushes first.
                *broken = Some(error);
                cx.waker().wake_by_ref();
                Poll::Pending
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

/// What hyper reads of a request's body. What is left of it when nobody wants it is read away for a while: a client that
/// is still sending would find its connection reset, and the answer with it.
pub(super) struct Source {
    incoming: Option<Incoming>,
    /// The client sends nothing before it is asked to, which the first read does.
    held_back: bool,
}

impl Source {
    pub(super) fn new(incoming: Incoming, headers: &HeaderMap) -> Self {
        Self { incoming: (!incoming.is_end_stream()).then_some(incoming), held_back: headers.contains_key(EXPECT) }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Error>> {
        self.held_back = false;
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(Ok(None)) };
        let frame = ready!(Pin::new(&mut *incoming).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) || incoming.is_end_stream() {
            self.incoming = None;
        }
        Poll::Ready(data(frame))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Some(mut incoming) = self.incoming.take()
            && !self.held_back
        {
            let rest =
                async move { while let Some(Ok(_)) = poll_fn(|cx| Pin::new(&mut incoming).poll_frame(cx)).await {} };
            tokio::task::spawn_local(timeout(LINGER, rest));
        }
    }
}

/// A request's body that travels in its REQUEST, or one that is streamed.
pub(super) enum Inbound {
    Whole(Bytes),
    Streamed(Upload),
}

impl Inbound {
    /// A small body of known length is awaited for a moment, before the request asks for a replica. One that the client
    /// holds back until it is asked for is streamed, like what takes longer. `patient`: all of it is awaited, up to [`WHOLE`].
    ///
    /// # Errors
    /// The body is too large, broken, or its client has gone.
    pub(super) async fn read(mut source: Source, limit: Option<u64>, patient: bool) -> Result<Self, Error> {
        let Some(incoming) = &source.incoming else { return Ok(Self::Whole(Bytes::new())) };
        let length = incoming.size_hint().exact();
        if let (Some(length), Some(limit)) = (length, limit)
            && length > limit
        {
            return Err(Error::BodyTooLarge { limit });
        }
        match length {
            Some(length) if length <= MAX_INLINE as u64 && (patient || !source.held_back) => {
                let mut parts = Vec::new();
                let reading = async {
                    while let Some(bytes) = poll_fn(|cx| source.poll(cx)).await? {
                        if bytes.len() as u64 == length {
                            return Ok(bytes);
                        }
                        parts.push(bytes);
                    }
                    Ok(parts.concat().into())
                };
                // The timer is armed when the first poll finds that something is missing, not before.
                match if patient { Ok(reading.await) } else { timeout(MOMENT, reading).await } {
                    Ok(whole) => whole.map(Self::Whole),
                    Err(_) => Ok(Self::Streamed(Upload::new(source, limit, parts))),
                }
            }
            _ => {
                let mut upload = Upload::new(source, limit, Vec::new());
                while patient && !upload.read_all && upload.total <= WHOLE {
                    let bytes = poll_fn(|cx| upload.source.poll(cx)).await?;
                    upload.take(bytes)?;
                }
                upload.rewind();
                let small = upload.read_all && upload.total <= MAX_INLINE as u64;
                Ok(if small { Self::Whole(upload.kept.concat().into()) } else { Self::Streamed(upload) })
            }
        }
    }

    /// Prepares for being sent once more; `false` if part of it is gone.
    pub(super) fn rewind(&mut self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Streamed(upload) => upload.rewind(),
        }
    }

    /// Its bytes, as far as it is known.
    pub(super) fn length(&self) -> u64 {
        match self {
            Self::Whole(bytes) => bytes.len() as u64,
            Self::Streamed(upload) => {
                let left = upload.source.incoming.as_ref().and_then(|incoming| incoming.size_hint().exact());
                upload.total + left.unwrap_or(0)
            }
        }
    }

    /// Copies what has come and what comes; before any of it is accepted.
    pub(super) fn copy_to(&mut self, mut copy: Late) {
        match self {
            Self::Whole(bytes) => copy.take(bytes),
            Self::Streamed(upload) => {
                upload.kept.iter().for_each(|bytes| copy.take(bytes));
                if !upload.read_all {
                    return upload.copies.push(copy);
                }
            }
        }
        copy.end();
    }
}

fn data(frame: Option<Result<Frame<Bytes>, hyper::Error>>) -> Result<Option<Bytes>, Error> {
    match frame {
        None => Ok(None),
        // Trailers have no place in the frames; they are read and left out.
        Some(Ok(frame)) => Ok(Some(frame.into_data().unwrap_or_default())),
        Some(Err(error)) if error.is_parse() || error.is_user() || is_garbled(&error) => Err(Error::Malformed),
        Some(Err(_)) => Err(Error::Disconnected),
    }
}

/// hyper reports chunks that are none as it reports a broken socket, but for the kind of the cause.
fn is_garbled(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData))
}

/// A large, chunked or slow body on its way.
pub(super) struct Upload {
    source: Source,
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
    /// For shadows, which get all of it or nothing.
    copies: Vec<Late>,
}

impl Upload {
    /// `kept`: what was read already.
    fn new(source: Source, limit: Option<u64>, kept: Vec<Bytes>) -> Self {
        Self {
            source,
            limit,
            total: kept.iter().map(|bytes| bytes.len() as u64).sum(),
            kept,
            next: 0,
            pending: Bytes::new(),
            read_all: false,
            accepted: false,
            done: false,
            copies: Vec::new(),
        }
    }

    /// One that is there.
    pub(super) fn whole(bytes: Bytes) -> Self {
        let source = Source { incoming: None, held_back: false };
        Self { read_all: true, ..Self::new(source, None, vec![bytes]) }
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
                // What was read before there was a stream, or is sent once more, may still be ahead of its turn.
                self.kept.drain(..self.next);
                self.next = 0;
            }
            if !self.pending.is_empty() {
                let room = ready!(to.poll_room(cx)).min(PIECE).min(self.pending.len());
                to.send(self.pending.split_to(room));
            } else if let Some(kept) = self.kept.get(self.next) {
                self.pending = kept.clone();
                self.next += 1;
            } else if self.read_all {
                to.finish();
                self.done = true;
            } else {
                to.watch(cx);
                let bytes = ready!(self.source.poll(cx))?;
                self.take(bytes)?;
            }
        }
        self.done = true;
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, bytes: Option<Bytes>) -> Result<(), Error> {
        let Some(bytes) = bytes else {
            self.read_all = true;
            self.copies.drain(..).for_each(Late::end);
            return Ok(());
        };
        self.total += bytes.len() as u64;
        if let Some(limit) = self.limit
            && self.total > limit
        {
            return Err(Error::BodyTooLarge { limit });
        }
        self.copies.iter_mut().for_each(|copy| copy.take(&bytes));
        if !self.accepted {
            self.kept.push(bytes.clone());
            self.next = self.kept.len();
        }
        self.pending = bytes;
        Ok(())
    }
}
