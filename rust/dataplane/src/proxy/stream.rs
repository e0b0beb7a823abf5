//! One request on one link: what has come back, who waits for it, and how it ends.
//!
//! The lease is the slot at the replica: it comes back with the replica's final frame, never with our CANCEL. A
//! [`StreamRef`] is the request's end of it; dropping it before that frame mostly cancels the request, and the entry stays until
//! the replica has said its last.

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use super::{
    batches::Packed,
    choose::Chosen,
    departure::{Fate, Unread},
    link::{Link, is_final},
    sender::Sender,
    shard::Shard,
    waiting::Waiting,
};
use crate::{
    engine::Lease,
    error::{Blame, Error},
    traffic::TargetMeter,
    wire::{BODY_WINDOW, Fault, Header, Kind, ResponseHeadView, WINDOW, WireError, flag},
};

/// Window given back at once: half of it, so that a WINDOW frame is rare and the sender has the other half meanwhile.
const WINDOW_STEP: u32 = WINDOW / 2;

/// How a stream answers.
pub(super) enum Outcome {
    /// The answer has begun.
    Head(Head),
    /// Not begun; the request waits at its old place again.
    Back(Waiting),
    /// No answer.
    Failed(Error),
}

/// How an answer begins.
pub(super) struct Head {
    pub(super) status: u32,
    /// What the view stands in.
    pub(super) payload: Bytes,
    pub(super) view: ResponseHeadView,
    /// The body is complete in it.
    pub(super) whole: bool,
}

/// What an entry keeps for others than the request; one field for what few have, so that most pay for neither.
pub(super) enum Aside {
    /// The frame of a request that went in a batch, until it is begun: it may have to go in another.
    Packed(Box<Packed>),
    /// Tells the router in Python that chose the replica when the entry goes.
    #[expect(dead_code, reason = "what it does, it does when it is dropped")]
    Chosen(Box<Chosen>),
}

/// The entry in the link's table.
pub(super) struct Stream {
    lease: Option<Lease>,
    pub(super) aside: Option<Aside>,
    /// The request counts as begun when the kernel has taken this many bytes of the link.
    pub(super) begun_at: u64,
    pub(super) fate: Fate,
    /// The replica has said anything but BUSY: the caller need not keep what it sent.
    pub(super) accepted: bool,
    /// A head came; what follows are chunks.
    answered: bool,
    outcome: Option<Outcome>,
    chunks: VecDeque<Bytes>,
    pub(super) end: Option<Result<(), Error>>,
    /// Waits for the outcome or a chunk; for the end of an answer that nobody reads.
    pub(super) reader: Option<Waker>,
    /// Waits for window.
    pub(super) sender: Option<Waker>,
    /// Bytes that may still be sent.
    pub(super) window: u32,
    /// Bytes that came and were not given back as window.
    held: u32,
    /// Of those, bytes that were consumed.
    consumed: u32,
}

impl Stream {
    pub(super) fn new(lease: Lease) -> Self {
        Self {
            lease: Some(lease),
            aside: None,
            begun_at: u64::MAX,
            fate: Fate::Wanted,
            accepted: false,
            answered: false,
            outcome: None,
            chunks: VecDeque::new(),
            end: None,
            reader: None,
            sender: None,
            window: BODY_WINDOW,
            held: 0,
            consumed: 0,
        }
    }

    pub(super) fn into_lease(self) -> Lease {
        self.lease.expect("a stream that was never opened has its lease")
    }

    /// Takes a frame of the replica.
    pub(super) fn receive(
        shard: &Rc<Shard>,
        link: &Rc<Link>,
        header: &Header,
        payload: Bytes,
    ) -> Result<(), WireError> {
        let id = header.stream;
        // A frame of a stream that has ended can only be a late WINDOW.
        let taken = link.with(id, |stream| {
            let excess = stream.fate == Fate::Answered && header.kind == Kind::Chunk && !payload.is_empty();
            (stream.take(shard, header, payload), excess)
        });
        let Some((taken, excess)) = taken else { return Ok(()) };
        let (forget, window) = taken?;
        if excess {
            Sender::new(Rc::clone(shard), Rc::clone(link), id).cancel();
        }
        if window > 0 {
            link.signal(Header::new(Kind::Window, id).aux(window));
        }
        if forget {
            link.remove(shard, id);
        }
        Ok(())
    }

    /// Whether to forget the stream, and window to give back at once.
    fn take(&mut self, shard: &Rc<Shard>, header: &Header, payload: Bytes) -> Result<(bool, u32), WireError> {
        if self.end.is_some() {
            return Ok((false, 0));
        }
        let finished = is_final(header);
        self.accepted |= !matches!(header.kind, Kind::Busy | Kind::Returned);
        match header.kind {
            Kind::Window => {
                self.window = self.window.saturating_add(header.aux).min(BODY_WINDOW);
                wake(&mut self.sender);
                return Ok((false, 0));
            }
            Kind::Response if !self.answered => {
                self.answered = true;
                self.drop_frame();
                let view = ResponseHeadView::parse(payload.clone())?;
                if !finished {
                    self.hold(view.body().len())?;
                }
                self.outcome = Some(Outcome::Head(Head { status: header.aux, payload, view, whole: finished }));
            }
            Kind::Chunk if self.answered => {
                self.hold(payload.len())?;
                if !payload.is_empty() {
                    self.chunks.push_back(payload);
                }
            }
            Kind::Error => self.fail(fault(Fault::from_aux(header.aux), &payload)),
            Kind::Busy | Kind::Returned if !self.answered => return Ok((self.back(shard, header), 0)),
            _ => return Err(WireError::Malformed("order of frames")),
        }
        if finished {
            self.end.get_or_insert(Ok(()));
            if let Some(lease) = self.lease.take() {
                let report = Some((header.load, header.has(flag::FAST)));
                shard.engine.borrow_mut().answered(lease, report);
            }
            wake(&mut self.sender);
        }
        if finished || self.fate == Fate::Wanted {
            wake(&mut self.reader);
        }
        if self.fate == Fate::Wanted {
            return Ok((false, 0));
        }
        Ok((finished, self.discard()))
    }

    /// BUSY or RETURNED: the request was not begun.
    fn back(&mut self, shard: &Rc<Shard>, header: &Header) -> bool {
        let Some(lease) = self.lease.take() else { return false };
        let mut engine = shard.engine.borrow_mut();
        let place = if header.kind == Kind::Busy {
            shard.metrics.busy.up();
            engine.busy(lease, header.load)
        } else {
            engine.returned(lease)
        };
        if self.fate == Fate::Wanted {
            drop(engine);
            let packed = match self.aside.take() {
                Some(Aside::Packed(packed)) => Some(packed),
                Some(Aside::Chosen(_)) | None => None,
            };
            let waiting = shard.again(place, packed);
            self.outcome = Some(waiting.map_or_else(Outcome::Failed, Outcome::Back));
        }
        self.end = Some(Ok(()));
        wake(&mut self.reader);
        wake(&mut self.sender);
        self.fate != Fate::Wanted
    }

    /// The request will go in no other batch.
    pub(super) fn drop_frame(&mut self) {
        if let Some(Aside::Packed(_)) = self.aside {
            self.aside = None;
        }
    }

    fn hold(&mut self, len: usize) -> Result<(), WireError> {
        self.held = self.held.saturating_add(u32::try_from(len).unwrap_or(u32::MAX));
        // Bounds memory with slack: that the window is kept to the byte is the sender's own test.
        if self.held > 2 * WINDOW { Err(WireError::Malformed("window: the replica sent beyond it")) } else { Ok(()) }
    }

    fn fail(&mut self, error: Error) {
        if self.answered {
            self.end = Some(Err(error));
        } else {
            self.answered = true;
            self.outcome = Some(Outcome::Failed(error));
            self.end = Some(Ok(()));
        }
        wake(&mut self.reader);
        wake(&mut self.sender);
    }

    /// Throws away what came; returns the window to give back.
    pub(super) fn discard(&mut self) -> u32 {
        self.chunks.clear();
        self.outcome = None;
        self.consumed = 0;
        if self.end.is_some() { 0 } else { std::mem::take(&mut self.held) }
    }

    /// The link is gone; returns whether nobody waits for this stream.
    pub(super) fn die(&mut self, written: u64) -> bool {
        self.lease = None;
        if self.end.is_none() {
            self.fail(if written >= self.begun_at { Error::Died } else { Error::NotBegun });
        }
        self.fate != Fate::Wanted
    }
}

pub(super) fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

fn fault(fault: Fault, text: &[u8]) -> Error {
    match fault {
        // Nobody reads the answer to a CANCEL of ours: this one is the handler's own.
        Fault::User | Fault::Cancelled => Error::User,
        Fault::Aborted => Error::Aborted,
        // Whose it is and how long it had is known where the request is answered.
        Fault::Deadline => Error::Deadline { request_id: String::new(), seconds: 0.0 },
        _ => Error::Internal(String::from_utf8_lossy(text).into_owned().into()),
    }
}

/// The request's end of a stream; see the module.
pub(super) struct StreamRef {
    shard: Rc<Shard>,
    link: Rc<Link>,
    id: u32,
    /// What its being dropped means before the answer has ended.
    pub(super) unread: Unread,
    /// Who counts an answer that breaks off.
    pub(super) meter: Option<Arc<TargetMeter>>,
}

impl StreamRef {
    pub(super) fn new(shard: Rc<Shard>, link: Rc<Link>, id: u32) -> Self {
        Self { shard, link, id, unread: Unread::Cancelled, meter: None }
    }

    /// A router in Python has chosen the replica.
    pub(super) fn by(self, chosen: Box<Chosen>) -> Self {
        self.link.with(self.id, |stream| stream.aside = Some(Aside::Chosen(chosen)));
        self
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// For the sender of the request's body, which must not keep the stream alive.
    pub(super) fn sender(&self) -> Sender {
        Sender::new(Rc::clone(&self.shard), Rc::clone(&self.link), self.id)
    }

    pub(super) fn poll_outcome(&self, cx: &Context<'_>) -> Poll<Outcome> {
        let outcome = self.link.with(self.id, |stream| {
            let outcome = stream.outcome.take();
            if outcome.is_none() {
                stream.reader = Some(cx.waker().clone());
            }
            outcome
        });
        match outcome {
            Some(Some(outcome)) => Poll::Ready(outcome),
            Some(None) => Poll::Pending,
            // Only a cancelled stream is forgotten while somebody still reads it.
            None => Poll::Ready(Outcome::Failed(Error::Disconnected)),
        }
    }

    /// The next bytes of the response's body; the ones before count as consumed.
    pub(super) fn poll_chunk(&self, cx: &Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        let next = self.link.with(self.id, |stream| match (stream.chunks.pop_front(), &stream.end) {
            (Some(chunk), _) => Poll::Ready(Some(Ok(chunk))),
            (None, Some(Ok(()))) => Poll::Ready(None),
            (None, Some(Err(error))) => Poll::Ready(Some(Err(error.clone()))),
            (None, None) if stream.fate == Fate::Cancelled => Poll::Ready(Some(Err(Error::Disconnected))),
            (None, None) => {
                stream.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        });
        // Only a cancelled stream is forgotten while somebody still reads it.
        let next = next.unwrap_or(Poll::Ready(Some(Err(Error::Disconnected))));
        if let Poll::Ready(Some(Ok(chunk))) = &next {
            self.consumed(chunk.len());
        }
        next
    }

    /// Gives window back in large steps.
    pub(super) fn consumed(&self, len: usize) {
        let window = self.link.with(self.id, |stream| {
            stream.consumed = stream.consumed.saturating_add(len as u32);
            if stream.consumed < WINDOW_STEP || stream.end.is_some() {
                return 0;
            }
            stream.held = stream.held.saturating_sub(stream.consumed);
            std::mem::take(&mut stream.consumed)
        });
        match window {
            None | Some(0) => {}
            Some(window) => self.link.signal(Header::new(Kind::Window, self.id).aux(window)),
        }
    }

    /// The answer has broken off.
    pub(super) fn broke(&mut self, error: &Error) {
        if let Some(meter) = self.meter.take()
            && error.blame() != Blame::Client
        {
            meter.errors.up();
        }
    }

    /// Whether the whole answer has come and been taken.
    pub(super) fn is_over(&self) -> bool {
        let over = |stream: &mut Stream| stream.chunks.is_empty() && matches!(stream.end, Some(Ok(())));
        self.link.with(self.id, over).unwrap_or(false)
    }
}

impl Drop for StreamRef {
    fn drop(&mut self) {
        if self.unread == Unread::Cancelled {
            self.sender().cancel();
            if self.link.with(self.id, |stream| stream.end.is_some()) == Some(true) {
                self.link.remove(&self.shard, self.id);
            }
        } else {
            let told = if self.unread == Unread::Told { flag::LEFT } else { 0 };
            let answered = self.unread == Unread::Answered;
            let window = self.link.with(self.id, |stream| {
                stream.fate = if answered { Fate::Answered } else { Fate::Unwanted };
                let window = stream.discard();
                (stream.end.is_some(), if answered { 0 } else { window })
            });
            match window {
                Some((true, _)) | None => self.link.remove(&self.shard, self.id),
                Some((false, 0)) if told == 0 => {}
                Some((false, window)) => self.link.signal(Header::new(Kind::Window, self.id).with(told).aux(window)),
            }
        }
    }
}
