//! Who moves the bytes: one thread at a time, and preferably one that waits for an answer.
//!
//! A thread in `.result()` takes the turn if nobody has it: it polls all links, and what comes for others ends their calls
//! and wakes them. A lone caller so needs no second thread and no wake. Threads that find the turn taken sleep until their
//! call has ended or the turn is free. Calls that nobody waits for are the tender's (`tender.rs`), which steps back as soon
//! as somebody wants the turn.
//!
//! The lock is held for bookkeeping and for system calls that do not wait. Whoever waits holds no lock but the turn, and
//! never the interpreter.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind},
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, Weak},
    thread::{self, Thread},
    time::Instant,
};

use bytes::Bytes;
use mio::{Events, Poll, Token, Waker};
use rayserve_dataplane::request_id::RequestIds;

use super::{mailbox::Mailbox, pending::Pending, router::Router, tender::TenderState};
use crate::lock::lock;
use crate::worker::replica::Replica;

const WAKER: Token = Token(usize::MAX);
/// More than a process has links with news at once: a loop is told of them only once.
const EVENTS: usize = 1024;

/// Who has the turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Free,
    Waiter,
    /// It gives the turn back as soon as `wanted` is set.
    Tender,
}

pub(crate) struct State {
    pub(super) router: Router,
    pub(super) turn: Turn,
    /// When whoever has the turn looks next, by itself or as it was told; none: when something comes.
    pub(super) until: Option<Instant>,
    /// Turns taken, so that the tender sees whether anybody is about.
    pub(super) turns: u64,
    /// Threads that wait for the turn or for their call.
    asleep: Vec<Thread>,
    /// Loops that found the turn taken when something had come: their poller does not tell them again.
    missed: Vec<Arc<Mailbox>>,
    /// One of them has been woken to take the turn and has not run yet.
    heir: bool,
    /// The tender is to give the turn back.
    pub(super) wanted: bool,
    pub(super) closed: bool,
    pub(super) tender: TenderState,
}

/// Why a wait came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// The call has ended.
    Done,
    /// The time is over.
    Timeout,
    /// A signal may have come; look, and wait again.
    Interrupted,
}

/// All the calls of one process.
pub(crate) struct Caller {
    state: Mutex<State>,
    /// Locked by whoever has the turn.
    poll: Mutex<(Poll, Events)>,
    fd: RawFd,
    waker: Waker,
    pub(super) tender: Condvar,
    /// The replica whose loop flushes what it calls.
    pub(super) home: Mutex<Weak<Replica>>,
    pub(super) ids: Mutex<RequestIds>,
}

impl Caller {
    pub(super) fn new(node_id: String, token: &[u8]) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKER)?;
        let router = Router::new(node_id, token.into(), poll.registry().try_clone()?);
        let state = State {
            router,
            turn: Turn::Free,
            until: None,
            turns: 0,
            asleep: Vec::new(),
            missed: Vec::new(),
            heir: false,
            wanted: false,
            closed: false,
            tender: TenderState::default(),
        };
        let fd = poll.as_raw_fd();
        let poll = Mutex::new((poll, Events::with_capacity(EVENTS)));
        Ok(Self {
            state: Mutex::new(state),
            poll,
            fd,
            waker,
            tender: Condvar::new(),
            home: Mutex::default(),
            ids: Mutex::default(),
        })
    }

    /// The replica on whose loop this is, if its worker moves the bytes.
    pub(super) fn home(&self) -> Option<Arc<Replica>> {
        let home = lock(&self.home);
        home.upgrade().filter(|replica| replica.on_loop())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Starts a call; `false` when the caller is closed. With `cork`, somebody calls [`Self::flush`] soon, or else the tender.
    pub(super) fn begin(&self, call: &Arc<Pending>, cork: bool) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        state.router.begin(call, cork);
        if cork && state.tender.cork() {
            self.look_out(&state);
        }
        if state.has_errand() {
            self.summon(&mut state);
        }
        if std::mem::take(&mut state.tender.sleeps) {
            self.tender.notify_one();
        }
        self.remind(&mut state);
        true
    }

    /// Sends what was corked.
    pub(crate) fn flush(&self) {
        let mut state = self.lock();
        state.tender.uncork();
        state.router.settle();
        self.remind(&mut state);
    }

    pub(super) fn cancel(&self, call: &Arc<Pending>) -> bool {
        let mut state = self.lock();
        let cancelled = state.router.cancel(call);
        self.remind(&mut state);
        self.nudge(&state);
        cancelled
    }

    /// The tender steps back: for somebody who waits, or for an errand.
    pub(super) fn relieve(&self, state: &mut State) {
        if state.turn == Turn::Tender && !std::mem::replace(&mut state.wanted, true) {
            self.nudge(state);
        }
    }

    /// Whoever has the turn looks again: its own call may have ended without a byte being read.
    pub(super) fn nudge(&self, state: &State) {
        if state.turn != Turn::Free {
            // An error would mean that the counter is full, and so that the poller wakes anyway.
            let _ = self.waker.wake();
        }
    }

    /// Waits for a call with this thread doing the reading if nobody else does.
    pub(super) fn wait(&self, call: &Arc<Pending>, until: Option<Instant>) -> Wait {
        let me = thread::current();
        let mut state = self.lock();
        state.attend(call, || call.wake_thread(me.clone()));
        let result = loop {
            if call.is_ready() {
                break Wait::Done;
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                break Wait::Timeout;
            }
            if state.turn == Turn::Free {
                let interrupted;
                (state, interrupted) = self.lead(state, Turn::Waiter, until, |_| call.is_ready());
                if interrupted && !call.is_ready() {
                    break Wait::Interrupted;
                }
            } else {
                self.relieve(&mut state);
                state.asleep.push(me.clone());
                drop(state);
                match until {
                    Some(until) => thread::park_timeout(until.saturating_duration_since(Instant::now())),
                    None => thread::park(),
                }
                state = self.lock();
                match state.asleep.iter().position(|other| other.id() == me.id()) {
                    Some(index) => drop(state.asleep.swap_remove(index)),
                    None => state.heir = false,
                }
            }
        };
        state.unattend(call, || call.forget_thread(&me));
        state.pass_on();
        result
    }

    /// Has the turn, for one poll at least, until `enough` says so, the time is over or a signal came.
    pub(super) fn lead<'s>(
        &'s self,
        state: MutexGuard<'s, State>,
        who: Turn,
        until: Option<Instant>,
        enough: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'s, State>, bool) {
        let _turn = HasTurn(self);
        let mut state = state; // declared after the guard, so that a panic lets go of the lock first
        state.turn = who;
        state.turns += 1;
        let mut turn = lock(&self.poll);
        let (poll, events) = &mut *turn;
        let interrupted = loop {
            let now = Instant::now();
            let look = state.next_look(who, now);
            let next = state.router.tick(now).into_iter().chain(until).chain(look).min();
            state.until = next;
            drop(state);
            let timeout = next.map(|at| at.saturating_duration_since(now));
            let polled = poll.poll(events, timeout);
            state = self.lock();
            if polled.is_err_and(|error| error.kind() == ErrorKind::Interrupted) {
                break true;
            }
            for event in events.iter().filter(|event| event.token() != WAKER) {
                state.router.ready(event);
            }
            state.look_as(who);
            if !state.router.held.fresh.is_empty() {
                self.summon(&mut state); // calls have come back unbegun
            }
            if enough(&state) || state.closed || until.is_some_and(|until| until <= Instant::now()) {
                break false;
            }
        };
        state.free_turn();
        self.remind(&mut state);
        (state, interrupted)
    }

    /// Whether a thread has the turn, which reads for everybody.
    pub(crate) fn is_read(&self) -> bool {
        self.lock().turn == Turn::Waiter
    }

    /// Moves what can be moved now, for an asyncio loop that was told that something is there.
    pub(crate) fn pump(&self, mailbox: &Arc<Mailbox>) {
        let mut state = self.lock();
        if state.turn == Turn::Free {
            mailbox.polling();
            drop(self.lead(state, Turn::Waiter, Some(Instant::now()), |_| true));
        } else if !state.missed.iter().any(|known| Arc::ptr_eq(known, mailbox)) {
            state.missed.push(Arc::clone(mailbox));
        }
    }

    /// Somebody awaits the call in an asyncio loop.
    pub(super) fn notify(&self, call: &Arc<Pending>, mailbox: &Arc<Mailbox>, token: u64) -> bool {
        let mut state = self.lock();
        if call.is_ready() {
            return false;
        }
        state.attend(call, || call.notify(Arc::clone(mailbox), token));
        self.relieve(&mut state);
        true
    }

    /// The same for somebody who takes nothing from it and wants to know when it has ended: whoever else waits reads.
    pub(super) fn notify_of_end(&self, call: &Arc<Pending>, mailbox: &Arc<Mailbox>, token: u64) -> bool {
        let _state = self.lock();
        let goes_on = call.outcome().is_none();
        if goes_on {
            call.notify_of_end(Arc::clone(mailbox), token);
        }
        goes_on
    }

    /// The loop does not wait any more.
    pub(super) fn forget(&self, call: &Arc<Pending>, token: u64) {
        self.lock().unattend(call, || call.forget_mailbox(token));
    }

    /// Takes the items of a streaming call that have come, and lets the replica send more.
    pub(super) fn take_items(&self, call: &Pending) -> VecDeque<Bytes> {
        let (items, credit) = call.take_items();
        self.credit(call, credit);
        items
    }

    /// Nobody will take the items of this call.
    pub(super) fn drop_items(&self, call: &Pending) {
        self.credit(call, call.drop_items());
    }

    fn credit(&self, call: &Pending, bytes: u32) {
        if bytes > 0 {
            self.lock().router.credit(call, bytes);
        }
    }

    /// Sends what is corked, then ends every call and every wait; later calls are refused. No call is cancelled.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.router.settle();
        state.closed = true;
        state.router.close_all();
        state.tender.sleeps = false;
        self.tender.notify_all();
        let _ = self.waker.wake();
    }

    /// In a forked child: gives up the parent's sockets without a word to their peers.
    pub(super) fn abandon(&self) {
        // Another thread of the parent may have held the lock at the fork; then the copies stay, as nothing is safe.
        if let Ok(mut state) = self.state.try_lock() {
            state.closed = true;
            state.router.abandon();
        }
    }

    pub(super) fn counters(&self) -> [(&'static str, u64); 4] {
        let state = self.lock();
        let router = &state.router;
        [
            ("calls", router.calls),
            ("outstanding", router.outstanding as u64),
            ("attended", router.attended as u64),
            ("links", router.links() as u64),
        ]
    }
}

/// Readable when a turn would find something to do; for an asyncio loop.
impl AsRawFd for Caller {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

/// A panic while somebody has the turn costs that one its call, not everybody else the turn.
struct HasTurn<'c>(&'c Caller);

impl Drop for HasTurn<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lock().free_turn();
        }
    }
}

impl State {
    fn free_turn(&mut self) {
        self.turn = Turn::Free;
        self.wanted = false;
        self.missed.drain(..).for_each(|mailbox| mailbox.call());
        self.pass_on();
    }

    /// Somebody else may take the turn.
    fn pass_on(&mut self) {
        if self.turn == Turn::Free
            && !self.heir
            && let Some(next) = self.asleep.pop()
        {
            self.heir = true;
            next.unpark();
        }
    }

    /// Counts a call as attended from its first waiter on.
    fn attend(&mut self, call: &Pending, add: impl FnOnce()) {
        if !call.is_ready() {
            self.router.attended += usize::from(!call.attended());
            add();
        }
    }

    fn unattend(&mut self, call: &Pending, remove: impl FnOnce()) {
        if !call.is_ready() {
            let before = call.attended();
            remove();
            self.router.attended -= usize::from(before && !call.attended());
        }
    }
}
