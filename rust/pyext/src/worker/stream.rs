//! One request at the replica: where it stands, its body on the way in, its answer on the way out.
//!
//! Everything is behind one lock that is held for moments only. What must be done to Python when a state changes, such
//! as resolving a future that user code awaits, is handed out and done by the caller after the lock is gone.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use rayserve_dataplane::wire::head::put_response_head;
use rayserve_dataplane::wire::spool::{LISTED, Spool};
use rayserve_dataplane::wire::{Header, Kind, LARGE, MAX_CHUNK, MAX_WHOLE, PIECE, Payload, WINDOW, flag, frame};

use super::batch::Slot;
use super::inbox::Inbox;
use super::items::Items;
use super::link::Link;
use super::step::Started;
use crate::client::children::Children;
use crate::lock::lock;

/// Futures to resolve once no lock is held.
pub(crate) type Woken = Vec<Py<PyAny>>;

/// A stream that never has to wait is made to after so much of either.
const STEADY_BYTES: usize = 64 * 1024;
const STEADY_TIME: Duration = Duration::from_millis(1);
/// An application waits while so many of its bytes have not been put into the link's buffer.
const FULL: usize = 64 * 1024;

/// How far the answer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    Nothing,
    /// The application has given the head.
    Headed,
    /// The application has given its last byte, or the stream was ended for it.
    Complete,
}

/// What a stream wants after it has put a chunk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// There is more to put.
    Again,
    /// More comes from the application, or when the window opens.
    Wait,
    /// That was the last frame.
    Last,
}

pub(crate) struct Stream {
    pub(crate) link: Arc<Link>,
    pub(crate) id: u32,
    /// A handle call with one answer.
    pub(super) unary: bool,
    state: Mutex<State>,
}

pub(crate) struct State {
    pub(crate) inbox: Inbox,
    pub(crate) outbox: Outbox,
    pub(crate) items: Items,
    pub(crate) children: Children,
    pub(crate) answer: Answer,
    /// The caller has lost interest: CANCEL, or the link is gone and the request does not go on without.
    pub(crate) cancelled: bool,
    /// The client has left a request that goes on.
    pub(crate) left: bool,
    pub(crate) began: Option<Instant>,
    /// The slot is given back.
    pub(crate) released: bool,
    /// Whom it shares the slot with.
    pub(crate) slot: Option<Arc<Slot>>,
    /// The only strong reference to the task while it is suspended: the loop keeps a weak one.
    pub(crate) task: Option<Suspended>,
}

/// A handler's task, or that of the response it returned.
pub(crate) struct Suspended {
    pub(crate) started: Started,
    /// It speaks ASGI.
    pub(crate) asgi: bool,
}

/// The response's head until it is sent, and body bytes that wait for the window or their turn.
pub(crate) struct Outbox {
    pub(crate) head: Option<Head>,
    body: Spool,
    fin: bool,
    /// Values of a call that wait for their turn.
    values: VecDeque<Waiting>,
    window: u32,
    /// The stream waits in the link's turns.
    queued: bool,
    /// The future of a `send()` that waits.
    pub(crate) writer: Option<Py<PyAny>>,
    pub(crate) pace: Pace,
}

/// A frame with a value that waits for its stream's turn.
struct Waiting {
    header: Header,
    payload: Spool,
    /// Bytes of all of it.
    total: usize,
}

/// A response head that is not sent yet.
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(PyBackedBytes, PyBackedBytes)>,
}

/// What a stream has sent since the loop last went round.
#[derive(Default)]
pub(crate) struct Pace {
    pub(crate) turn: u64,
    pub(crate) bytes: usize,
    pub(crate) since: Option<Instant>,
    /// When the last piece came.
    pub(crate) last: Option<Instant>,
}

impl Pace {
    /// Whether the stream should let others run, now that it has sent `len` bytes more.
    pub(crate) fn is_breathless(&mut self, turn: u64, len: usize, now: Instant) -> bool {
        let since = match self.since {
            Some(since) if self.turn == turn => since,
            _ => {
                *self = Self { turn, bytes: 0, since: Some(now), ..*self };
                now
            }
        };
        self.bytes += len;
        let long = self.bytes >= STEADY_BYTES || now - since >= STEADY_TIME;
        if long {
            self.since = None;
        }
        long
    }
}

impl Stream {
    pub(crate) fn new(link: Arc<Link>, id: u32, unary: bool) -> Self {
        let outbox = Outbox {
            head: None,
            body: Spool::default(),
            fin: false,
            values: VecDeque::new(),
            window: WINDOW,
            queued: false,
            writer: None,
            pace: Pace::default(),
        };
        let state = State {
            inbox: Inbox::default(),
            outbox,
            items: Items::default(),
            children: Children::default(),
            answer: Answer::Nothing,
            cancelled: false,
            left: false,
            began: None,
            released: false,
            slot: None,
            task: None,
        };
        Self { link, id, unary, state: Mutex::new(state) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// It is about to run: whether it has been cancelled, and whether its time is over.
    pub(crate) fn begin(&self) -> (bool, bool) {
        let (mut state, now) = (self.state(), Instant::now());
        state.began = Some(now);
        (state.cancelled, state.children.deadline.is_some_and(|deadline| deadline <= now))
    }

    /// The answer is complete: the stream's id may come again.
    pub(crate) fn close(&self) {
        self.state().answer = Answer::Complete;
        self.link.remove(self.id);
    }

    /// A WINDOW frame; whether the stream has to be given turns again.
    pub(crate) fn widen(&self, bytes: u32) -> bool {
        let mut state = self.state();
        let outbox = &mut state.outbox;
        outbox.window = outbox.window.saturating_add(bytes).min(WINDOW);
        outbox.wants_turn()
    }

    /// Whether the head is given and nobody has sent it; the stream then needs a turn.
    pub(crate) fn wants_head(&self) -> bool {
        let mut state = self.state();
        state.outbox.head.is_some() && state.outbox.wants_turn()
    }

    /// Sends a frame of a call. A large value waits for the stream's turn, so that small ones of other streams go first, and
    /// what comes behind it waits with it.
    pub(crate) fn put_value(self: &Arc<Self>, header: Header, payload: &Payload) {
        let mut state = self.state();
        let outbox = &mut state.outbox;
        if payload.len() < LARGE && outbox.values.is_empty() {
            drop(state);
            return self.link.put_value(self.stamped(header, 1), payload);
        }
        let mut waiting = Waiting { header, payload: Spool::default(), total: payload.len() };
        payload.parts().iter().for_each(|part| waiting.payload.push(part.clone()));
        outbox.values.push_back(waiting);
        let queued = std::mem::replace(&mut outbox.queued, true);
        drop(state);
        if !queued {
            self.link.enqueue(self);
        }
    }

    /// The last frame says what is left to do.
    fn stamped(&self, header: Header, own: u16) -> Header {
        if header.has(flag::FIN) { self.link.outgoing.stamp(header, own) } else { header }
    }

    /// Puts the head and at most one chunk, or a value or a piece of one.
    pub(crate) fn put_chunk(&self, out: &mut Spool, woken: &mut Woken) -> Turn {
        let mut state = self.state();
        let outbox = &mut state.outbox;
        if !outbox.values.is_empty() {
            return outbox.put_value(self, out);
        }
        outbox.put_head(self.id, out.tail());
        let len = outbox.body.remaining().min(MAX_CHUNK).min(outbox.window as usize);
        let last = outbox.fin && len == outbox.body.remaining();
        if len > 0 || last {
            let header = Header::new(Kind::Chunk, self.id).with(if last { flag::FIN } else { 0 });
            out.put(self.link.outgoing.stamp(header, 1), &mut outbox.body, len);
            outbox.window -= len as u32;
        }
        if !outbox.is_full() {
            woken.extend(outbox.writer.take());
        }
        outbox.queued = outbox.has_body() && outbox.window > 0;
        if last {
            Turn::Last
        } else if outbox.queued {
            Turn::Again
        } else {
            Turn::Wait
        }
    }
}

impl Outbox {
    /// Takes body bytes in; whether the stream has to be given turns.
    pub(crate) fn push(&mut self, piece: PyBackedBytes, fin: bool) -> bool {
        self.fin |= fin;
        if piece.len() < LISTED {
            self.body.tail().put_slice(&piece);
        } else {
            self.body.push(Bytes::from_owner(piece));
        }
        self.wants_turn()
    }

    /// Whether body bytes wait for the window or their turn.
    pub(crate) fn has_body(&self) -> bool {
        self.body.has_remaining()
    }

    /// Whether so many do that the application has to wait.
    pub(crate) fn is_full(&self) -> bool {
        self.body.remaining() >= FULL
    }

    /// Forgets what was not sent; the answer ends with another frame.
    pub(crate) fn clear(&mut self) {
        self.head = None;
        self.body.clear();
        self.fin = false;
    }

    /// Forgets values that wait: their caller has lost interest.
    pub(crate) fn clear_values(&mut self) {
        self.values.clear();
    }

    fn put_value(&mut self, stream: &Stream, out: &mut Spool) -> Turn {
        if let Some(Waiting { header, payload, total }) = self.values.front_mut() {
            // An ERROR is never in pieces: it takes the place of what pieces have begun.
            let left = payload.remaining();
            if left > MAX_WHOLE && header.kind != Kind::Error {
                out.put(Header::new(Kind::Piece, stream.id).aux(*total as u32), payload, PIECE);
                return Turn::Again;
            }
            out.put(stream.stamped(*header, 0), payload, left);
            self.values.pop_front();
        }
        self.queued = !self.values.is_empty();
        if self.queued { Turn::Again } else { Turn::Wait }
    }

    fn wants_turn(&mut self) -> bool {
        let wants = !self.queued
            && (self.fin || self.head.is_some() || self.has_body())
            && (!self.has_body() || self.window > 0);
        self.queued |= wants;
        wants
    }

    fn put_head(&mut self, id: u32, out: &mut BytesMut) {
        let Some(head) = self.head.take() else { return };
        let header = Header::new(Kind::Response, id).aux(head.status.into());
        frame::put_with(out, header, |out| put_response_head(out, pairs(&head.headers)));
    }
}

/// The headers as the wire takes them.
pub(crate) fn pairs(headers: &[(PyBackedBytes, PyBackedBytes)]) -> impl Iterator<Item = (&[u8], &[u8])> + Clone {
    headers.iter().map(|(name, value)| (&**name, &**value))
}
