//! The replica's side of the limits: which requests run, which are held, who is refused and owed a slot.
//!
//! Pure bookkeeping; the driver keeps the held requests themselves, in order, and asks [`Limit::next_free`] after every change.
//! Invariants: running and granted slots together never exceed the limit; nobody is held or granted while an earlier
//! request waits; whoever got BUSY is owed exactly one slot until it is granted or the link dies.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::wire::BACKLOG;

/// Below this mean service time callers may send a backlog.
pub const FAST: Duration = Duration::from_micros(200);

/// What becomes of a request that has just come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Start it now.
    Run,
    /// Keep it unstarted, behind those that are held already.
    Hold,
    /// Answer BUSY.
    Busy,
}

/// What a free slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Start the oldest held request.
    Start,
    /// Send one CREDIT on this link.
    Grant(usize),
}

/// Counts the slots of one replica over all of its links.
#[derive(Debug)]
pub struct Limit {
    slots: usize,
    running: usize,
    held: usize,
    granted: HashMap<usize, usize>,
    granted_total: usize,
    owed: VecDeque<usize>,
    mean_ns: u64,
    draining: bool,
}

impl Limit {
    /// At most `limit` requests run at once.
    pub fn new(limit: usize) -> Self {
        Self {
            slots: limit,
            running: 0,
            held: 0,
            granted: HashMap::new(),
            granted_total: 0,
            owed: VecDeque::new(),
            // Not FAST until a request has proven it.
            mean_ns: FAST.as_nanos() as u64 * 2,
            draining: false,
        }
    }

    /// Decides on a request of `link`; `granted`: it says that it uses a credit.
    pub fn admit(&mut self, link: usize, granted: bool) -> Admission {
        if self.draining {
            return Admission::Busy;
        }
        if granted && self.take_grant(link) {
            self.running += 1;
            return Admission::Run;
        }
        if self.owed.is_empty() {
            if self.held == 0 && self.free() > 0 {
                self.running += 1;
                return Admission::Run;
            }
            if self.is_fast() && self.held < BACKLOG as usize {
                self.held += 1;
                return Admission::Hold;
            }
        }
        self.owed.push_back(link);
        Admission::Busy
    }

    /// A running request is over; `service`: how long it ran.
    pub fn finished(&mut self, service: Duration) {
        self.running -= 1;
        let sample = u64::try_from(service.as_nanos()).unwrap_or(u64::MAX) / 8;
        self.mean_ns = (self.mean_ns - self.mean_ns / 8).saturating_add(sample);
    }

    /// A held request left the queue without being started.
    pub fn unheld(&mut self) {
        self.held -= 1;
    }

    /// What to do with a free slot, if there is one and somebody waits; ask again until `None`.
    pub fn next_free(&mut self) -> Option<Next> {
        if self.draining || self.free() == 0 {
            return None;
        }
        if self.held > 0 {
            self.held -= 1;
            self.running += 1;
            return Some(Next::Start);
        }
        let link = self.owed.pop_front()?;
        *self.granted.entry(link).or_default() += 1;
        self.granted_total += 1;
        Some(Next::Grant(link))
    }

    /// `link` gives back up to `count` credits.
    pub fn unused(&mut self, link: usize, count: u32) {
        for _ in 0..count {
            if !self.take_grant(link) {
                break;
            }
        }
    }

    /// The link is gone, and with it what it was owed and granted. Its running requests still finish.
    pub fn forget(&mut self, link: usize) {
        self.granted_total -= self.granted.remove(&link).unwrap_or(0);
        self.owed.retain(|owed| *owed != link);
    }

    /// Nothing is started, held, owed or granted any more.
    pub fn drain(&mut self) {
        self.draining = true;
        self.owed.clear();
    }

    /// A new limit; what runs above it finishes.
    pub fn resize(&mut self, limit: usize) {
        self.slots = limit;
    }

    /// Whether callers may send a backlog.
    pub fn is_fast(&self) -> bool {
        u128::from(self.mean_ns) < FAST.as_nanos()
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.running
    }

    /// Requests in flight, running and held.
    pub fn load(&self) -> usize {
        self.running + self.held
    }

    /// The configured limit.
    pub fn limit(&self) -> usize {
        self.slots
    }

    fn free(&self) -> usize {
        self.slots.saturating_sub(self.running + self.granted_total)
    }

    fn take_grant(&mut self, link: usize) -> bool {
        let Some(count) = self.granted.get_mut(&link) else { return false };
        *count -= 1;
        if *count == 0 {
            self.granted.remove(&link);
        }
        self.granted_total -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const QUICK: Duration = Duration::from_micros(1);
    const SLOW: Duration = Duration::from_millis(5);

    fn fast(limit: usize) -> Limit {
        let mut it = Limit::new(limit);
        for _ in 0..32 {
            assert_eq!(it.admit(0, false), Admission::Run);
            it.finished(QUICK);
        }
        assert!(it.is_fast());
        it
    }

    #[test]
    fn a_slow_replica_refuses_above_its_limit_and_then_owes_a_slot() {
        let mut it = Limit::new(1);
        assert_eq!(it.admit(1, false), Admission::Run);
        assert_eq!(it.admit(2, false), Admission::Busy);
        assert_eq!(it.next_free(), None);
        it.finished(SLOW);
        assert_eq!(it.next_free(), Some(Next::Grant(2)));
        assert_eq!(it.admit(1, false), Admission::Busy, "the slot is reserved");
        assert_eq!(it.admit(2, true), Admission::Run);
        it.finished(SLOW);
        assert_eq!(it.next_free(), Some(Next::Grant(1)));
        it.unused(1, 5);
        assert_eq!(it.admit(2, false), Admission::Run);
    }

    #[test]
    fn a_fast_replica_holds_a_backlog_and_starts_it_in_order() {
        let mut it = fast(1);
        assert_eq!(it.admit(1, false), Admission::Run);
        for _ in 0..BACKLOG {
            assert_eq!(it.admit(1, false), Admission::Hold);
        }
        assert_eq!(it.admit(2, false), Admission::Busy);
        assert_eq!(it.load(), 1 + BACKLOG as usize);
        it.finished(QUICK);
        assert_eq!(it.next_free(), Some(Next::Start));
        assert_eq!(it.next_free(), None);
    }

    #[test]
    fn a_dead_link_gives_its_grants_back() {
        let mut it = Limit::new(1);
        it.admit(1, false);
        it.admit(2, false);
        it.admit(3, false);
        it.finished(SLOW);
        assert_eq!(it.next_free(), Some(Next::Grant(2)));
        it.forget(2);
        assert_eq!(it.next_free(), Some(Next::Grant(3)));
    }

    #[test]
    fn a_credit_that_was_never_given_buys_nothing() {
        let mut it = Limit::new(1);
        assert_eq!(it.admit(1, true), Admission::Run);
        assert_eq!(it.admit(1, true), Admission::Busy);
    }

    #[test]
    fn a_draining_replica_takes_nothing() {
        let mut it = fast(1);
        it.admit(1, false);
        it.drain();
        assert_eq!(it.admit(1, false), Admission::Busy);
        it.finished(QUICK);
        assert_eq!(it.next_free(), None);
    }

    proptest! {
        #[test]
        fn slots_are_never_exceeded(limit in 1usize..4, events in prop::collection::vec((0u8..5, 0usize..3, any::<bool>()), 0..200)) {
            let mut it = Limit::new(limit);
            let (mut running, mut held, mut granted) = (0usize, 0usize, 0usize);
            for (event, link, flag) in events {
                match event {
                    0 | 1 => match it.admit(link, flag) {
                        Admission::Run => running += 1,
                        Admission::Hold => held += 1,
                        Admission::Busy => {}
                    },
                    2 if running > 0 => {
                        it.finished(if flag { QUICK } else { SLOW });
                        running -= 1;
                    }
                    3 => it.unused(link, 1),
                    4 => it.forget(link),
                    _ => {}
                }
                while let Some(next) = it.next_free() {
                    match next {
                        Next::Start => { held -= 1; running += 1; }
                        Next::Grant(_) => granted += 1,
                    }
                }
                prop_assert!(running <= limit);
                prop_assert!(it.running + it.granted_total <= limit);
                prop_assert_eq!(it.load(), running + held);
            }
            prop_assert!(granted < 1000);
        }
    }
}
