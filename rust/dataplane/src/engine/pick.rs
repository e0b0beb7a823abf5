//! Which replica takes a request: one that has room, by the deployment's policy and by what the request would like.
//!
//! Ties go round by a rotating offset. No policy leaves a request waiting while any replica has room, but for that of a
//! user's router, which is asked elsewhere (`reserve.rs`); a session that waits for its replica (`own.rs`) is not asked for here.

use slab::Slab;

use super::{
    ReplicaKey,
    affinity::{Affinity, Bound},
    replica::Replica,
};
use crate::snapshot::Policy;

/// How a replica is picked for a request without wishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// As the snapshot says.
    Policy(Policy),
    /// The least loaded of the caller's own node while one has a free slot, else of all.
    NearFirst,
}

impl Rule {
    /// `near_first` decides where the policy only balances load.
    pub(super) fn new(policy: Policy, near_first: bool) -> Self {
        match policy {
            Policy::LeastLoaded | Policy::PowerOfTwo if near_first => Self::NearFirst,
            policy => Self::Policy(policy),
        }
    }
}

impl Default for Rule {
    fn default() -> Self {
        Self::Policy(Policy::default())
    }
}

/// What a replica must have to be picked.
pub(super) trait Takes: Fn(&Replica) -> bool + Copy {}

impl<F: Fn(&Replica) -> bool + Copy> Takes for F {}

/// How the replicas of one deployment are picked.
#[derive(Debug, Default)]
pub(super) struct Picker {
    pub(super) rule: Rule,
    rotor: usize,
    random: fastrand::Rng,
}

impl Picker {
    /// One of `members` that has room.
    pub(super) fn pick(
        &mut self,
        replicas: &Slab<Replica>,
        members: &[ReplicaKey],
        affinity: Affinity,
    ) -> Option<ReplicaKey> {
        let custom = self.rule == Rule::Policy(Policy::Custom);
        if custom || (affinity.is_none() && self.rule != Rule::NearFirst) {
            return self.by_rule(replicas, members, Replica::has_room);
        }
        if affinity.is_none() || affinity.is_near() {
            return self.near_first(replicas, members);
        }
        if self.rule == Rule::Policy(Policy::ConsistentHash) && affinity.session == 0 {
            return self.hashed(replicas, members, affinity, Replica::has_room);
        }
        self.preferred(replicas, members, affinity, Replica::has_room)
    }

    /// One of the caller's own node with a free slot, else one elsewhere; a backlog on the own node only if there is none.
    fn near_first(&mut self, replicas: &Slab<Replica>, members: &[ReplicaKey]) -> Option<ReplicaKey> {
        self.nearest(replicas, members, Replica::has_slot)
            .or_else(|| self.by_rule(replicas, members, Replica::is_free))
            .or_else(|| self.nearest(replicas, members, Replica::has_room))
            .or_else(|| self.by_rule(replicas, members, Replica::has_room))
    }

    /// One for a request without wishes, of those that `takes` is true of.
    fn by_rule(&mut self, replicas: &Slab<Replica>, members: &[ReplicaKey], takes: impl Takes) -> Option<ReplicaKey> {
        let at = |key: &ReplicaKey| replicas.get(key.0);
        match self.rule {
            Rule::Policy(Policy::Custom) => None,
            Rule::Policy(Policy::ConsistentHash) => self.hashed(replicas, members, Affinity::default(), takes),
            Rule::Policy(Policy::RoundRobin) => {
                let found = self.around(members).position(|key| at(key).is_some_and(takes))?;
                let found = (self.rotor + found) % members.len();
                self.rotor = found + 1;
                Some(members[found])
            }
            Rule::Policy(Policy::PowerOfTwo) if members.len() > 2 => {
                let (a, b) = (self.random.usize(..members.len()), self.random.usize(1..members.len()));
                let two = [members[a], members[(a + b) % members.len()]];
                let taking = two.into_iter().filter(|key| at(key).is_some_and(takes));
                taking.min_by_key(|key| replicas[key.0].load()).or_else(|| self.least_loaded(replicas, members, takes))
            }
            Rule::NearFirst | Rule::Policy(_) => self.least_loaded(replicas, members, takes),
        }
    }

    /// The least loaded of those that somebody else has chosen.
    pub(super) fn among(
        replicas: &Slab<Replica>,
        chosen: impl Iterator<Item = ReplicaKey>,
        takes: impl Takes,
    ) -> Option<ReplicaKey> {
        let taking = chosen.filter(|key| replicas.get(key.0).is_some_and(takes));
        taking.min_by_key(|key| replicas[key.0].load())
    }

    /// All members, beginning with the rotor's.
    fn around<'m>(&mut self, members: &'m [ReplicaKey]) -> impl Iterator<Item = &'m ReplicaKey> + Clone + use<'m> {
        if self.rotor >= members.len() {
            self.rotor = 0;
        }
        let (before, from) = members.split_at(self.rotor);
        from.iter().chain(before)
    }

    /// The rotor moves on, so that equals take turns.
    fn least_loaded(
        &mut self,
        replicas: &Slab<Replica>,
        members: &[ReplicaKey],
        takes: impl Takes,
    ) -> Option<ReplicaKey> {
        let around = self.around(members);
        self.rotor += 1;
        Self::among(replicas, around.copied(), takes)
    }

    /// For a session that nobody has named.
    fn hashed(
        &mut self,
        replicas: &Slab<Replica>,
        members: &[ReplicaKey],
        wish: Affinity,
        takes: impl Takes,
    ) -> Option<ReplicaKey> {
        let session = self.random.u64(1..);
        self.preferred(replicas, members, Affinity { session, ..wish }, takes)
    }

    /// The least loaded of the caller's own node.
    fn nearest(&mut self, replicas: &Slab<Replica>, members: &[ReplicaKey], takes: impl Takes) -> Option<ReplicaKey> {
        let near = self.around(members).filter(|key| replicas.get(key.0).is_some_and(|replica| replica.near));
        let found = Self::among(replicas, near.copied(), takes)?;
        self.rotor += 1;
        Some(found)
    }

    /// The one that a request with wishes likes best; within the bound also its backlog, before anybody's free slot.
    fn preferred(
        &mut self,
        replicas: &Slab<Replica>,
        members: &[ReplicaKey],
        wish: Affinity,
        takes: impl Takes,
    ) -> Option<ReplicaKey> {
        let around = self.around(members);
        self.rotor += 1;
        let open = around.filter_map(|key| Some((key, replicas.get(key.0).filter(|replica| replica.open())?)));
        let max_ongoing = open.clone().next()?.1.max_ongoing;
        let bound = Bound::of(open.clone().map(|(_, replica)| replica.load()), max_ongoing);
        let taking = open.filter(|(_, replica)| takes(replica));
        taking.min_by_key(|(_, replica)| replica.rank(wish, bound)).map(|(key, _)| *key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{engine::DeploymentKey, wire::BACKLOG};

    const NONE: Affinity = Affinity { model: 0, session: 0 };

    fn wish(model: &str, session: &str) -> Affinity {
        Affinity::new(model.as_bytes(), session.as_bytes())
    }

    struct Cluster {
        replicas: Slab<Replica>,
        members: Vec<ReplicaKey>,
        picker: Picker,
    }

    impl Cluster {
        fn new(policy: Policy, n: usize, max_ongoing: u32) -> Self {
            Self::by(Rule::Policy(policy), n, max_ongoing)
        }

        fn by(rule: Rule, n: usize, max_ongoing: u32) -> Self {
            let mut replicas = Slab::new();
            let members = (0..n)
                .map(|i| {
                    let mut replica = Replica::new(i.to_string(), DeploymentKey { index: 0, life: 0 }, max_ongoing);
                    replica.session = Some(i as u64);
                    replica.near = i % 2 == 0;
                    ReplicaKey(replicas.insert(replica))
                })
                .collect();
            Self { replicas, members, picker: Picker { rule, ..Picker::default() } }
        }

        fn pick(&mut self, wish: Affinity) -> Option<usize> {
            self.picker.pick(&self.replicas, &self.members, wish).map(|key| key.0)
        }

        fn take(&mut self, wish: Affinity) -> Option<usize> {
            let at = self.pick(wish)?;
            self.replicas[at].take(wish);
            Some(at)
        }

        fn loads(&self) -> Vec<u32> {
            self.members.iter().filter_map(|key| Some(self.replicas.get(key.0)?.load())).collect()
        }
    }

    #[test]
    fn equals_take_turns_and_the_limit_holds() {
        for policy in [Policy::LeastLoaded, Policy::RoundRobin] {
            let mut cluster = Cluster::new(policy, 3, 2);
            let mut taken: Vec<_> = std::iter::from_fn(|| cluster.take(NONE)).collect();
            taken[..3].sort_unstable();
            assert_eq!(taken[..3], [0, 1, 2], "each once before any twice");
            assert_eq!(taken.len(), 6, "two each");
        }
    }

    #[test]
    fn what_other_callers_do_there_counts() {
        let mut cluster = Cluster::new(Policy::LeastLoaded, 2, 5);
        cluster.replicas[0].report(3, false);
        for _ in 0..3 {
            assert_eq!(cluster.take(NONE), Some(1));
        }
    }

    #[test]
    fn a_backlog_is_allowed_only_while_fast() {
        let mut cluster = Cluster::new(Policy::LeastLoaded, 1, 1);
        cluster.replicas[0].report(0, true);
        let taken = std::iter::from_fn(|| cluster.take(NONE)).count();
        assert_eq!(taken as u32, 1 + BACKLOG);
        cluster.replicas[0].report(33, false);
        cluster.replicas[0].give(NONE);
        assert_eq!(cluster.pick(NONE), None);
    }

    #[test]
    fn after_a_refusal_only_credits_count_until_it_is_paid() {
        let mut cluster = Cluster::new(Policy::LeastLoaded, 1, 5);
        cluster.replicas[0].take(NONE);
        cluster.replicas[0].give(NONE);
        cluster.replicas[0].refused(None);
        assert_eq!(cluster.pick(NONE), None);
        cluster.replicas[0].credit(1);
        assert!(cluster.replicas[0].take(NONE), "by credit");
        assert!(!cluster.replicas[0].take(NONE), "paid: optimistic again");
    }

    #[test]
    fn the_closed_the_draining_and_the_silent_are_not_picked() {
        for rule in RULES {
            let mut cluster = Cluster::by(rule, 4, 5);
            cluster.replicas[0].reset(None);
            cluster.replicas[1].draining = true;
            cluster.replicas[2].listed = false;
            cluster.replicas[3].silent = true;
            assert_eq!((cluster.pick(NONE), cluster.pick(wish("m", "s"))), (None, None));
        }
    }

    #[test]
    fn round_robin_looks_at_no_load() {
        let mut cluster = Cluster::new(Policy::RoundRobin, 3, 50);
        cluster.replicas[1].report(40, false);
        let taken: Vec<_> = (0..6).filter_map(|_| cluster.take(NONE)).collect();
        assert_eq!(taken, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn of_two_the_less_loaded_is_taken() {
        let mut cluster = Cluster::new(Policy::PowerOfTwo, 8, 50);
        cluster.replicas[5].report(40, false);
        let taken: Vec<_> = (0..64).filter_map(|_| cluster.take(NONE)).collect();
        assert!(!taken.contains(&5), "the most loaded loses against anybody");
        assert!((0..8).filter(|&at| at != 5).all(|at| taken.contains(&at)), "{taken:?}");
    }

    #[test]
    fn a_model_is_asked_for_where_it_is_held() {
        let mut cluster = Cluster::new(Policy::LeastLoaded, 4, 20);
        cluster.replicas[2].hold(&[b"m"]);
        cluster.replicas[2].report(3, false);
        assert_eq!(cluster.pick(wish("m", "")), Some(2));
        assert_ne!(cluster.pick(wish("other", "")), Some(2), "it holds more models than the others");
    }

    #[test]
    fn a_burst_for_a_new_model_goes_to_one_replica() {
        let mut cluster = Cluster::new(Policy::LeastLoaded, 4, 20);
        let first = cluster.take(wish("m", "")).expect("room");
        assert!(
            (0..3).all(|_| cluster.take(wish("m", "")) == Some(first)),
            "before it has said that it holds the model"
        );
        for _ in 0..4 {
            cluster.replicas[first].give(wish("m", ""));
        }
        assert!(!cluster.replicas[first].holds(wish("m", "").model), "it never said so");
    }

    #[test]
    fn callers_that_do_not_know_of_each_other_agree() {
        let (mut one, mut two) = (Cluster::new(Policy::LeastLoaded, 9, 20), Cluster::new(Policy::RoundRobin, 9, 20));
        for i in 0..20 {
            one.take(NONE); // its rotor stands elsewhere
            let name = format!("n{i}");
            assert_eq!(one.pick(wish(&name, "")), two.pick(wish(&name, "")));
            assert_eq!(one.pick(wish("", &name)), two.pick(wish("", &name)));
        }
    }

    const RULES: [Rule; 5] = [
        Rule::Policy(Policy::LeastLoaded),
        Rule::Policy(Policy::PowerOfTwo),
        Rule::Policy(Policy::RoundRobin),
        Rule::Policy(Policy::ConsistentHash),
        Rule::NearFirst,
    ];

    fn any_wish() -> impl Strategy<Value = Affinity> {
        prop_oneof![
            Just(NONE),
            Just(NONE.or_near(true)),
            (0..3).prop_map(|i| wish(&format!("m{i}"), "")),
            (0..3).prop_map(|i| wish("", &format!("s{i}"))),
            (0..3, 0..3).prop_map(|(m, s)| wish(&format!("m{m}"), &format!("s{s}"))),
        ]
    }

    proptest! {
        #[test]
        fn whoever_has_room_is_found(
            rule in prop::sample::select(&RULES[..]), full in prop::collection::vec(any::<bool>(), 1..12), wish in any_wish(),
        ) {
            let mut cluster = Cluster::by(rule, full.len(), 1);
            for (at, full) in full.iter().enumerate() {
                if *full {
                    cluster.replicas[at].take(NONE);
                }
            }
            let picked = cluster.pick(wish);
            prop_assert_eq!(picked.is_some(), full.contains(&false));
            prop_assert!(picked.is_none_or(|at| !full[at]));
        }

        #[test]
        fn wishes_never_heap_up(
            rule in prop::sample::select(&RULES[..]), n in 2_usize..9, wishes in prop::collection::vec(any_wish(), 1..200),
        ) {
            let max_ongoing = 64;
            let mut cluster = Cluster::by(rule, n, max_ongoing);
            for wish in wishes {
                let before = cluster.loads();
                let total: u32 = before.iter().sum();
                let bound = (2 * (total + 1)).div_ceil(n as u32).max(max_ongoing / 4);
                if let Some(at) = cluster.take(wish) && !wish.is_none() && !wish.is_near() {
                    prop_assert!(before[at] < bound, "{before:?} {at}");
                }
            }
        }

        #[test]
        fn a_session_stays_when_another_replica_leaves(session in "[a-z]{1,8}", n in 2_usize..9, gone in any::<prop::sample::Index>()) {
            let mut cluster = Cluster::new(Policy::LeastLoaded, n, 64);
            let home = cluster.pick(wish("", &session)).expect("room");
            let gone = gone.index(n);
            cluster.replicas[gone].listed = false;
            let now = cluster.pick(wish("", &session)).expect("room");
            prop_assert!(now == home || gone == home);
            cluster.replicas[gone].listed = true;
            prop_assert_eq!(cluster.pick(wish("", &session)), Some(home), "and it is back with it");
        }
    }
}
