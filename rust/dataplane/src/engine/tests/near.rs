//! Requests that would like a replica of the caller's own node, in a cluster of two nodes.

use super::*;
use crate::snapshot::Policy;

/// `a` and `b` run on the caller's node, `c` and `d` do not; each takes two.
fn driver(policy: Policy) -> Driver {
    in_two_nodes(policy, false)
}

fn in_two_nodes(policy: Policy, near_first: bool) -> Driver {
    let mut known = snapshot(1, 2, -1, &["c", "a", "d", "b"]);
    let deployment = known.deployments.get_mut("a#D").expect("there");
    deployment.router.policy = policy;
    for replica in &mut deployment.replicas {
        replica.node_id = if matches!(&*replica.id, "a" | "b") { "here" } else { "there" }.into();
    }
    let mut driver = Driver::with(Engine::default().on("here".into(), near_first), &known);
    for id in ["a", "b", "c", "d"] {
        driver.link(id, 2);
    }
    driver
}

impl Driver {
    pub(super) fn ask(&mut self, wish: Affinity) -> Option<&str> {
        let Ok(Admission::Go(lease)) = self.engine.request(self.key, wish, |_| 0) else { return None };
        let key = lease.replica;
        self.started.push((0, lease));
        self.keys.iter().find(|(_, other)| **other == key).map(|(id, _)| &**id)
    }

    fn ask_all(&mut self, wish: Affinity, count: usize) -> String {
        let mut ids: Vec<_> = (0..count).map(|_| self.ask(wish).unwrap_or("-").to_owned()).collect();
        ids.sort_unstable();
        ids.concat()
    }
}

#[test]
fn replicas_of_the_callers_node_come_first_and_then_the_others() {
    for policy in [Policy::LeastLoaded, Policy::PowerOfTwo, Policy::RoundRobin, Policy::ConsistentHash] {
        let (mut driver, near) = (driver(policy), Affinity::default().or_near(true));
        assert_eq!(driver.ask_all(near, 2), "ab", "{policy:?}: equals take turns");
        assert_eq!(driver.ask_all(near, 2), "ab", "{policy:?}: as long as they have room, though the others are idle");
        assert_eq!(driver.ask_all(near, 4), "ccdd", "{policy:?}: nobody waits while any replica has room");
        assert_eq!(driver.ask(near), None);
    }
}

#[test]
fn whoever_does_not_ask_for_it_is_spread_over_all_nodes() {
    let mut driver = driver(Policy::LeastLoaded);
    assert_eq!(driver.ask_all(Affinity::default().or_near(false), 4), "abcd");
}

#[test]
fn a_model_or_a_session_outranks_the_node() {
    for wish in [Affinity::new(b"m", b""), Affinity::new(b"", b"s")] {
        let (mut one, mut two) = (driver(Policy::LeastLoaded), driver(Policy::LeastLoaded));
        assert!(!wish.or_near(true).is_near());
        assert_eq!(one.ask(wish), two.ask(wish.or_near(true)));
    }
}

#[test]
fn one_that_had_to_wait_still_goes_to_its_node_if_both_have_room() {
    let mut driver = driver(Policy::LeastLoaded);
    driver.ask_all(Affinity::default(), 8);
    let near = Affinity::default().or_near(true);
    let Ok(Admission::Wait(place)) = driver.engine.request(driver.key, near, |_| 1) else { panic!("there is room") };
    assert_eq!(driver.engine.cancel(place), Some(1));
    while !driver.started.is_empty() {
        driver.finish_first();
    }
    let Ok(Admission::Go(lease)) = driver.engine.again(place, |_| 1) else { panic!("there is no room") };
    assert!([driver.keys["a"], driver.keys["b"]].contains(&lease.replica));
    driver.started.push((1, lease));
}

#[test]
fn where_all_go_to_their_node_first_the_policies_that_do_more_than_balance_stand() {
    let nobody = Affinity::default();
    for policy in [Policy::LeastLoaded, Policy::PowerOfTwo] {
        let mut driver = in_two_nodes(policy, true);
        assert_eq!(
            (driver.ask_all(nobody, 4), driver.ask_all(nobody, 4)),
            ("aabb".into(), "ccdd".into()),
            "{policy:?}"
        );
    }
    let mut driver = in_two_nodes(Policy::RoundRobin, true);
    assert_eq!(driver.ask_all(nobody, 4), "abcd");
}

/// All replicas of the caller's node have two requests, and may be given more.
fn with_backlogs(near_first: bool) -> Driver {
    let mut driver = in_two_nodes(Policy::LeastLoaded, near_first);
    let near = Affinity::default().or_near(true);
    assert_eq!(driver.ask_all(near, 2), "ab");
    for (_, lease) in std::mem::take(&mut driver.started) {
        driver.engine.answered(lease, Some((0, true)));
    }
    assert_eq!(driver.ask_all(near, 4), "aabb");
    driver
}

#[test]
fn a_free_slot_elsewhere_goes_before_a_backlog_here() {
    for wish in [Affinity::default(), Affinity::default().or_near(true)] {
        let mut driver = with_backlogs(wish.is_none());
        assert_eq!(driver.ask_all(wish, 4), "ccdd");
        assert_eq!(driver.ask_all(wish, 2), "ab", "and a backlog before waiting");
    }
}

#[test]
fn a_backlog_here_goes_before_a_replica_elsewhere_that_others_fill() {
    for wish in [Affinity::default(), Affinity::default().or_near(true)] {
        let mut driver = with_backlogs(wish.is_none());
        for id in ["c", "d"] {
            driver.engine.replicas[driver.keys[id].0].report(2, false);
        }
        assert_eq!(driver.ask_all(wish, 2), "ab");
    }
}

#[test]
fn nothing_is_nearer_on_one_node() {
    for here in ["n", "elsewhere"] {
        let mut driver = Driver::with(Engine::default().on(here.into(), true), &snapshot(1, 1, -1, &["r", "s"]));
        let key = driver.key;
        assert_eq!(driver.engine.deployments.at(key).expect("there").picker.rule, Rule::default());
    }
}

#[test]
fn an_engine_without_a_node_knows_of_none_nearby() {
    let mut driver = Driver::linked(&snapshot(1, 1, -1, &["r", "s"]));
    assert_eq!(driver.ask_all(Affinity::default().or_near(true), 2), "rs");
}
