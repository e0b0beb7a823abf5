//! Which targets of a split are ready, and what becomes of requests while none is.

use super::*;
use crate::engine::Turn;

fn two_targets(n: u64, replicas: &[&str], weights: [f64; 2]) -> Snapshot {
    let mut snapshot = snapshot(n, 5, -1, replicas);
    let target =
        |(name, weight): (&str, f64)| snapshot::Target { name: name.into(), deployment: format!("{name}#D"), weight };
    let targets = ["a", "b"].into_iter().zip(weights).map(target).collect();
    snapshot.splits.insert("/x".into(), snapshot::Split { targets, ..snapshot::Split::default() });
    snapshot
}

fn turn(driver: &mut Driver) -> Result<Turn, Error> {
    let key = driver.engine.split("/x").expect("it is there");
    driver.engine.choose(key, |splitter| splitter.choose(|_| None))
}

#[test]
fn a_target_is_ready_while_a_replica_takes_requests() {
    let mut driver = Driver::new(&two_targets(1, &["r"], [0.5, 0.5]));
    assert_eq!(turn(&mut driver), Ok(Turn::Wait(Some(0))), "not linked; b is missing");
    let before = driver.turns;
    driver.link("r", 5);
    assert_eq!(driver.turns, before + 1);
    assert!((0..4).all(|_| turn(&mut driver) == Ok(Turn::To(0))));
    driver.engine.silent(driver.keys["r"], true);
    assert_eq!(turn(&mut driver), Ok(Turn::Wait(Some(0))));
    driver.engine.silent(driver.keys["r"], false);
    assert_eq!(turn(&mut driver), Ok(Turn::To(0)));
    driver.engine.draining(driver.keys["r"]);
    assert_eq!(turn(&mut driver), Ok(Turn::Wait(Some(0))));
    driver.settle();
    assert_eq!(driver.turns, before + 4, "each time whoever waits is told");
}

#[test]
fn a_link_that_ends_and_a_replica_that_is_not_listed_any_more_make_a_target_unready() {
    for unlisted in [false, true] {
        let mut driver = Driver::linked(&two_targets(1, &["r"], [1.0, 0.0]));
        assert_eq!(turn(&mut driver), Ok(Turn::To(0)));
        if unlisted {
            driver.engine.apply(&two_targets(2, &[], [1.0, 0.0]));
        } else {
            driver.engine.closed(driver.keys["r"]);
        }
        assert_eq!(turn(&mut driver), Ok(Turn::Wait(Some(0))));
    }
}

#[test]
fn without_any_deployment_a_request_waits_nowhere_and_without_weight_it_is_refused() {
    let mut snapshot = two_targets(1, &[], [0.0, 0.0]);
    let mut driver = Driver::new(&snapshot);
    let refused = turn(&mut driver).expect_err("no weight");
    assert!(matches!(&refused, Error::Unavailable(text) if text.contains("'/x'")), "{refused}");
    snapshot = two_targets(2, &[], [0.0, 1.0]);
    driver.engine.apply(&snapshot);
    assert_eq!(turn(&mut driver), Ok(Turn::Wait(None)));
    snapshot.splits.clear();
    driver.engine.apply(&snapshot);
    assert_eq!(driver.engine.split("/x"), None);
}

#[test]
fn only_when_all_targets_have_failed_requests_are_refused_with_their_sentence() {
    let mut snapshot = two_targets(1, &[], [0.5, 0.5]);
    let failed = |snapshot: &mut Snapshot| {
        snapshot.deployments.get_mut("a#D").expect("it").unavailable = Some("It failed.".into());
    };
    failed(&mut snapshot);
    let mut driver = Driver::new(&snapshot);
    assert_eq!(turn(&mut driver), Ok(Turn::Wait(None)), "b may still come");
    snapshot = two_targets(2, &[], [1.0, 0.0]);
    failed(&mut snapshot);
    driver.engine.apply(&snapshot);
    assert_eq!(turn(&mut driver), Err(Error::Unavailable("It failed.".into())));
}

#[test]
fn a_key_of_an_earlier_snapshot_leads_nowhere() {
    let mut driver = Driver::linked(&two_targets(1, &["r"], [1.0, 0.0]));
    let key = driver.engine.split("/x").expect("it is there");
    driver.engine.apply(&two_targets(2, &["r"], [1.0, 0.0]));
    let stale = driver.engine.choose(key, |splitter| splitter.choose(|_| None)).expect_err("stale");
    assert_eq!((stale.retry(), driver.engine.target(key, 0)), (crate::error::Retry::Reroute, None));
    assert_eq!(turn(&mut driver), Ok(Turn::To(0)));
}

#[test]
fn a_session_keeps_its_target() {
    let mut driver = Driver::linked(&two_targets(1, &["r"], [0.5, 0.0]));
    let key = driver.engine.split("/x").expect("it is there");
    assert_eq!(driver.engine.choose_for(key, Affinity::new(b"", b"s")), Ok(Turn::To(0)));
}
