//! Requests whose replica a router in Python chooses, and what a free slot is worth against a backlog.

use super::*;
use crate::snapshot::Policy;

const IDS: [&str; 3] = ["a", "b", "c"];

/// `a`, `b` and `c`, which take two each; the router chooses.
fn routed(n: u64) -> Snapshot {
    let mut known = snapshot(n, 2, -1, &IDS);
    known.deployments.get_mut("a#D").expect("there").router.policy = Policy::Custom;
    known
}

fn driver() -> Driver {
    Driver::linked(&routed(1))
}

impl Driver {
    /// Where one more goes; `+`: to none that has room.
    fn assign(&mut self, ranks: &[&[&str]]) -> String {
        let place = self.request(0).expect("no limit").expect("the router is asked");
        let ranks: Vec<Vec<String>> =
            ranks.iter().map(|rank| rank.iter().map(|id| (*id).to_owned()).collect()).collect();
        let assigned = self.engine.assign(place, &ranks);
        self.settle();
        match assigned {
            Assigned::To(id) => id,
            Assigned::Full => "+".into(),
            Assigned::Over => "over".into(),
        }
    }

    /// It says that it is fast: it may be given a backlog.
    fn speed(&mut self, id: &str) {
        assert_eq!(self.assign(&[&[id]]), id);
        let (_, lease) = self.started.pop().expect("started");
        self.engine.answered(lease, Some((0, true)));
    }
}

#[test]
fn a_free_slot_of_a_lower_rank_goes_before_a_backlog() {
    let mut driver = driver();
    driver.speed("a");
    let all: [&[&str]; 3] = [&["a"], &["b"], &["c"]];
    let taken: String = (0..8).map(|_| driver.assign(&all)).collect();
    assert_eq!(taken, "aabbccaa", "the backlog is used when no rank has a slot, the best rank's first");
    assert_eq!(driver.assign(&[&["b"], &["c"]]), "+");
}

#[test]
fn within_a_rank_the_least_loaded_is_taken() {
    let mut driver = driver();
    driver.speed("b");
    let one: [&[&str]; 1] = [&["b", "c"]];
    let mut taken: Vec<_> = (0..5).map(|_| driver.assign(&one)).collect();
    taken[..4].sort_unstable();
    assert_eq!(taken.concat(), "bbccb");
    assert_eq!(driver.assign(&one), "b");
}

#[test]
fn ranks_may_name_nobody_or_who_is_not_there() {
    let mut driver = driver();
    assert_eq!(driver.assign(&[]), "+");
    assert_eq!(driver.assign(&[&[], &["gone"], &["c"]]), "c");
}

#[test]
fn those_who_wait_when_their_deployment_gets_a_router_are_shown_to_it_once() {
    let mut driver = Driver::new(&snapshot(1, 2, -1, &IDS));
    let place = driver.request(0).expect("no limit").expect("nothing is linked");
    driver.request(1).expect("no limit");
    driver.engine.cancel(place);
    for n in 2..4 {
        driver.engine.apply(&routed(n));
        driver.settle();
    }
    driver.link("a", 2);
    assert_eq!((driver.asked.as_slice(), driver.started.len()), (&[1][..], 0), "it chooses, nobody else");
}
