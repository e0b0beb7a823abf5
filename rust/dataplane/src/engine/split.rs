//! Which target of a split takes a request: rules first, then sticky, then the exact schedule of shares.
//!
//! Pure: it is told which targets are ready, reads what a request shows through a function, and allocates nothing a request.
//! A target that is not ready gets nothing, also not by a rule or because it was a visitor's. Sticky values go by weighted
//! rendezvous hashing: a visitor moves from one target to another only if the other's weight has grown in proportion to
//! the first's, or while the first is not ready. The hash is fixed and salted with the split's name, so that all proxies
//! and handles agree, and different splits do not send the same visitors to the canary. Requests that rules or stickiness
//! have placed do not count in the schedule.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    affinity::{key, score},
    schedule::{Schedule, Schedules, Seat},
};
use crate::snapshot::{self, Sign};

/// See the module. Targets are known by their index in the snapshot's list.
#[derive(Debug)]
pub struct Splitter {
    targets: Vec<Target>,
    schedule: Arc<Mutex<Schedule>>,
    /// Of the targets, there.
    seats: Vec<Seat>,
    /// Their weights, 0 of those that are not ready.
    weights: Vec<f64>,
    sticky: Option<Sign>,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Target {
    name: String,
    weight: f64,
    /// What makes its part of the visitors.
    seed: u64,
    ready: bool,
}

impl Target {
    fn takes(&self) -> bool {
        self.ready && self.weight > 0.0
    }
}

#[derive(Debug)]
struct Rule {
    sign: Sign,
    value: Option<String>,
    target: usize,
}

impl Splitter {
    /// As the snapshot has it, going on in the schedule of its name. Nothing is ready yet.
    pub fn new(name: &str, split: &snapshot::Split, schedules: &Schedules) -> Self {
        let salt = key(name.as_bytes());
        let target = |target: &snapshot::Target| Target {
            name: target.name.clone(),
            weight: target.weight,
            seed: score(salt, key(target.name.as_bytes())),
            ready: false,
        };
        let targets: Vec<_> = split.targets.iter().map(target).collect();
        let at = |all: &[Target], name: &str| all.iter().position(|target| target.name == name);
        let schedule = schedules.of(name);
        let seats = {
            let mut schedule = schedule.lock().unwrap_or_else(PoisonError::into_inner);
            targets.iter().map(|target| schedule.seat(&target.name)).collect()
        };
        let weights = vec![0.0; targets.len()];
        let rule = |rule: &snapshot::Rule| {
            let target = at(&targets, &rule.target)?;
            Some(Rule { sign: rule.sign.clone(), value: rule.value.clone(), target })
        };
        let rules = split.rules.iter().filter_map(rule).collect();
        Self { targets, schedule, seats, weights, sticky: split.sticky.clone(), rules }
    }

    /// Takes note of which targets have a ready replica; returns whether that has changed.
    pub fn note_ready(&mut self, is_ready: impl Fn(usize) -> bool) -> bool {
        let mut changed = false;
        for (at, target) in self.targets.iter_mut().enumerate() {
            let ready = is_ready(at);
            changed |= std::mem::replace(&mut target.ready, ready) != ready;
        }
        let weight = |target: &Target| if target.takes() { target.weight } else { 0.0 };
        self.weights = self.targets.iter().map(weight).collect();
        changed
    }

    /// Whether a request finds a target now.
    pub fn is_ready(&self) -> bool {
        self.targets.iter().any(Target::takes)
    }

    /// The indices of targets with a weight, the heaviest first.
    pub fn weighted(&self) -> Vec<usize> {
        let mut weighted: Vec<_> = (0..self.targets.len()).filter(|&at| self.targets[at].weight > 0.0).collect();
        weighted.sort_by(|&a, &b| self.targets[b].weight.total_cmp(&self.targets[a].weight));
        weighted
    }

    /// The target of a request of which `read` tells what it carries; `None`: no target is ready.
    pub fn choose<'r>(&mut self, read: impl Fn(&Sign) -> Option<&'r [u8]>) -> Option<usize> {
        let holds = |rule: &&Rule| match (read(&rule.sign), &rule.value) {
            (Some(found), Some(value)) => found == value.as_bytes(),
            (found, None) => found.is_some(),
            (None, Some(_)) => false,
        };
        let ruled = self.rules.iter().filter(|rule| self.targets[rule.target].ready).find(holds);
        if let Some(rule) = ruled {
            return Some(rule.target);
        }
        let visitor = self.sticky.as_ref().and_then(read).map_or(0, key);
        self.choose_for(visitor)
    }

    /// The target of whoever comes with this value, [`key`] of it; 0: without one.
    pub(super) fn choose_for(&mut self, visitor: u64) -> Option<usize> {
        if visitor == 0 {
            let mut schedule = self.schedule.lock().unwrap_or_else(PoisonError::into_inner);
            return schedule.turn(&self.seats, &self.weights);
        }
        let takers = self.targets.iter().enumerate().filter(|(_, target)| target.takes());
        let appeals = takers.map(|(at, target)| (at, target.weight / -unit(score(visitor, target.seed)).ln()));
        appeals.max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(at, _)| at)
    }
}

/// A hash as a number above 0 and below 1.
#[expect(clippy::cast_precision_loss, reason = "52 bits are exact")]
fn unit(hash: u64) -> f64 {
    ((hash >> 12) as f64 + 0.5) / (1_u64 << 52) as f64
}

/// The value of a cookie in a `Cookie` header.
pub fn cookie<'h>(header: &'h [u8], name: &str) -> Option<&'h [u8]> {
    header.split(|&byte| byte == b';').find_map(|pair| {
        let value = pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn split(targets: &[(&str, f64)], more: &serde_json::Value) -> snapshot::Split {
        let target =
            |(name, weight): &(&str, f64)| json!({"name": name, "deployment": format!("{name}#D"), "weight": weight});
        let mut value = json!({"targets": targets.iter().map(target).collect::<Vec<_>>()});
        let extend = |map: &mut serde_json::Map<_, _>| map.extend(more.as_object().expect("an object").clone());
        extend(value.as_object_mut().expect("an object"));
        serde_json::from_value(value).expect("valid")
    }

    fn splitter(targets: &[(&str, f64)], more: &serde_json::Value) -> Splitter {
        let mut splitter = Splitter::new("/x", &split(targets, more), &Schedules::default());
        splitter.note_ready(|_| true);
        splitter
    }

    fn sticky() -> serde_json::Value {
        json!({"sticky": {"header": "x-user"}})
    }

    fn home(splitter: &mut Splitter, user: &str) -> usize {
        splitter.choose(|sign| (*sign == Sign::Header("x-user".into())).then_some(user.as_bytes())).expect("ready")
    }

    #[test]
    fn the_first_rule_that_holds_wins_and_may_name_a_target_without_weight() {
        let rules = json!({"rules": [{"header": "x-canary", "value": "1", "target": "b"},
            {"cookie": "beta", "value": null, "target": "c"}]});
        let mut splitter = splitter(&[("a", 1.0), ("b", 0.0), ("c", 0.0)], &rules);
        let mut at = |header: Option<&'static str>, cookie: Option<&'static str>| {
            splitter.choose(|sign| match sign {
                Sign::Header(_) => header.map(str::as_bytes),
                Sign::Cookie(_) => cookie.map(str::as_bytes),
            })
        };
        assert_eq!(at(None, None), Some(0));
        assert_eq!(at(Some("1"), None), Some(1));
        assert_eq!(at(Some("2"), None), Some(0));
        assert_eq!(at(None, Some("")), Some(2));
        assert_eq!(at(Some("1"), Some("x")), Some(1));
    }

    #[test]
    fn who_is_not_ready_gets_nothing_not_even_by_a_rule_or_a_habit() {
        let rules =
            json!({"sticky": {"header": "x-user"}, "rules": [{"header": "x-user", "value": "vip", "target": "b"}]});
        let mut splitter = splitter(&[("a", 1.0), ("b", 9.0)], &rules);
        assert!(splitter.note_ready(|at| at == 0));
        assert!((0..50).all(|i| home(&mut splitter, &format!("u{i}")) == 0));
        assert_eq!(home(&mut splitter, "vip"), 0);
        assert!(!splitter.note_ready(|at| at == 0), "nothing has changed");
        splitter.note_ready(|_| false);
        assert_eq!((splitter.choose(|_| None), splitter.is_ready()), (None, false));
    }

    #[test]
    fn the_schedule_goes_on_over_new_snapshots_and_readiness() {
        let weights = [("a", 0.7), ("b", 0.2), ("c", 0.1)];
        let schedules = Schedules::default();
        let mut splitter = Splitter::new("/x", &split(&weights, &json!({})), &schedules);
        splitter.note_ready(|_| true);
        let mut counts = [0; 3];
        for round in 0..500 {
            counts[splitter.choose(|_| None).expect("ready")] += 1;
            if round % 3 == 0 {
                drop(splitter); // as if a snapshot in between did not hold it
                splitter = Splitter::new("/x", &split(&weights, &json!({})), &schedules);
                splitter.note_ready(|_| true);
            }
        }
        for (count, (_, weight)) in counts.into_iter().zip(weights) {
            assert!((f64::from(count) - 500.0 * weight).abs() <= 2.0, "{counts:?}");
        }
    }

    #[test]
    fn splits_of_other_names_have_other_visitors_in_the_canary() {
        let canary = split(&[("a", 0.5), ("b", 0.5)], &sticky());
        let (mut one, mut two) =
            (Splitter::new("/x", &canary, &Schedules::default()), Splitter::new("/y", &canary, &Schedules::default()));
        one.note_ready(|_| true);
        two.note_ready(|_| true);
        let both = (0..1000).filter(|i| home(&mut one, &format!("u{i}")) == home(&mut two, &format!("u{i}"))).count();
        assert!((400..600).contains(&both), "{both}");
    }

    #[test]
    fn cookies_are_found_by_their_whole_name() {
        let header = b"a=1; session=\"s 1\";beta=; xbeta=2; b=c=d";
        for (name, value) in
            [("a", Some(&b"1"[..])), ("session", Some(b"s 1")), ("beta", Some(b"")), ("eta", None), ("b", Some(b"c=d"))]
        {
            assert_eq!(cookie(header, name), value, "{name}");
        }
    }

    proptest! {
        #[test]
        fn visitors_are_shared_out_by_weight_and_stay(weight in 0.05..0.95_f64) {
            let mut splitter = splitter(&[("a", 1.0 - weight), ("b", weight)], &sticky());
            let users: Vec<_> = (0..2000).map(|i| format!("user-{i}")).collect();
            let homes: Vec<_> = users.iter().map(|user| home(&mut splitter, user)).collect();
            let at_b = homes.iter().map(|&home| home as u32).sum::<u32>();
            let at_b = f64::from(at_b) / 2000.0;
            prop_assert!((at_b - weight).abs() < 0.06, "{at_b} {weight}");
            prop_assert!(users.iter().zip(homes).all(|(user, at)| home(&mut splitter, user) == at));
        }

        #[test]
        fn a_visitor_moves_only_to_where_the_weight_has_grown(
            before in prop::collection::vec(0.01..1.0_f64, 4), after in prop::collection::vec(0.01..1.0_f64, 4),
        ) {
            let name = |weights: &[f64]| ["a", "b", "c", "d"].into_iter().zip(weights.iter().copied()).collect::<Vec<_>>();
            let (mut one, mut two) = (splitter(&name(&before), &sticky()), splitter(&name(&after), &sticky()));
            for i in 0..200 {
                let (from, to) = (home(&mut one, &format!("u{i}")), home(&mut two, &format!("u{i}")));
                let grown = after[to] / after[from] > before[to] / before[from];
                prop_assert!(from == to || grown, "{from} to {to}");
            }
        }

        #[test]
        fn a_header_of_any_bytes_is_searched(header in prop::collection::vec(any::<u8>(), 0..60), name in "[a-z]{1,3}") {
            prop_assert!(cookie(&header, &name).is_none_or(|value| value.len() < header.len()));
        }
    }
}
