//! One request at the replica: where it stands, its body on the way in, its answer on the way out.
//!
//! Everything is behind one lock that is held for moments only. What must be done to Python when a state changes, such
//! as resolving a future that user code awaits, is handed out and done by the caller after the lock is gone.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use rayserve_dataplane::wire::head::put_response_head;
use rayserve_dataplane::wire::{Header, Kind, MAX_CHUNK, WINDOW, flag, frame};

use super::items::Items;
use super::link::{Link, lock};
use super::step::Started;

/// Futures to resolve once no lock is held.
pub(crate) type Woken = Vec<Py<PyAny>>;

/// Consumed body bytes are credited to the sender in steps of half the window: it can send the other half meanwhile.
const CREDIT_STEP: u32 = WINDOW / 2;

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
    state: Mutex<State>,
}

pub(crate) struct State {
    pub(crate) inbox: Inbox,
    pub(crate) outbox: Outbox,
    pub(crate) items: Items,
    pub(crate) answer: Answer,
    /// The caller has lost interest: CANCEL, or the link is gone.
    pub(crate) cancelled: bool,
    pub(crate) began: Option<Instant>,
    /// The slot is given back.
    pub(crate) released: bool,
    /// The only strong reference to the task while it is suspended: the loop keeps a weak one.
    pub(crate) task: Option<Started>,
}

/// The request's body.
#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) chunks: VecDeque<Bytes>,
    pub(crate) fin: bool,
    /// The application has been given some of it.
    pub(crate) begun: bool,
    /// The application has been given the last of it.
    pub(crate) taken: bool,
    unread: u32,
    uncredited: u32,
    /// The futures of those `receive()` that wait, the first one last.
    pub(crate) readers: Vec<Py<PyAny>>,
}

/// The response's head until it is sent, and body bytes that wait for the window or their turn.
pub(crate) struct Outbox {
    pub(crate) head: Option<Head>,
    body: VecDeque<(PyBackedBytes, usize)>,
    fin: bool,
    window: u32,
    /// The stream waits in the link's turns.
    queued: bool,
    /// The future of a `send()` that waits.
    pub(crate) writer: Option<Py<PyAny>>,
    pub(crate) pace: Pace,
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
}

impl Stream {
    pub(crate) fn new(link: Arc<Link>, id: u32) -> Self {
        let outbox = Outbox {
            head: None,
            body: VecDeque::new(),
            fin: false,
            window: WINDOW,
            queued: false,
            writer: None,
            pace: Pace::default(),
        };
        let state = State {
            inbox: Inbox::default(),
            outbox,
            items: Items::default(),
            answer: Answer::Nothing,
            cancelled: false,
            began: None,
            released: false,
            task: None,
        };
        Self { link, id, state: Mutex::new(state) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The answer is complete: the stream's id may come again.
    pub(crate) fn close(&self) {
        self.state().answer = Answer::Complete;
        self.link.remove(self.id);
    }

    /// The inline body of a REQUEST with FIN.
    pub(crate) fn fill(&self, body: Bytes) {
        let mut state = self.state();
        state.inbox.fin = true;
        if !body.is_empty() {
            state.inbox.chunks.push_back(body);
        }
    }

    /// A BODY frame; `false`: the sender has exceeded its window.
    pub(crate) fn body(&self, chunk: Bytes, fin: bool) -> bool {
        let mut state = self.state();
        let inbox = &mut state.inbox;
        inbox.unread += chunk.len() as u32;
        if inbox.fin || inbox.unread + inbox.uncredited > WINDOW {
            return false;
        }
        inbox.fin = fin;
        if !chunk.is_empty() {
            inbox.chunks.push_back(chunk);
        }
        true
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

    /// Puts the head and at most one chunk.
    pub(crate) fn put_chunk(&self, out: &mut BytesMut, woken: &mut Woken) -> Turn {
        let mut state = self.state();
        let outbox = &mut state.outbox;
        outbox.put_head(self.id, out);
        let limit = MAX_CHUNK.min(outbox.window as usize);
        let chunk = self.link.outgoing.stamp(Header::new(Kind::Chunk, self.id), 1);
        // Small pieces share a frame.
        let start = out.len();
        frame::put_with(out, chunk, |out| {
            let mut room = limit;
            while let Some((piece, at)) = outbox.body.front_mut() {
                let take = room.min(piece.len() - *at);
                out.extend_from_slice(&piece[*at..*at + take]);
                (*at, room) = (*at + take, room - take);
                if *at < piece.len() {
                    break;
                }
                outbox.body.pop_front();
            }
            outbox.window -= (limit - room) as u32;
        });
        let last = outbox.fin && outbox.body.is_empty();
        if last {
            out[start + 5] |= flag::FIN;
        } else if out.len() == start + frame::HEADER_LEN {
            out.truncate(start);
        }
        if outbox.body.is_empty() {
            woken.extend(outbox.writer.take());
        }
        outbox.queued = !outbox.body.is_empty() && outbox.window > 0;
        if last {
            Turn::Last
        } else if outbox.queued {
            Turn::Again
        } else {
            Turn::Wait
        }
    }
}

impl Inbox {
    /// Takes what has come; the second value is the credit to send.
    pub(crate) fn take(&mut self) -> (VecDeque<Bytes>, u32) {
        self.uncredited += std::mem::take(&mut self.unread);
        (self.begun, self.taken) = (true, self.fin);
        let credit = if !self.fin && self.uncredited >= CREDIT_STEP { std::mem::take(&mut self.uncredited) } else { 0 };
        (std::mem::take(&mut self.chunks), credit)
    }
}

impl Outbox {
    /// Takes body bytes in; whether the stream has to be given turns.
    pub(crate) fn push(&mut self, piece: PyBackedBytes, fin: bool) -> bool {
        self.fin |= fin;
        if !piece.is_empty() {
            self.body.push_back((piece, 0));
        }
        self.wants_turn()
    }

    /// Whether body bytes wait for the window or their turn.
    pub(crate) fn is_full(&self) -> bool {
        !self.body.is_empty()
    }

    /// Forgets what was not sent; the answer ends with another frame.
    pub(crate) fn clear(&mut self) {
        self.head = None;
        self.body.clear();
        self.fin = false;
    }

    fn wants_turn(&mut self) -> bool {
        let wants = !self.queued
            && (self.fin || self.head.is_some() || !self.body.is_empty())
            && (self.body.is_empty() || self.window > 0);
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
