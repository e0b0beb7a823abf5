//! When a batch is released, and how large it is: late-binding and work-conserving.
//!
//! Pure. A batch is never sealed while no slot is free to run it: whatever comes meanwhile can still join. When a slot is
//! free, as many as fit go at once if the batch is full or its oldest item has waited its window, else exactly when that is so.
//! Who keeps the items, and what fits, is the caller's: the router counts requests, `@serve.batch` may weigh them.

use std::time::{Duration, Instant};

/// What a deployment or a batched function declares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// A full batch; at least 1.
    pub max_size: usize,
    /// How long the oldest item may wait for others while a slot is free.
    pub wait: Duration,
}

/// The items at the front of a queue that fit into one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Front {
    /// How many; at least 1.
    pub fits: usize,
    /// Nothing more fits.
    pub full: bool,
    /// Since when the first of them waits.
    pub oldest: Instant,
}

/// Why a batch was released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It was full.
    Full,
    /// Its oldest item had waited its window.
    Waited,
}

/// What to do about a queue now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Run so many from the front.
    Take(usize, Reason),
    /// Look again at this time, or when something changes.
    Until(Instant),
    /// Look again when something changes.
    Idle,
}

impl Window {
    /// The front of a queue in which every item weighs 1; `None` if it is empty.
    pub fn front(&self, len: usize, oldest: Option<Instant>) -> Option<Front> {
        oldest.map(|oldest| Front { fits: len.min(self.max_size), full: len >= self.max_size, oldest })
    }

    /// What to do now; `slot`: one is free to run a batch.
    pub fn decide(&self, front: Option<Front>, slot: bool, now: Instant) -> Verdict {
        let Some(front) = front.filter(|_| slot) else { return Verdict::Idle };
        if front.full {
            return Verdict::Take(front.fits, Reason::Full);
        }
        match front.oldest.checked_add(self.wait) {
            Some(due) if due <= now => Verdict::Take(front.fits, Reason::Waited),
            Some(due) => Verdict::Until(due),
            None => Verdict::Idle,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_full_batch_goes_at_once_and_others_when_their_oldest_has_waited() {
        let (window, t) = (Window { max_size: 3, wait: 10 * MS }, Instant::now());
        let decide = |len, slot, now| window.decide(window.front(len, (len > 0).then_some(t)), slot, now);
        assert_eq!(decide(0, true, t), Verdict::Idle);
        assert_eq!(decide(2, true, t + 4 * MS), Verdict::Until(t + 10 * MS));
        assert_eq!(decide(2, true, t + 10 * MS), Verdict::Take(2, Reason::Waited));
        assert_eq!(decide(5, true, t), Verdict::Take(3, Reason::Full));
        assert_eq!(decide(5, false, t + 99 * MS), Verdict::Idle, "nothing is sealed while nothing could run it");
    }

    #[test]
    fn a_window_without_end_waits_for_a_full_batch() {
        let (window, t) = (Window { max_size: 2, wait: Duration::MAX }, Instant::now());
        assert_eq!(window.decide(window.front(1, Some(t)), true, t), Verdict::Idle);
        assert_eq!(window.decide(window.front(2, Some(t)), true, t), Verdict::Take(2, Reason::Full));
    }

    proptest! {
        /// One slot that takes 20 ms + 0.5 ms an item, at any arrivals below its capacity: nobody waits for longer than the
        /// window, the batch that runs, and the batches that hold those before.
        #[test]
        fn nobody_waits_while_a_slot_is_free_and_the_window_is_over(gaps in prop::collection::vec(0u64..12_000, 1..200)) {
            let (window, t0) = (Window { max_size: 32, wait: 10 * MS }, Instant::now());
            let mut arrivals = gaps.iter().scan(t0, |at, gap| { *at += Duration::from_micros(*gap); Some(*at) }).peekable();
            let (mut queue, mut now, mut free_at, mut taken) = (VecDeque::new(), t0, t0, 0);
            while taken < gaps.len() {
                while arrivals.peek().is_some_and(|at| *at <= now) {
                    queue.extend(arrivals.next());
                }
                let verdict = window.decide(window.front(queue.len(), queue.front().copied()), free_at <= now, now);
                let next = match verdict {
                    Verdict::Take(n, _) => {
                        let first = queue[0];
                        prop_assert!(n >= 1 && n <= window.max_size && n <= queue.len());
                        prop_assert!(n == window.max_size || now >= first + window.wait, "sealed early");
                        prop_assert!(now <= free_at.max(first + window.wait).max(t0), "left waiting");
                        queue.drain(..n);
                        taken += n;
                        free_at = now + 20 * MS + Duration::from_micros(500) * n as u32;
                        continue;
                    }
                    Verdict::Until(due) => due,
                    Verdict::Idle if free_at > now => free_at,
                    Verdict::Idle => *arrivals.peek().expect("only an empty queue is idle"),
                };
                now = arrivals.peek().map_or(next, |at| next.min(*at));
            }
        }
    }
}
