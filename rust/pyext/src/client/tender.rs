//! The tender: a thread of Python's that sleeps here and looks after what no waiting thread does.
//!
//! It takes the turn when calls are out that nobody waits for and nobody has taken it for a while; it tries links again
//! that have failed, sends what a blocked loop has left, binds batches whose window is over and ends calls that have waited
//! for too long; and it comes back to Python to take over a snapshot that has come, or to ask for one. While calls go
//! on and threads wait for them it looks in now and then, and when there are none it sleeps until the next.

use std::{
    sync::{MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rayserve_dataplane::snapshot::{Snapshot, Version};

use super::{
    router::UNROUTED,
    turns::{Caller, State, Turn},
};

/// How long a call that nobody waits for may find the turn free before the tender takes it.
const PATIENCE: Duration = Duration::from_millis(10);
/// The tender looks this many times more rarely while others take turns or nothing happens, and then sleeps.
const QUIET_ROUNDS: u32 = 10;
/// How long what a loop has corked may wait for it before the tender sends it: user code blocks the loop.
const CORKED: Duration = Duration::from_millis(1);
/// The tender looks so often for that while calls are made, and until there have been none for so many looks.
const CALM: u32 = 50;
/// Between a snapshot that could not be had and the next attempt.
const RETRY: Duration = Duration::from_millis(200);

/// What the tender came back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Errand {
    /// The caller is closed.
    Closed = 0,
    /// The next snapshot has come, or nobody waits for it yet.
    News = 1,
    /// Calls name a deployment that the snapshot does not: ask for the present one.
    Fresh = 2,
    /// Calls wait for their router: [`Caller::choosing`].
    Choose = 3,
}

/// What the tender keeps between two rounds.
pub(super) struct TenderState {
    /// Until the next call; it must be notified then.
    pub(super) sleeps: bool,
    news: bool,
    /// When it looks next, by itself or as it was told; none: it sleeps, or is on an errand.
    pub(super) until: Option<Instant>,
    /// When the last errand failed or was tried again, until one succeeds.
    failed: Option<Instant>,
    /// When the present snapshot was asked for, until the answer has come.
    asked: Option<Instant>,
    /// Since when calls are corked.
    corked: Option<Instant>,
    /// Looks since the last corked call; none: the tender does not look for them.
    looks: Option<u32>,
}

impl Default for TenderState {
    fn default() -> Self {
        Self { sleeps: false, news: true, until: None, failed: None, asked: None, corked: None, looks: None }
    }
}

impl TenderState {
    /// Calls wait for their loop to send them; whether the tender must be told to look.
    pub(super) fn cork(&mut self) -> bool {
        if self.corked.is_none() {
            self.corked = Some(Instant::now());
        }
        self.looks.replace(0).is_none()
    }

    /// They are sent.
    pub(super) fn uncork(&mut self) {
        self.corked = None;
    }
}

impl State {
    /// When whoever has the turn looks for corked calls: never, unless it is the tender.
    pub(super) fn next_look(&self, who: Turn, now: Instant) -> Option<Instant> {
        (who == Turn::Tender && self.tender.looks.is_some()).then(|| now + CORKED)
    }

    /// The look of whoever has the turn.
    pub(super) fn look_as(&mut self, who: Turn) {
        if who == Turn::Tender {
            self.look();
        }
    }

    /// Sends what a loop has corked and not sent in time.
    fn look(&mut self) {
        if self.tender.corked.is_some_and(|since| since.elapsed() >= CORKED) {
            self.tender.uncork();
            self.router.settle();
        }
        self.tender.looks = self.tender.looks.map(|looks| looks + 1).filter(|looks| *looks < CALM);
    }

    /// Whether a call has made an errand.
    pub(super) fn has_errand(&self) -> bool {
        !self.router.held.fresh.is_empty() || self.router.doubts && self.tender.asked.is_none()
    }

    fn errand(&mut self) -> Option<Errand> {
        if self.closed {
            return Some(Errand::Closed);
        }
        if !self.router.held.fresh.is_empty() {
            return Some(Errand::Choose);
        }
        if self.tender.failed.is_some_and(|at| at.elapsed() < RETRY) {
            return None;
        }
        if self.tender.asked.is_none() && std::mem::take(&mut self.router.doubts) {
            self.tender.asked = Some(Instant::now());
            return Some(Errand::Fresh);
        }
        let again = self.tender.failed.is_some() && self.router.outstanding > 0;
        if again {
            self.tender.failed = Some(Instant::now()); // the answer may take its time
        }
        (std::mem::take(&mut self.tender.news) || again).then_some(Errand::News)
    }
}

impl Caller {
    /// The tender's thread: looks after calls that nobody waits for, and comes back with errands.
    pub(super) fn tend(&self) -> Errand {
        let mut state = self.lock();
        let (mut turns, mut quiet) = (state.turns, 0);
        loop {
            if state.tender.asked.is_some_and(|at| at.elapsed() > UNROUTED) {
                self.give_up(&mut state, &format!("The controller has not answered within {} s.", UNROUTED.as_secs()));
            }
            if let Some(errand) = state.errand() {
                state.tender.until = None;
                return errand;
            }
            let now = Instant::now();
            let lonely = state.router.outstanding > state.router.attended;
            if lonely && quiet > 0 && state.turn == Turn::Free {
                let retry = state.tender.failed.map(|_| now + RETRY);
                let until = state.tender.asked.map(|at| at + UNROUTED).into_iter().chain(retry).min();
                (state, _) = self.lead(state, Turn::Tender, until, |State { router, wanted, .. }| {
                    *wanted || router.outstanding == router.attended
                });
                quiet = 0;
                continue; // it may have been wanted for an errand
            }
            // An asyncio loop takes the turn only when something has come; links that failed are tried from here.
            let next = state.router.tick(now);
            if next.is_some_and(|at| at <= now) {
                self.nudge(&state);
            }
            quiet = if turns == state.turns { quiet + 1 } else { 0 };
            turns = state.turns;
            if state.router.outstanding == 0 && quiet > QUIET_ROUNDS {
                state.tender.sleeps = true;
                state.tender.until = None;
                state = self.tender.wait(state).unwrap_or_else(PoisonError::into_inner);
                quiet = 0;
            } else {
                let latest = Instant::now() + PATIENCE * quiet.clamp(1, QUIET_ROUNDS);
                state = self.rest(state, next.map_or(latest, |at| at.min(latest)));
            }
        }
    }

    /// Sleeps until then, until something is due or until it is notified, and looks after corked calls meanwhile.
    fn rest<'s>(&'s self, mut state: MutexGuard<'s, State>, latest: Instant) -> MutexGuard<'s, State> {
        loop {
            let until = state.router.due().map_or(latest, |at| at.min(latest));
            state.tender.until = Some(until);
            let left = until.saturating_duration_since(Instant::now());
            let slice = if state.tender.looks.is_some() { left.min(CORKED) } else { left };
            let (woken, timeout) = self.tender.wait_timeout(state, slice).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.look();
            if slice == left || !timeout.timed_out() {
                return state;
            }
        }
    }

    /// Has whoever has the turn, or else the tender, come back for what is due sooner than they would look by themselves.
    pub(super) fn remind(&self, state: &mut State) {
        let Some(due) = state.router.due() else { return };
        let free = state.turn == Turn::Free;
        let until = if free { &mut state.tender.until } else { &mut state.until };
        if until.is_some_and(|until| until <= due) {
            return;
        }
        *until = Some(due);
        if free { self.tender.notify_one() } else { self.nudge(state) }
    }

    /// Has the tender look for corked calls, also while it polls.
    pub(super) fn look_out(&self, state: &State) {
        self.tender.notify_one();
        if state.turn == Turn::Tender {
            self.nudge(state);
        }
    }

    /// Has the tender look for errands.
    pub(super) fn summon(&self, state: &mut State) {
        self.relieve(state);
        self.tender.notify_one();
    }

    /// Calls that have not left this process, after what is corked: those that have a replica, and those that wait for one.
    pub(super) fn unsent(&self) -> (usize, usize) {
        self.flush();
        self.lock().router.unsent()
    }

    /// Another thread knows of a snapshot.
    pub(super) fn announce(&self) {
        let mut state = self.lock();
        state.tender.news = true;
        state.tender.sleeps = false;
        self.summon(&mut state);
    }

    /// Takes over what an errand brought.
    pub(super) fn publish(&self, snapshot: Snapshot, fresh: bool) {
        let mut state = self.lock();
        state.tender.failed = None;
        let asked = if fresh { state.tender.asked.take() } else { None };
        state.router.publish(snapshot, asked);
        self.remind(&mut state);
        self.nudge(&state);
    }

    /// An errand failed; it is tried again while there are calls.
    pub(super) fn unpublished(&self, why: &str) {
        self.give_up(&mut self.lock(), why);
    }

    fn give_up(&self, state: &mut State, why: &str) {
        state.tender.failed = Some(Instant::now());
        state.tender.asked = None;
        state.router.unpublished(why);
        self.nudge(state);
    }

    pub(super) fn version(&self) -> Option<Version> {
        self.lock().router.version()
    }
}
