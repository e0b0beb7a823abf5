//! The tender: a thread of Python's that sleeps here and looks after what no waiting thread does.
//!
//! It takes the turn when calls are out that nobody waits for and nobody has taken it for a while; it tries links again
//! that have failed; and it comes back to Python for a snapshot when the present one does not describe the world. While
//! calls go on and threads wait for them it looks in now and then, and when there are none it sleeps until the next.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use rayserve_dataplane::snapshot::Snapshot;

use super::{
    router::Hunger,
    turns::{Caller, State, Turn},
};

/// How long a call that nobody waits for may find the turn free before the tender takes it.
const PATIENCE: Duration = Duration::from_millis(10);
/// The tender looks this many times more rarely while others take turns or nothing happens, and then sleeps.
const QUIET_ROUNDS: u32 = 10;
/// A snapshot older than this is asked for again while calls are made.
pub(super) const FRESH: Duration = Duration::from_secs(2);
/// Between two snapshots at least; doubled while they bring nothing new.
const REFRESH: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// What the tender came back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Errand {
    /// Fetch a snapshot and publish it.
    Snapshot,
    /// The caller is closed.
    Closed,
}

/// What the tender keeps between two rounds.
pub(super) struct TenderState {
    /// Until the next call; it must be notified then.
    pub(super) sleeps: bool,
    refreshed: Option<Instant>,
    pause: Duration,
}

impl Default for TenderState {
    fn default() -> Self {
        Self { sleeps: false, refreshed: None, pause: REFRESH.0 }
    }
}

impl TenderState {
    /// Since a snapshot was last asked for.
    pub(super) fn age(&self) -> Duration {
        self.refreshed.map_or(Duration::MAX, |at| at.elapsed())
    }
}

impl Caller {
    /// The tender's thread: looks after calls that nobody waits for, and comes back with errands.
    pub(super) fn tend(&self) -> Errand {
        let mut state = self.lock();
        let (mut turns, mut quiet) = (state.turns, 0);
        loop {
            if state.closed {
                return Errand::Closed;
            }
            let age = state.tender.age();
            let stale = state.router.stale
                || match state.router.starves() {
                    Some(Hunger::Replica) => true,
                    Some(Hunger::Room) => age > FRESH,
                    None => false,
                };
            if stale && age >= state.tender.pause {
                state.tender.refreshed = Some(Instant::now());
                return Errand::Snapshot;
            }
            let lonely = state.router.outstanding > state.router.attended;
            if lonely && quiet > 0 && state.turn == Turn::Free {
                let until = stale.then(|| Instant::now() + state.tender.pause);
                (state, _) = self.lead(state, Turn::Tender, until, |State { router, wanted, .. }| {
                    *wanted || router.outstanding == router.attended || (router.stale && !stale)
                });
            } else {
                // An asyncio loop takes the turn only when something has come; links that failed are tried from here.
                let _ = state.router.tick(Instant::now());
            }
            quiet = if turns == state.turns { quiet + 1 } else { 0 };
            turns = state.turns;
            if state.router.outstanding == 0 && quiet > QUIET_ROUNDS && !stale {
                state.tender.sleeps = true;
                state = self.tender.wait(state).unwrap_or_else(PoisonError::into_inner);
                quiet = 0;
            } else {
                let patience = if stale { PATIENCE } else { PATIENCE * quiet.clamp(1, QUIET_ROUNDS) };
                state = self.tender.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Takes over what an errand for a snapshot brought.
    pub(super) fn publish(&self, snapshot: Snapshot) -> bool {
        let mut state = self.lock();
        let newer = state.router.publish(snapshot);
        self.nudge(&state);
        state.tender.pause = if newer { REFRESH.0 } else { (state.tender.pause * 2).min(REFRESH.1) };
        newer
    }

    /// An errand for a snapshot failed; calls that need one to be sent at all fail with it.
    pub(super) fn unpublished(&self, why: &str) {
        let mut state = self.lock();
        state.tender.pause = (state.tender.pause * 2).min(REFRESH.1);
        state.router.refuse_unrouted(why);
        self.nudge(&state);
    }
}
