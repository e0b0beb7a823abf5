//! Sessions whose own replica is still being linked to, and everybody else meanwhile.

use super::*;
use crate::snapshot::Policy;

const IDS: [&str; 4] = ["a", "b", "c", "d"];

fn session() -> Affinity {
    Affinity::new(b"", b"u0")
}

/// Nothing is linked yet; the ids, the session's own first, then the one that would be next, and so on.
fn fresh(policy: Policy, max_queued: i64) -> (Driver, Vec<&'static str>) {
    let mut known = snapshot(1, 2, max_queued, &IDS);
    known.deployments.get_mut("a#D").expect("there").router.policy = policy;
    let driver = Driver::new(&known);
    let mut ids = IDS.to_vec();
    ids.sort_by_key(|id| std::cmp::Reverse(affinity::score(session().session, affinity::key(id.as_bytes()))));
    (driver, ids)
}

impl Driver {
    fn queue(&mut self, wish: Affinity, waiter: u32) -> Place {
        match self.engine.request(self.key, wish, |_| waiter) {
            Ok(Admission::Wait(place)) => place,
            other => panic!("it does not wait: {other:?}"),
        }
    }

    /// The replicas of those that were started, in order.
    fn places(&self) -> Vec<(u32, ReplicaKey)> {
        self.started.iter().map(|(waiter, lease)| (*waiter, lease.replica)).collect()
    }

    fn fail(&mut self, id: &str) {
        assert!(self.engine.closed(self.keys[id]), "still wanted");
        self.settle();
    }
}

const POLICIES: [Policy; 4] = [Policy::LeastLoaded, Policy::PowerOfTwo, Policy::RoundRobin, Policy::ConsistentHash];

#[test]
fn a_session_waits_for_the_first_link_to_its_own_replica() {
    for policy in POLICIES {
        let (mut driver, ids) = fresh(policy, -1);
        driver.link(ids[1], 2);
        driver.queue(session(), 0);
        driver.link(ids[3], 2);
        driver.queue(session(), 1);
        assert_eq!(driver.places(), [], "{policy:?}");
        driver.link(ids[0], 2);
        let own = driver.keys[ids[0]];
        assert_eq!(driver.places(), [(0, own), (1, own)], "{policy:?}");
    }
}

#[test]
fn turns_are_taken_by_all_from_the_first_call_on() {
    let (mut driver, _) = fresh(Policy::RoundRobin, -1);
    for id in ["a", "b", "c"] {
        driver.link(id, 2);
    }
    for waiter in 0..4 {
        driver.queue(Affinity::default(), waiter);
    }
    assert_eq!(driver.places(), [], "one is still on the way");
    driver.link("d", 2);
    let mut taken: Vec<_> = driver.places().iter().map(|(_, replica)| replica.index()).collect();
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), 4);
}

#[test]
fn turns_do_not_wait_for_one_that_cannot_be_reached() {
    let (mut driver, _) = fresh(Policy::RoundRobin, -1);
    for id in ["a", "b", "c"] {
        driver.link(id, 2);
    }
    driver.queue(Affinity::default(), 0);
    driver.fail("d");
    assert_eq!(driver.places().len(), 1);
    assert!(driver.ask(Affinity::default()).is_some(), "nobody waits for the next attempt");
}

#[test]
fn an_attempt_that_fails_ends_the_wait_for_good() {
    let (mut driver, ids) = fresh(Policy::LeastLoaded, -1);
    driver.link(ids[1], 2);
    driver.queue(session(), 0);
    driver.fail(ids[0]);
    assert_eq!(driver.places(), [(0, driver.keys[ids[1]])]);
    assert_eq!(driver.ask(session()), Some(ids[1]), "nobody waits for the next attempt");
    driver.link(ids[0], 2);
    assert_eq!(driver.ask(session()), Some(ids[0]));
}

#[test]
fn the_next_owner_is_waited_for_too() {
    let (mut driver, ids) = fresh(Policy::LeastLoaded, -1);
    driver.link(ids[2], 2);
    driver.queue(session(), 0);
    driver.fail(ids[0]);
    assert_eq!(driver.places(), []);
    driver.link(ids[1], 2);
    assert_eq!(driver.places(), [(0, driver.keys[ids[1]])]);
}

#[test]
fn nobody_waits_for_one_that_was_lost_drains_or_has_left() {
    let end: [fn(&mut Driver, &str, &[&str]); 3] = [
        |driver, own, _| {
            driver.link(own, 2);
            driver.fail(own);
        },
        |driver, own, _| driver.engine.draining(driver.keys[own]),
        |driver, _, others| driver.engine.apply(&snapshot(2, 2, -1, others)),
    ];
    for end in end {
        let (mut driver, ids) = fresh(Policy::LeastLoaded, -1);
        driver.link(ids[1], 2);
        end(&mut driver, ids[0], &ids[1..]);
        driver.settle();
        assert_eq!(driver.ask(session()), Some(ids[1]));
    }
    for end in &end[1..] {
        let (mut driver, ids) = fresh(Policy::LeastLoaded, -1);
        driver.link(ids[1], 2);
        driver.queue(session(), 0);
        end(&mut driver, ids[0], &ids[1..]);
        driver.settle();
        assert_eq!(driver.places(), [(0, driver.keys[ids[1]])], "also those who wait already");
    }
}

#[test]
fn whoever_has_no_session_passes_those_who_wait_for_theirs() {
    let (mut driver, ids) = fresh(Policy::LeastLoaded, -1);
    driver.queue(session(), 0);
    driver.queue(Affinity::default(), 1);
    driver.queue(session(), 2);
    driver.queue(Affinity::new(b"m", b""), 3);
    driver.link(ids[1], 2);
    let other = driver.keys[ids[1]];
    assert_eq!(driver.places(), [(1, other), (3, other)], "a model may be loaded anywhere");
    driver.finish_first();
    assert_eq!(driver.ask(Affinity::default()), Some(ids[1]), "nobody stands before it");
    driver.started.clear();
    driver.link(ids[0], 2);
    let own = driver.keys[ids[0]];
    assert_eq!(driver.places(), [(0, own), (2, own)], "in their order");
}

#[test]
fn one_that_waits_for_its_own_can_be_cancelled_and_is_refused_with_its_deployment() {
    let (mut driver, ids) = fresh(Policy::LeastLoaded, -1);
    driver.link(ids[1], 2);
    let place = driver.queue(session(), 0);
    assert_eq!((driver.engine.cancel(place), driver.engine.cancel(place)), (Some(0), None));
    driver.queue(session(), 1);
    driver.engine.apply(&Snapshot::default());
    driver.settle();
    assert!(matches!(&driver.refused[..], [(1, Error::Deleted(_))]));
}

#[test]
fn where_no_more_may_wait_a_session_goes_elsewhere() {
    let (mut driver, ids) = fresh(Policy::LeastLoaded, 1);
    driver.link(ids[1], 2);
    driver.queue(session(), 0);
    assert_eq!(driver.ask(session()), Some(ids[1]));
    assert_eq!(driver.engine.queued(driver.key), 1);
}

#[test]
fn a_slot_for_a_session_is_not_reserved_elsewhere_meanwhile() {
    let (mut driver, ids) = fresh(Policy::LeastLoaded, -1);
    driver.link(ids[1], 2);
    let reserve = |driver: &mut Driver, wish| {
        let lease = driver.engine.reserve(driver.key, wish, None::<&[Vec<String>]>).expect("declared")?;
        let replica = lease.replica;
        driver.engine.unsent(lease);
        Some(replica)
    };
    assert_eq!(reserve(&mut driver, session()), None);
    assert_eq!(reserve(&mut driver, Affinity::default()), Some(driver.keys[ids[1]]));
    driver.link(ids[0], 2);
    assert_eq!(reserve(&mut driver, session()), Some(driver.keys[ids[0]]));
}
