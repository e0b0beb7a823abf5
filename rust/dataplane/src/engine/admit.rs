//! The queue in front of a deployment: who waits, in order of arrival.
//!
//! Waiting here is cheap to cancel, to bound and to send elsewhere; nothing waits at a replica but its short backlog. A
//! deadline is the driver's, which cancels. A request that comes back unbegun takes its old place again, ahead of everything that arrived later.
//! Whoever waits for one certain replica (`own.rs`) stands aside, so that those behind pass.

use std::{collections::VecDeque, time::Instant};

use super::Affinity;

/// Order of arrival within one deployment.
pub type Seq = u64;

/// Requests that wait for a replica.
#[derive(Debug)]
pub(super) struct Queue<W> {
    /// Sorted by `seq`.
    waiting: VecDeque<Waiting<W>>,
    /// The same of those who stand aside.
    aside: VecDeque<Waiting<W>>,
    next: Seq,
}

#[derive(Debug)]
struct Waiting<W> {
    seq: Seq,
    affinity: Affinity,
    since: Since,
    waiter: W,
}

impl<W> Waiting<W> {
    fn stand_in(self, line: &mut VecDeque<Self>) {
        let at = line.partition_point(|other| other.seq < self.seq);
        line.insert(at, self);
    }
}

/// Since when a request has waited to be part of a batch; `None` until somebody with a clock has looked.
pub(super) type Since = Option<Instant>;

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), aside: VecDeque::new(), next: 0 }
    }
}

impl<W> Queue<W> {
    /// The next arrival's number.
    pub(super) fn arrive(&mut self) -> Seq {
        self.next += 1;
        self.next
    }

    /// How many wait, aside too.
    pub(super) fn len(&self) -> usize {
        self.waiting.len() + self.aside.len()
    }

    /// Whether nobody stands before whoever comes now.
    pub(super) fn is_clear(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether somebody who arrived before `seq` waits.
    pub(super) fn has_before(&self, seq: Seq) -> bool {
        self.waiting.front().is_some_and(|first| first.seq < seq)
    }

    /// Whether whoever arrived as `seq` waits.
    pub(super) fn contains(&self, seq: Seq) -> bool {
        [&self.waiting, &self.aside].iter().any(|line| line.binary_search_by_key(&seq, |other| other.seq).is_ok())
    }

    /// Waits at the place that the order of arrival gives.
    pub(super) fn push(&mut self, seq: Seq, affinity: Affinity, since: Since, waiter: W) {
        Waiting { seq, affinity, since, waiter }.stand_in(&mut self.waiting);
    }

    /// The same aside.
    pub(super) fn push_aside(&mut self, seq: Seq, affinity: Affinity, since: Since, waiter: W) {
        Waiting { seq, affinity, since, waiter }.stand_in(&mut self.aside);
    }

    /// The first in order steps aside.
    pub(super) fn step_aside(&mut self) {
        if let Some(first) = self.waiting.pop_front() {
            first.stand_in(&mut self.aside);
        }
    }

    /// Whoever stands aside takes the place that the order of arrival gives.
    pub(super) fn rejoin(&mut self) {
        if !self.aside.is_empty() {
            self.waiting.append(&mut self.aside);
            self.waiting.make_contiguous().sort_unstable_by_key(|waiting| waiting.seq);
        }
    }

    /// Those that have come since the last time have waited since now.
    pub(super) fn stamp(&mut self, now: Instant) {
        for waiting in self.waiting.iter_mut().rev().take_while(|waiting| waiting.since.is_none()) {
            waiting.since = Some(now);
        }
        // One that came back from before its deployment batched stands in front of those that have been told.
        if let Some(first) = self.waiting.front_mut() {
            first.since.get_or_insert(now);
        }
    }

    /// Since when the first in order has waited.
    pub(super) fn oldest(&self, now: Instant) -> Option<Instant> {
        self.waiting.front().map(|first| first.since.unwrap_or(now))
    }

    /// Takes out the first in order, with its place.
    pub(super) fn take(&mut self) -> Option<(Seq, Affinity, Since, W)> {
        self.waiting.pop_front().map(|first| (first.seq, first.affinity, first.since, first.waiter))
    }

    /// The first in order, who stays.
    pub(super) fn first(&self) -> Option<(Seq, Affinity)> {
        self.waiting.front().map(|first| (first.seq, first.affinity))
    }

    /// Takes out the first in order.
    pub(super) fn pop(&mut self) -> Option<W> {
        self.waiting.pop_front().map(|first| first.waiter)
    }

    /// Takes out whoever arrived as `seq`, if still waiting.
    pub(super) fn cancel(&mut self, seq: Seq) -> Option<W> {
        [&mut self.waiting, &mut self.aside].into_iter().find_map(|line| {
            let at = line.binary_search_by_key(&seq, |other| other.seq).ok()?;
            line.remove(at).map(|found| found.waiter)
        })
    }

    /// Everybody.
    pub(super) fn waiters(&self) -> impl Iterator<Item = &W> {
        self.waiting.iter().chain(&self.aside).map(|waiting| &waiting.waiter)
    }

    /// Takes out everybody.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = W> + use<W> {
        self.rejoin();
        std::mem::take(&mut self.waiting).into_iter().map(|waiting| waiting.waiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(n: u64) -> Queue<u64> {
        let mut queue = Queue::default();
        for _ in 0..n {
            let seq = queue.arrive();
            queue.push(seq, Affinity::default(), None, seq);
        }
        queue
    }

    fn drain(queue: &mut Queue<u64>) -> Vec<u64> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn the_unbegun_come_back_to_the_front_in_their_order() {
        let mut queue = queue(4);
        let first = queue.pop().expect("four");
        let second = queue.pop().expect("three");
        queue.push(second, Affinity::default(), None, second);
        queue.push(first, Affinity::default(), None, first);
        assert_eq!(drain(&mut queue), [1, 2, 3, 4]);
    }

    #[test]
    fn whoever_stands_aside_waits_on_and_comes_back_in_order() {
        let mut queue = queue(4);
        queue.step_aside();
        queue.push_aside(queue.next + 1, Affinity::default(), None, 5);
        assert_eq!((queue.len(), queue.pop()), (5, Some(2)));
        assert!(queue.contains(1) && queue.contains(3) && !queue.contains(2));
        assert_eq!(queue.cancel(5), Some(5));
        queue.rejoin();
        assert_eq!(drain(&mut queue), [1, 3, 4]);
    }

    #[test]
    fn a_cancelled_one_leaves_and_cannot_be_cancelled_again() {
        let mut queue = queue(3);
        assert_eq!(queue.cancel(2), Some(2));
        assert_eq!(queue.cancel(2), None);
        assert_eq!(drain(&mut queue), [1, 3]);
    }
}
