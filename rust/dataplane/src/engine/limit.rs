//! The replica's side of the limits: which requests run, which are held, who is refused and owed a slot.
//!
//! Pure bookkeeping; the driver keeps the held requests themselves, in order, and asks [`Limit::next_free`] after every change.
//! Invariants: running and granted slots together never exceed the limit; nobody is held or granted while an earlier
//! request waits; whoever got BUSY is owed exactly one slot until it is granted or the link dies. A caller that neither uses
//! nor returns its grants (it is frozen, or broken) loses them, and is granted nothing more until it says something.

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

/// Slots that are reserved for a link.
#[derive(Debug, Default)]
struct Grants {
    /// Since before the last [`Limit::reclaim`].
    old: usize,
    new: usize,
}

/// Counts the slots of one replica over all of its links.
#[derive(Debug)]
pub struct Limit {
    slots: usize,
    running: usize,
    held: usize,
    granted: HashMap<usize, Grants>,
    granted_total: usize,
    owed: VecDeque<usize>,
    /// What links are owed that have lost a grant, until they say something.
    frozen: HashMap<usize, usize>,
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
            frozen: HashMap::new(),
            // Not FAST until a request has proven it.
            mean_ns: FAST.as_nanos() as u64 * 2,
            draining: false,
        }
    }

    /// Decides on a request of `link`; `granted`: it says that it uses a credit.
    pub fn admit(&mut self, link: usize, granted: bool) -> Admission {
        self.decide(link, granted, true)
    }

    /// Whether a batch of `link` runs, which takes one slot; it is never held.
    pub fn admit_batch(&mut self, link: usize, granted: bool) -> bool {
        self.decide(link, granted, false) == Admission::Run
    }

    fn decide(&mut self, link: usize, granted: bool, may_hold: bool) -> Admission {
        if self.draining {
            return Admission::Busy;
        }
        self.thaw(link);
        if granted && self.take_grant(link) {
            self.running += 1;
            return Admission::Run;
        }
        if self.owed.is_empty() {
            if self.held == 0 && self.free() > 0 {
                self.running += 1;
                return Admission::Run;
            }
            if may_hold && self.is_fast() && self.held < BACKLOG as usize {
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
        self.granted.entry(link).or_default().new += 1;
        self.granted_total += 1;
        Some(Next::Grant(link))
    }

    /// `link` gives back up to `count` credits.
    pub fn unused(&mut self, link: usize, count: u32) {
        self.thaw(link);
        for _ in 0..count {
            if !self.take_grant(link) {
                break;
            }
        }
    }

    /// Takes back the grants that were there at the last call already. The caller is not owed them: its late request is
    /// one without a grant, and a late UNUSED gives nothing. Returns whether there are others to come back for.
    pub fn reclaim(&mut self) -> bool {
        for (&link, grants) in &mut self.granted {
            if grants.old > 0 {
                let before = self.owed.len();
                self.owed.retain(|owed| *owed != link);
                *self.frozen.entry(link).or_default() += before - self.owed.len();
            }
            self.granted_total -= grants.old;
            (grants.old, grants.new) = (grants.new, 0);
        }
        self.granted.retain(|_, grants| grants.old > 0);
        !self.granted.is_empty()
    }

    /// A link that is not frozen after all is owed what it was.
    fn thaw(&mut self, link: usize) {
        if let Some(owed) = self.frozen.remove(&link) {
            self.owed.extend(std::iter::repeat_n(link, owed));
        }
    }

    /// The link is gone, and with it what it was owed and granted. Its running requests still finish.
    pub fn forget(&mut self, link: usize) {
        self.granted_total -= self.granted.remove(&link).map_or(0, |grants| grants.old + grants.new);
        self.owed.retain(|owed| *owed != link);
        self.frozen.remove(&link);
    }

    /// Nothing is started, held, owed or granted any more.
    pub fn drain(&mut self) {
        self.draining = true;
        self.owed.clear();
        self.frozen.clear();
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

    /// Whether somebody is owed a slot.
    pub fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// The configured limit.
    pub fn limit(&self) -> usize {
        self.slots
    }

    fn free(&self) -> usize {
        self.slots.saturating_sub(self.running + self.granted_total)
    }

    fn take_grant(&mut self, link: usize) -> bool {
        let Some(grants) = self.granted.get_mut(&link) else { return false };
        *(if grants.old > 0 { &mut grants.old } else { &mut grants.new }) -= 1;
        if grants.old + grants.new == 0 {
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
    fn a_grant_that_a_frozen_caller_keeps_goes_to_the_next() {
        let mut it = Limit::new(1);
        it.admit(1, false);
        for link in [2, 2, 3] {
            assert_eq!(it.admit(link, false), Admission::Busy);
        }
        it.finished(SLOW);
        assert_eq!(it.next_free(), Some(Next::Grant(2)));
        assert!(it.reclaim(), "it is young");
        assert_eq!(it.next_free(), None);
        assert!(!it.reclaim());
        assert_eq!(it.next_free(), Some(Next::Grant(3)), "past what else the frozen one is owed");
        assert_eq!(it.admit(3, true), Admission::Run);
        it.finished(SLOW);
        assert_eq!(it.next_free(), None, "nothing for the frozen one");
        assert_eq!(it.admit(2, true), Admission::Busy, "its grant buys nothing, and it is owed two");
        assert_eq!(it.next_free(), Some(Next::Grant(2)));
        assert_eq!(it.admit(2, true), Admission::Run);
        it.finished(SLOW);
        assert_eq!(it.next_free(), Some(Next::Grant(2)));
        it.unused(2, 1);
        assert_eq!((it.next_free(), it.owes()), (None, false));
    }

    #[test]
    fn a_credit_that_was_never_given_buys_nothing() {
        let mut it = Limit::new(1);
        assert_eq!(it.admit(1, true), Admission::Run);
        assert_eq!(it.admit(1, true), Admission::Busy);
    }

    #[test]
    fn a_batch_runs_or_is_owed_a_slot_but_is_never_held() {
        let mut it = fast(1);
        assert!(it.admit_batch(1, false));
        assert!(!it.admit_batch(2, false));
        assert_eq!((it.load(), it.owes()), (1, true));
        it.finished(QUICK);
        assert_eq!(it.next_free(), Some(Next::Grant(2)));
        assert!(!it.admit_batch(3, false) && it.admit_batch(2, true));
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
        fn slots_are_never_exceeded_and_debts_are_kept(
            limit in 1usize..4,
            events in prop::collection::vec((0u8..6, 0usize..3, any::<bool>()), 0..200),
        ) {
            let mut it = Limit::new(limit);
            let (mut running, mut held) = (0usize, 0usize);
            let mut debts = [0usize; 3];
            for (event, link, flag) in events {
                match event {
                    0 | 1 => match it.admit(link, flag) {
                        Admission::Run => running += 1,
                        Admission::Hold => held += 1,
                        Admission::Busy => debts[link] += 1,
                    },
                    2 if running > 0 => {
                        it.finished(if flag { QUICK } else { SLOW });
                        running -= 1;
                    }
                    3 => it.unused(link, 1),
                    4 => {
                        it.forget(link);
                        debts[link] = 0;
                    }
                    5 => drop(it.reclaim()),
                    _ => {}
                }
                while let Some(next) = it.next_free() {
                    match next {
                        Next::Start => { held -= 1; running += 1; }
                        Next::Grant(link) => debts[link] -= 1,
                    }
                }
                prop_assert!(running <= limit);
                let granted: usize = it.granted.values().map(|grants| grants.old + grants.new).sum();
                prop_assert_eq!(it.granted_total, granted);
                prop_assert!(it.running + it.granted_total <= limit);
                prop_assert_eq!(it.load(), running + held);
                for (link, &debt) in debts.iter().enumerate() {
                    let owed = it.owed.iter().filter(|owed| **owed == link).count();
                    prop_assert_eq!(owed + it.frozen.get(&link).unwrap_or(&0), debt);
                }
            }
            while it.running() > 0 || it.reclaim() || it.next_free().is_some() {
                if it.running() > 0 {
                    it.finished(SLOW); // what was held has started, and ends too
                }
            }
            prop_assert_eq!((it.granted_total, it.owes()), (0, false), "silence frees every slot");
        }
    }
}
