//! The engine as a driver sees it, in scripted cases; `walk.rs` has random ones, `batches.rs` those of batches.

mod batch_walk;
mod batches;
mod callers;
mod near;
mod own;
mod ranks;
mod traffic;
mod walk;

use std::collections::{BTreeMap, HashMap};

use super::*;
use crate::snapshot::{Snapshot, Version};

fn snapshot(n: u64, max_ongoing: u32, max_queued: i64, replicas: &[&str]) -> Snapshot {
    let replicas: Vec<_> = replicas
        .iter()
        .map(|id| snapshot::Replica {
            id: (*id).into(),
            node_id: "n".into(),
            unix: Some((*id).into()),
            ..Default::default()
        })
        .collect();
    let deployment = snapshot::Deployment {
        app: "a".into(),
        name: "D".into(),
        max_ongoing_requests: max_ongoing,
        max_queued_requests: max_queued,
        backpressure: snapshot::Backpressure::default(),
        retry_idempotent: true,
        router: snapshot::Router::default(),
        unavailable: None,
        batch: None,
        replicas,
    };
    Snapshot {
        version: Version(1, n),
        deployments: BTreeMap::from([("a#D".into(), deployment)]),
        ..Snapshot::default()
    }
}

impl<W> Engine<W> {
    fn queued(&mut self, key: DeploymentKey) -> usize {
        self.deployments.at(key).map_or(0, |deployment| deployment.queue.len())
    }
}

struct Driver {
    engine: Engine<u32>,
    key: DeploymentKey,
    keys: HashMap<String, ReplicaKey>,
    started: Vec<(u32, Lease)>,
    batches: Vec<Batch<u32>>,
    refused: Vec<(u32, Error)>,
    closing: Vec<ReplicaKey>,
    /// Credits given back.
    unused: Vec<ReplicaKey>,
    /// Who was there when their deployment got a router in Python.
    asked: Vec<u32>,
    /// Times that readiness has changed.
    turns: u32,
}

impl Driver {
    fn new(snapshot: &Snapshot) -> Self {
        Self::with(Engine::default(), snapshot)
    }

    fn with(mut engine: Engine<u32>, snapshot: &Snapshot) -> Self {
        engine.apply(snapshot);
        let key = engine.deployment("a#D").unwrap_or(DeploymentKey { index: 0, life: 0 });
        let (keys, started, batches, refused, closing, unused, asked) = Default::default();
        let mut driver = Self { engine, key, keys, started, batches, refused, closing, unused, asked, turns: 0 };
        driver.settle();
        driver
    }

    fn linked(snapshot: &Snapshot) -> Self {
        let mut driver = Self::new(snapshot);
        for replica in &snapshot.deployments["a#D"].replicas {
            driver.link(&replica.id, snapshot.deployments["a#D"].max_ongoing_requests);
        }
        driver
    }

    fn link(&mut self, id: &str, max_ongoing: u32) {
        self.engine.linked(self.keys[id], max_ongoing);
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(action) = self.engine.next_action() {
            match action {
                Action::Start(waiter, lease) => self.started.push((waiter, lease)),
                Action::Batch(batch) => self.batches.push(batch),
                Action::Refuse(waiter, error) => self.refused.push((waiter, error)),
                Action::Open(key, address) => drop(self.keys.insert(address.id, key)),
                Action::Close(key) => self.closing.push(key),
                Action::Unused(key, count) => self.unused.extend((0..count).map(|_| key)),
                Action::Ask(key) => self.asked.extend(self.engine.waiters(key)),
                Action::Readiness => self.turns += 1,
            }
        }
    }

    fn request(&mut self, waiter: u32) -> Result<Option<Place>, Error> {
        Ok(match self.engine.request(self.key, Affinity::default(), |_| waiter)? {
            Admission::Go(lease) => {
                self.started.push((waiter, lease));
                None
            }
            Admission::Wait(place) => Some(place),
        })
    }

    fn again(&mut self, place: Place, waiter: u32) {
        if let Admission::Go(lease) = self.engine.again(place, |_| waiter).expect("declared") {
            self.started.push((waiter, lease));
        }
        self.settle();
    }

    fn waiters(&self) -> Vec<u32> {
        self.started.iter().map(|(waiter, _)| *waiter).collect()
    }

    fn finish_first(&mut self) -> u32 {
        let (waiter, lease) = self.started.remove(0);
        self.engine.answered(lease, Some((0, false)));
        self.settle();
        waiter
    }
}

#[test]
fn requests_wait_for_the_first_replica_and_start_in_order() {
    let mut driver = Driver::new(&snapshot(1, 2, -1, &["r"]));
    for waiter in 0..4 {
        assert!(driver.request(waiter).expect("no limit").is_some());
    }
    driver.link("r", 2);
    assert_eq!(driver.waiters(), [0, 1]);
    driver.finish_first();
    assert_eq!(driver.waiters(), [1, 2]);
}

#[test]
fn a_full_queue_refuses_with_its_numbers() {
    let mut driver = Driver::linked(&snapshot(1, 1, 2, &["r"]));
    for waiter in 0..3 {
        driver.request(waiter).expect("one runs, two wait");
    }
    let policy = snapshot::Backpressure::default();
    assert_eq!(driver.request(3), Err(Error::Backpressure { queued: 2, limit: 2, policy }));
}

#[test]
fn a_busy_answer_waits_for_its_credit_and_keeps_its_place() {
    let mut driver = Driver::linked(&snapshot(1, 2, -1, &["r"]));
    for waiter in 0..3 {
        driver.request(waiter).expect("no limit");
    }
    let (waiter, lease) = driver.started.remove(0);
    let place = driver.engine.busy(lease, 5);
    driver.again(place, waiter);
    assert_eq!(driver.waiters(), [1], "nobody is sent before a credit comes");
    driver.engine.credit(driver.keys["r"], 1);
    driver.settle();
    assert_eq!(driver.waiters(), [1, 0], "the refused one goes first");
    assert!(driver.started[1].1.granted);
}

#[test]
fn credits_that_nobody_needs_go_back() {
    let mut driver = Driver::linked(&snapshot(1, 2, -1, &["r"]));
    driver.request(0).expect("room");
    let (_, lease) = driver.started.remove(0);
    driver.engine.busy(lease, 5);
    driver.engine.credit(driver.keys["r"], 2);
    driver.settle();
    assert_eq!(driver.unused.len(), 2);
}

#[test]
fn drain_outranks_a_later_snapshot() {
    let mut driver = Driver::linked(&snapshot(1, 2, -1, &["r", "s"]));
    driver.engine.draining(driver.keys["r"]);
    driver.engine.apply(&snapshot(2, 2, -1, &["r", "s"]));
    driver.settle();
    for waiter in 0..4 {
        driver.request(waiter).expect("no limit");
    }
    assert_eq!(driver.started.len(), 2);
    assert!(driver.started.iter().all(|(_, lease)| lease.replica == driver.keys["s"]));
    assert!(!driver.engine.closed(driver.keys["r"]), "not linked again");
}

#[test]
fn a_returned_request_goes_elsewhere_at_its_old_place() {
    let mut driver = Driver::linked(&snapshot(1, 1, -1, &["r", "s"]));
    for waiter in 0..3 {
        driver.request(waiter).expect("no limit");
    }
    let (waiter, lease) = driver.started.remove(0);
    let other = lease.replica;
    let place = driver.engine.returned(lease);
    driver.again(place, waiter);
    driver.finish_first();
    assert_eq!(driver.waiters(), [0], "ahead of the one that arrived later");
    assert_ne!(driver.started[0].1.replica, other);
}

#[test]
fn a_dead_link_takes_its_leases_with_it() {
    let mut driver = Driver::linked(&snapshot(1, 1, -1, &["r"]));
    driver.request(0).expect("room");
    assert!(driver.engine.closed(driver.keys["r"]), "still wanted");
    driver.link("r", 1);
    driver.request(1).expect("room again");
    assert_eq!(driver.waiters(), [0, 1]);
    let (_, stale) = driver.started.remove(0);
    driver.engine.answered(stale, None);
    assert!(driver.request(2).expect("no limit").is_some(), "a stale lease frees nothing");
}

#[test]
fn a_replica_that_left_the_snapshot_is_closed_and_finishes_its_work() {
    let mut driver = Driver::linked(&snapshot(1, 1, -1, &["r"]));
    driver.request(0).expect("room");
    driver.engine.apply(&snapshot(2, 1, -1, &["s"]));
    driver.settle();
    assert_eq!(driver.closing, [driver.keys["r"]]);
    driver.request(1).expect("waits");
    assert_eq!(driver.finish_first(), 0);
    assert!(driver.started.is_empty(), "the leaving one takes no more");
    assert!(!driver.engine.closed(driver.keys["r"]));
    driver.link("s", 1);
    assert_eq!(driver.waiters(), [1]);
}

#[test]
fn a_deleted_deployment_refuses_those_who_wait() {
    let mut driver = Driver::new(&snapshot(1, 1, -1, &[]));
    driver.request(0).expect("waits");
    driver.engine.apply(&Snapshot { version: Version(1, 2), ..Snapshot::default() });
    driver.settle();
    assert!(matches!(&driver.refused[..], [(0, Error::Deleted(_))]));
    assert!(matches!(driver.request(1), Err(Error::Deleted(_))));
    assert_eq!(driver.engine.deployment("a#D"), None);
}

#[test]
fn deployments_that_come_and_go_leave_nothing_behind() {
    let mut driver = Driver::new(&Snapshot::default());
    for n in 0..1000 {
        let mut next = snapshot(n, 1, -1, &["r"]);
        let deployment = next.deployments.remove("a#D").expect("there");
        next.deployments.insert(format!("a{n}#D"), deployment);
        driver.engine.apply(&next);
        driver.settle();
        driver.key = driver.engine.deployment(&format!("a{n}#D")).expect("declared");
        driver.link("r", 1);
        driver.request(0).expect("runs");
        driver.request(1).expect("waits");
        driver.engine.apply(&Snapshot::default());
        driver.settle();
        assert!(driver.engine.config(driver.key).is_none());
        assert!(driver.started.len() == 1 && driver.refused.len() == 1);
        driver.finish_first();
        driver.refused.clear();
        assert!(!driver.engine.closed(driver.closing.remove(0)));
    }
    let Engine { deployments, by_name, replicas, by_id, actions, .. } = &driver.engine;
    assert!(deployments.0.is_empty() && by_name.is_empty() && replicas.is_empty() && by_id.is_empty());
    assert!(actions.is_empty() && deployments.0.capacity() < 16 && replicas.capacity() < 16);
}

#[test]
fn a_request_that_outlives_its_deployment_meets_no_other() {
    let mut driver = Driver::new(&snapshot(1, 1, -1, &[]));
    let place = driver.request(0).expect("waits").expect("waits");
    let old = driver.key;
    driver.engine.apply(&Snapshot::default());
    driver.engine.apply(&snapshot(2, 1, -1, &[]));
    driver.key = driver.engine.deployment("a#D").expect("declared again");
    driver.request(1).expect("waits");
    assert_eq!(driver.engine.cancel(place), None, "neither the old request nor the new one at its place");
    assert!(matches!(driver.engine.again(place, |_| 0), Err(Error::Deleted(_))));
    assert!(matches!(driver.engine.request(old, Affinity::default(), |_| 2), Err(Error::Deleted(_))));
    assert_eq!((driver.engine.queued(old), driver.engine.queued(driver.key)), (0, 1));
}

#[test]
fn a_failed_deployment_refuses_with_its_sentence_until_it_serves_again() {
    let mut failed = snapshot(2, 1, -1, &[]);
    failed.deployments.get_mut("a#D").expect("there").unavailable = Some("It failed.".into());
    let mut driver = Driver::new(&snapshot(1, 1, -1, &[]));
    driver.request(0).expect("waits");
    driver.engine.apply(&failed);
    driver.settle();
    assert_eq!(driver.refused, [(0, Error::Unavailable("It failed.".into()))]);
    driver.engine.apply(&snapshot(3, 1, -1, &["r"]));
    driver.settle();
    driver.link("r", 1);
    assert_eq!(driver.request(1), Ok(None));
}

#[test]
fn a_silent_replica_gets_nothing_until_it_answers() {
    let mut driver = Driver::linked(&snapshot(1, 1, -1, &["r"]));
    driver.engine.silent(driver.keys["r"], true);
    assert!(driver.request(0).expect("no limit").is_some());
    driver.engine.silent(driver.keys["r"], false);
    driver.settle();
    assert_eq!(driver.waiters(), [0]);
}

#[test]
fn a_lease_that_is_not_used_gives_its_credit_back() {
    let mut driver = Driver::linked(&snapshot(1, 1, -1, &["r"]));
    driver.request(0).expect("room");
    let (waiter, lease) = driver.started.remove(0);
    let place = driver.engine.busy(lease, 5);
    driver.again(place, waiter);
    driver.request(1).expect("waits");
    driver.engine.credit(driver.keys["r"], 1);
    driver.settle();
    let (_, lease) = driver.started.remove(0);
    driver.engine.unsent(lease);
    driver.settle();
    assert!(driver.started[0].1.granted, "the next one uses the credit");
    let (waiter, lease) = driver.started.remove(0);
    assert_eq!((waiter, driver.unused.len()), (1, 0));
    driver.engine.unsent(lease);
    driver.settle();
    assert_eq!(driver.unused.len(), 1, "nobody is left to use it: the replica must have it back");
}

#[test]
fn whoever_cancels_leaves_the_queue() {
    let mut driver = Driver::new(&snapshot(1, 1, -1, &[]));
    let place = driver.request(1).expect("waits").expect("waits");
    assert_eq!(driver.engine.cancel(place), Some(1));
    assert_eq!(driver.engine.cancel(place), None);
    assert_eq!(driver.engine.queued(driver.key), 0);
}
