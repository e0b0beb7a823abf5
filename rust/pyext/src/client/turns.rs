//! Who moves the bytes: one thread at a time, and preferably one that waits for an answer.
//!
//! A thread in `.result()` takes the turn if nobody has it: it polls all links, and what comes for others ends their calls
//! and wakes them. A lone caller so needs no second thread and no wake. Threads that find the turn taken sleep until their
//! call has ended or the turn is free. Calls that nobody waits for are the tender's: a thread that steps in when nobody has
//! taken the turn for a while, and steps back as soon as somebody wants it.
//!
//! The lock is held for bookkeeping and for system calls that do not wait. Whoever waits holds no lock but the turn, and
//! never the interpreter.

use std::{
    io::{self, ErrorKind},
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token, Waker};
use rayserve_dataplane::snapshot::Snapshot;

use super::{
    mailbox::Mailbox,
    pending::Pending,
    router::{Hunger, Router},
};

const WAKER: Token = Token(usize::MAX);
/// How long a call that nobody waits for may find the turn free before the tender takes it.
const PATIENCE: Duration = Duration::from_millis(10);
/// The tender's rounds without anything to do before it sleeps until it is called.
const IDLE_ROUNDS: u32 = 100;
/// A snapshot older than this is asked for again while calls are made.
const FRESH: Duration = Duration::from_secs(2);
/// Between two snapshots at least; doubled while they bring nothing new.
const REFRESH: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Who has the turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Free,
    Waiter,
    /// It gives the turn back as soon as `wanted` is set.
    Tender,
}

struct State {
    router: Router,
    turn: Turn,
    /// Turns taken, so that the tender sees whether anybody is about.
    turns: u64,
    /// Threads that wait for the turn or for their call.
    asleep: Vec<Thread>,
    tender_sleeps: bool,
    wanted: bool,
    refreshed: Option<Instant>,
    pause: Duration,
    closed: bool,
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

/// What the tender came back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Errand {
    /// Fetch a snapshot and publish it.
    Snapshot,
    /// The caller is closed.
    Closed,
}

/// All the calls of one process.
pub(super) struct Caller {
    state: Mutex<State>,
    /// Locked by whoever has the turn.
    poll: Mutex<(Poll, Events)>,
    fd: RawFd,
    waker: Waker,
    tender: Condvar,
}

impl Caller {
    pub(super) fn new(node_id: String, token: &[u8]) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKER)?;
        let router = Router::new(node_id, token.into(), poll.registry().try_clone()?);
        let state = State {
            router,
            turn: Turn::Free,
            turns: 0,
            asleep: Vec::new(),
            tender_sleeps: false,
            wanted: false,
            refreshed: None,
            pause: REFRESH.0,
            closed: false,
        };
        let fd = poll.as_raw_fd();
        let poll = Mutex::new((poll, Events::with_capacity(64)));
        Ok(Self { state: Mutex::new(state), poll, fd, waker, tender: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when a turn would find something to do; for an asyncio loop.
    pub(super) fn fd(&self) -> RawFd {
        self.fd
    }

    /// Starts a call; `false` when the caller is closed.
    pub(super) fn begin(&self, call: &Arc<Pending>) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        state.router.begin(call);
        let old = state.refreshed.is_none_or(|at| at.elapsed() > FRESH);
        state.router.stale |= old;
        self.call_tender(&mut state);
        true
    }

    fn call_tender(&self, state: &mut State) {
        if std::mem::take(&mut state.tender_sleeps) {
            self.tender.notify_one();
        }
    }

    pub(super) fn cancel(&self, call: &Arc<Pending>) -> bool {
        self.lock().router.cancel(call)
    }

    /// The tender steps back for somebody who waits.
    fn relieve(&self, state: &mut State) {
        if state.turn == Turn::Tender && !std::mem::replace(&mut state.wanted, true) {
            // An error would mean that the counter is full, and so that the poller wakes anyway.
            let _ = self.waker.wake();
        }
    }

    /// Takes over what an errand for a snapshot brought.
    pub(super) fn publish(&self, snapshot: Snapshot) -> bool {
        let mut state = self.lock();
        let newer = state.router.publish(snapshot);
        state.pause = if newer { REFRESH.0 } else { (state.pause * 2).min(REFRESH.1) };
        newer
    }

    /// An errand for a snapshot failed; calls that need one to be sent at all fail with it.
    pub(super) fn unpublished(&self, why: &str) {
        let mut state = self.lock();
        state.pause = (state.pause * 2).min(REFRESH.1);
        state.router.refuse_unrouted(why);
    }

    /// Waits for a call with this thread doing the reading if nobody else does.
    pub(super) fn wait(&self, call: &Arc<Pending>, until: Option<Instant>) -> Wait {
        let me = thread::current();
        let mut state = self.lock();
        state.attend(call, || call.wake_thread(me.clone()));
        let result = loop {
            if call.outcome().is_some() {
                break Wait::Done;
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                break Wait::Timeout;
            }
            if state.turn == Turn::Free {
                let interrupted;
                (state, interrupted) = self.lead(state, Turn::Waiter, until, |_| call.outcome().is_some());
                if interrupted && call.outcome().is_none() {
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
                state.asleep.retain(|other| other.id() != me.id());
            }
        };
        state.unattend(call, || call.forget_thread(&me));
        state.pass_on();
        result
    }

    /// Has the turn, for one poll at least, until `enough` says so, the time is over or a signal came.
    fn lead<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        who: Turn,
        until: Option<Instant>,
        enough: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'s, State>, bool) {
        state.turn = who;
        state.turns += 1;
        let mut turn = self.poll.lock().unwrap_or_else(PoisonError::into_inner);
        let (poll, events) = &mut *turn;
        let interrupted = loop {
            let now = Instant::now();
            let next = state.router.tick(now);
            drop(state);
            let timeout = [next, until].into_iter().flatten().min().map(|at| at.saturating_duration_since(now));
            let polled = poll.poll(events, timeout);
            state = self.lock();
            if polled.is_err_and(|error| error.kind() == ErrorKind::Interrupted) {
                break true;
            }
            for event in events.iter().filter(|event| event.token() != WAKER) {
                let readable = event.is_readable() || event.is_read_closed() || event.is_error();
                state.router.ready(event.token().0, readable, event.is_writable());
            }
            if enough(&state) || state.closed || until.is_some_and(|until| until <= Instant::now()) {
                break false;
            }
        };
        state.turn = Turn::Free;
        state.wanted = false;
        state.pass_on();
        (state, interrupted)
    }

    /// Moves what can be moved now, for an asyncio loop that was told that something is there.
    pub(super) fn pump(&self, mailbox: &Mailbox) {
        let state = self.lock();
        if state.turn == Turn::Free {
            mailbox.polling();
            drop(self.lead(state, Turn::Waiter, Some(Instant::now()), |_| true));
        }
    }

    /// Somebody awaits the call in an asyncio loop.
    pub(super) fn notify(&self, call: &Arc<Pending>, mailbox: &Arc<Mailbox>, token: u64) -> bool {
        let mut state = self.lock();
        if call.outcome().is_some() {
            return false;
        }
        state.attend(call, || call.notify(Arc::clone(mailbox), token));
        self.relieve(&mut state);
        true
    }

    /// The loop does not wait any more.
    pub(super) fn forget(&self, call: &Arc<Pending>, token: u64) {
        self.lock().unattend(call, || call.forget_mailbox(token));
    }

    /// The tender's thread: looks after calls that nobody waits for, and comes back with errands.
    pub(super) fn tend(&self) -> Errand {
        let mut state = self.lock();
        let (mut turns, mut idle) = (state.turns, 0);
        loop {
            if state.closed {
                return Errand::Closed;
            }
            let age = state.refreshed.map_or(Duration::MAX, |at| at.elapsed());
            let stale = state.router.stale
                || match state.router.starves() {
                    Some(Hunger::Replica) => true,
                    Some(Hunger::Room) => age > FRESH,
                    None => false,
                };
            if stale && age >= state.pause {
                state.refreshed = Some(Instant::now());
                return Errand::Snapshot;
            }
            if state.turn == Turn::Free {
                let lonely = state.router.outstanding > state.router.attended;
                if lonely && turns == state.turns && idle > 0 {
                    let until = stale.then(|| Instant::now() + state.pause);
                    (state, _) = self.lead(state, Turn::Tender, until, |state| {
                        let State { router, wanted, .. } = state;
                        *wanted || router.outstanding == router.attended || (router.stale && !stale)
                    });
                } else {
                    // An asyncio loop takes the turn only when something has come; links that failed are tried from here.
                    let _ = state.router.tick(Instant::now());
                }
            }
            idle = if state.router.outstanding > 0 || turns != state.turns { 1 } else { idle + 1 };
            turns = state.turns;
            state = if idle > IDLE_ROUNDS && !stale {
                state.tender_sleeps = true;
                self.tender.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.tender.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// Ends every call and every wait; later calls are refused.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.router.close_all();
        state.tender_sleeps = false;
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

impl State {
    /// Somebody else may take the turn.
    fn pass_on(&mut self) {
        if self.turn == Turn::Free
            && let Some(next) = self.asleep.pop()
        {
            next.unpark();
        }
    }

    /// Counts a call as attended from its first waiter on.
    fn attend(&mut self, call: &Pending, add: impl FnOnce()) {
        if call.outcome().is_none() {
            self.router.attended += usize::from(!call.attended());
            add();
        }
    }

    fn unattend(&mut self, call: &Pending, remove: impl FnOnce()) {
        if call.outcome().is_none() {
            let before = call.attended();
            remove();
            self.router.attended -= usize::from(before && !call.attended());
        }
    }
}
