//! What a request would like of its replica: that it holds a model, that it is the one of a session.
//!
//! Names are hashed once, where a request comes in; the engine compares numbers. The hash is fixed, so that all callers
//! agree about a session without talking to each other. A session belongs to the replica of the highest [`score`]
//! (rendezvous hashing): when replicas come or go, only the sessions of those move. [`Bound`] keeps what is wished for from
//! heaping up: a client that chooses its session ids, or a model that everybody wants, overloads nobody.

/// Hashes of the names; 0: none. A request without names may be for the caller's node instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Affinity {
    pub(super) model: u64,
    pub(super) session: u64,
}

impl Affinity {
    /// Empty names are none.
    pub fn new(model: &[u8], session: &[u8]) -> Self {
        Self { model: key(model), session: key(session) }
    }

    /// Prefers replicas of the caller's own node if `near`; the names decide if there are any.
    #[must_use]
    pub fn or_near(self, near: bool) -> Self {
        if near && self.is_none() { Self { model: 0, session: NEAR } } else { self }
    }

    /// Whether it prefers them.
    pub fn is_near(self) -> bool {
        self.session == NEAR
    }

    /// Whether there is a session, which has a replica of its own.
    pub(super) fn has_session(self) -> bool {
        self.session != 0 && !self.is_near()
    }

    pub(super) fn is_none(self) -> bool {
        self.model | self.session == 0
    }
}

/// Stands where a session's hash would, so that a request without wishes pays nothing for those that have this one.
const NEAR: u64 = u64::MAX;

/// The number of a name; 0 only for the empty one, and never [`NEAR`].
pub(super) fn key(name: &[u8]) -> u64 {
    if name.is_empty() {
        return 0;
    }
    let fnv = name
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    mix(fnv).clamp(1, NEAR - 1)
}

/// How much a replica is a name's own: the highest wins.
pub(super) fn score(name: u64, replica: u64) -> u64 {
    mix(name ^ replica.rotate_left(32))
}

/// Every bit of the result depends on every bit of `n` (the finalizer of splitmix64).
fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Up to which load a replica takes what would rather go there than elsewhere: twice the mean with the new request in it,
/// but never less than a quarter of its limit, so that few requests stay together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bound(u32);

/// Replicas with small limits keep at least so many requests together.
const FLOOR: u32 = 4;

impl Bound {
    /// Of the loads of all replicas that take requests.
    pub(super) fn of(loads: impl Iterator<Item = u32>, max_ongoing: u32) -> Self {
        let (count, total) = loads.fold((0_u32, 0_u32), |(count, total), load| (count + 1, total.saturating_add(load)));
        let twice_mean = total.saturating_add(1).saturating_mul(2).div_ceil(count.max(1));
        Self(twice_mean.max(max_ongoing / 4).max(FLOOR))
    }

    pub(super) fn allows(self, load: u32) -> bool {
        load < self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owner(session: u64, replicas: &[u64]) -> u64 {
        replicas.iter().copied().max_by_key(|&replica| score(session, replica)).expect("some")
    }

    #[test]
    fn the_hash_is_the_same_in_every_build() {
        assert_eq!((key(b""), key(b"a")), (0, 0x02c0_bdbf_4814_20f8));
    }

    #[test]
    fn sessions_spread_over_the_replicas() {
        let replicas: Vec<u64> = (0..8).map(|i| key(format!("replica-{i}").as_bytes())).collect();
        let mut counts = [0; 8];
        for i in 0..8000 {
            let mine = owner(key(format!("session-{i}").as_bytes()), &replicas);
            counts[replicas.iter().position(|&replica| replica == mine).expect("one of them")] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn only_the_sessions_of_a_replica_that_left_move(
            ids in prop::collection::hash_set(1_u64.., 2..12), gone in any::<prop::sample::Index>(), session in 1_u64..,
        ) {
            let before: Vec<_> = ids.into_iter().collect();
            let gone = before[gone.index(before.len())];
            let after: Vec<_> = before.iter().copied().filter(|&id| id != gone).collect();
            let old = owner(session, &before);
            prop_assert!(old == gone || owner(session, &after) == old);
        }
    }
}
