//! Batches in scripted cases: when they are bound, and that their requests share one slot; `batch_walk.rs` has random ones.

use std::time::{Duration, Instant};

use super::*;
use crate::engine::batch::Reason;

pub(super) const MS: Duration = Duration::from_millis(1);

pub(super) fn batched(max_size: usize, wait: Duration, concurrent: u32, replicas: &[&str]) -> Snapshot {
    let mut snapshot = snapshot(1, 100, -1, replicas);
    let batch = snapshot::Batch { max_size, wait_s: wait.as_secs_f64(), concurrent };
    snapshot.deployments.get_mut("a#D").expect("there").batch = Some(batch);
    snapshot
}

/// A driver with a clock.
pub(super) struct Timed {
    pub(super) it: Driver,
    pub(super) now: Instant,
    pub(super) next: Option<Instant>,
}

impl Timed {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        Self { it: Driver::linked(snapshot), now: Instant::now(), next: None }
    }

    pub(super) fn seal(&mut self) {
        while self.it.engine.is_due() || self.next.is_some_and(|at| at <= self.now) {
            self.next = self.it.engine.seal(self.now);
            self.it.settle();
        }
    }

    pub(super) fn request(&mut self, waiter: u32) -> Place {
        self.it.request(waiter).expect("no limit").expect("a request of a batch always waits")
    }

    /// So many requests, beginning with this one, all at once.
    fn requests(&mut self, from: u32, count: u32) {
        for waiter in from..from + count {
            self.request(waiter);
        }
        self.seal();
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.seal();
    }

    fn take(&mut self) -> Vec<(u32, Lease)> {
        self.it.batches.remove(0).items
    }

    fn answer(&mut self, items: Vec<(u32, Lease)>) {
        for (_, lease) in items {
            self.it.engine.answered(lease, Some((0, true)));
        }
        self.seal();
    }

    /// Who is in each batch that was bound and not taken.
    fn bound(&self) -> Vec<Vec<u32>> {
        self.it.batches.iter().map(|batch| waiters(&batch.items)).collect()
    }
}

fn waiters(items: &[(u32, Lease)]) -> Vec<u32> {
    items.iter().map(|(waiter, _)| *waiter).collect()
}

#[test]
fn a_batch_goes_when_it_is_full_or_its_oldest_has_waited() {
    let mut timed = Timed::new(&batched(3, 10 * MS, 2, &["r"]));
    timed.requests(0, 2);
    timed.pass(9 * MS);
    assert_eq!(timed.bound(), [[0; 0]; 0]);
    assert_eq!(timed.next, Some(timed.now + MS));
    timed.requests(2, 1);
    assert_eq!((timed.it.batches[0].reason, timed.it.batches[0].waited), (Reason::Full, 9 * MS));
    timed.requests(3, 1);
    timed.pass(10 * MS);
    assert_eq!(timed.it.batches[1].reason, Reason::Waited);
    assert_eq!(timed.bound(), [vec![0, 1, 2], vec![3]]);
}

#[test]
fn nothing_is_sealed_while_no_slot_is_free() {
    let mut timed = Timed::new(&batched(4, Duration::ZERO, 1, &["r"]));
    timed.requests(0, 1);
    let first = timed.take();
    timed.requests(1, 2);
    timed.pass(99 * MS);
    timed.requests(3, 3);
    assert_eq!((timed.bound(), timed.next), (vec![], None), "whatever comes can still join");
    timed.answer(first);
    assert_eq!(timed.bound(), [[1, 2, 3, 4]]);
    let second = timed.take();
    timed.answer(second);
    assert_eq!(timed.bound(), [[5]]);
}

#[test]
fn a_slot_is_free_when_the_last_request_of_its_batch_is_answered() {
    let mut timed = Timed::new(&batched(2, Duration::ZERO, 1, &["r"]));
    timed.requests(0, 4);
    let mut first = timed.take();
    let last = first.pop().expect("two");
    timed.answer(first);
    assert_eq!(timed.bound(), [[0; 0]; 0]);
    timed.answer(vec![last]);
    assert_eq!(timed.bound(), [[2, 3]]);
}

#[test]
fn batches_have_no_backlog_and_a_limit_of_their_own() {
    let mut timed = Timed::new(&batched(2, Duration::ZERO, 2, &["r", "s"]));
    timed.requests(0, 20);
    assert_eq!(timed.it.batches.len(), 4, "two on each, though one hundred requests may run");
    let first = timed.take();
    timed.answer(first); // which says FAST
    assert_eq!(timed.it.batches.len(), 4);
}

#[test]
fn a_refused_batch_waits_for_one_credit_and_each_request_has_its_old_place() {
    let mut timed = Timed::new(&batched(3, 50 * MS, 1, &["r"]));
    timed.requests(0, 3);
    let refused = timed.take();
    timed.requests(3, 1);
    for (waiter, lease) in refused.into_iter().rev() {
        let place = timed.it.engine.busy(lease, 1);
        timed.it.again(place, waiter);
    }
    timed.pass(99 * MS);
    assert_eq!(timed.bound(), [[0; 0]; 0], "nothing is sent before the credit comes");
    timed.it.engine.credit(timed.it.keys["r"], 1);
    timed.seal();
    let again = timed.take();
    assert_eq!(waiters(&again), [0, 1, 2]);
    assert!(again.iter().all(|(_, lease)| lease.granted));
    timed.answer(again);
    let last = timed.take();
    assert!(!last[0].1.granted && timed.it.unused.is_empty(), "one credit for the batch, and it was paid with it");
}

#[test]
fn a_credit_that_no_batch_is_due_for_goes_back() {
    let mut timed = Timed::new(&batched(3, Duration::ZERO, 1, &["r"]));
    timed.requests(0, 2);
    for (_, lease) in timed.take() {
        timed.it.engine.busy(lease, 1);
    }
    timed.it.engine.credit(timed.it.keys["r"], 1);
    timed.seal();
    assert_eq!(timed.it.unused.len(), 1);
    timed.requests(2, 1);
    assert_eq!(timed.bound(), [[2]], "paid: optimistic again");
}

#[test]
fn a_batch_that_was_never_sent_gives_its_slot_and_its_credit_back() {
    let mut timed = Timed::new(&batched(2, Duration::ZERO, 1, &["r"]));
    timed.requests(0, 2);
    for (waiter, lease) in timed.take() {
        let place = timed.it.engine.busy(lease, 1);
        timed.it.again(place, waiter);
    }
    timed.it.engine.credit(timed.it.keys["r"], 1);
    timed.seal();
    timed.requests(2, 1);
    for (_, lease) in timed.take() {
        timed.it.engine.unsent(lease);
    }
    timed.seal();
    let last = timed.take();
    assert!(last[0].1.granted, "the next one uses the credit");
}

#[test]
fn a_returned_batch_goes_elsewhere_at_once_as_it_has_waited() {
    let mut timed = Timed::new(&batched(4, 10 * MS, 1, &["r", "s"]));
    timed.requests(0, 2);
    timed.pass(10 * MS);
    let items = timed.take();
    let from = items[0].1.replica;
    for (waiter, lease) in items {
        let place = timed.it.engine.returned(lease);
        timed.it.again(place, waiter);
    }
    timed.seal();
    let again = timed.take();
    assert_eq!(waiters(&again), [0, 1]);
    assert_ne!(again[0].1.replica, from);
}

#[test]
fn a_dead_link_frees_its_batches_and_stale_leases_free_nothing() {
    let mut timed = Timed::new(&batched(2, Duration::ZERO, 1, &["r"]));
    timed.requests(0, 2);
    let stale = timed.take();
    timed.it.engine.closed(timed.it.keys["r"]);
    timed.it.link("r", 1);
    timed.requests(2, 2);
    let fresh = timed.take();
    timed.requests(4, 1);
    timed.answer(stale);
    assert_eq!(timed.bound(), [[0; 0]; 0]);
    timed.answer(fresh);
    assert_eq!(timed.bound(), [[4]]);
}

#[test]
fn those_that_a_free_slot_will_take_are_not_queued() {
    let mut snapshot = batched(3, 10 * MS, 1, &["r"]);
    snapshot.deployments.get_mut("a#D").expect("there").max_queued_requests = 2;
    let mut timed = Timed::new(&snapshot);
    for waiter in 0..5 {
        timed.request(waiter);
    }
    let policy = snapshot::Backpressure::default();
    assert_eq!(timed.it.request(5), Err(Error::Backpressure { queued: 2, limit: 2, policy }));
    timed.seal();
    assert_eq!(timed.bound(), [[0, 1, 2]]);
    assert!(timed.it.request(6).is_err(), "two wait, and no slot is free");
}

#[test]
fn numbers_change_in_place_and_a_deployment_may_end_to_batch() {
    let mut timed = Timed::new(&batched(8, 50 * MS, 1, &["r"]));
    timed.requests(0, 3);
    let mut smaller = batched(2, 50 * MS, 1, &["r"]);
    smaller.version = Version(1, 2);
    timed.it.engine.apply(&smaller);
    timed.it.settle();
    timed.seal();
    let first = timed.take();
    assert_eq!(waiters(&first), [0, 1]);
    let mut single = super::snapshot(3, 1, -1, &["r"]);
    single.version = Version(1, 3);
    timed.it.engine.apply(&single);
    timed.it.settle();
    timed.answer(first);
    timed.it.settle();
    assert_eq!(timed.it.waiters(), [2]);
    assert!(timed.it.engine.seal(timed.now).is_none(), "no alarm is left");
}

#[test]
fn one_that_came_before_the_deployment_batched_starts_no_window_anew() {
    let single = snapshot(1, 100, -1, &["r"]);
    let mut timed = Timed::new(&single);
    timed.it.request(0).expect("no limit");
    let (_, lease) = timed.it.started.remove(0);
    let mut snapshot = batched(8, 10 * MS, 1, &["r"]);
    snapshot.version = Version(1, 2);
    timed.it.engine.apply(&snapshot);
    timed.it.settle();
    timed.requests(1, 1);
    let place = timed.it.engine.busy(lease, 1);
    timed.it.again(place, 0);
    timed.it.engine.credit(timed.it.keys["r"], 1);
    timed.it.settle();
    timed.seal();
    timed.pass(9 * MS);
    assert_eq!((timed.bound(), timed.next), (vec![], Some(timed.now + MS)));
    timed.pass(MS);
    assert_eq!(timed.bound(), [[0, 1]]);
}
