//! Which replica takes a request: the least loaded of those that have room.
//!
//! Load is this caller's own requests in flight there plus what the replica last said about everybody else's. Ties go round
//! by a rotating offset. Room is `max_ongoing_requests` and, while the replica is FAST, a short backlog; after a BUSY only
//! its credits count until it has paid what it owes.

use slab::Slab;

use super::{DeploymentKey, ReplicaKey};
use crate::wire::BACKLOG;

/// One replica as this caller knows it.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "four independent facts, none implies another")]
pub(super) struct Replica {
    pub(super) id: String,
    pub(super) deployment: DeploymentKey,
    /// The link's number, unique in this engine; a lease of an earlier link frees nothing.
    pub(super) session: Option<u64>,
    /// The newest snapshot holds it.
    pub(super) listed: bool,
    /// It said DRAIN, which outranks any snapshot.
    pub(super) draining: bool,
    /// It has not answered a PING: no new picks, but the link lives.
    pub(super) silent: bool,
    pub(super) max_ongoing: u32,
    /// This caller's requests there.
    pub(super) in_flight: u32,
    /// Other callers' requests there, from its last answer.
    others: u32,
    fast: bool,
    /// Slots reserved for this caller.
    credits: u32,
    /// BUSY answers not yet followed by a credit.
    owed: u32,
}

impl Replica {
    pub(super) fn new(id: String, deployment: DeploymentKey, max_ongoing: u32) -> Self {
        Self {
            id,
            deployment,
            session: None,
            listed: true,
            draining: false,
            silent: false,
            max_ongoing,
            in_flight: 0,
            others: 0,
            fast: false,
            credits: 0,
            owed: 0,
        }
    }

    /// Whether requests may be sent there at all.
    pub(super) fn open(&self) -> bool {
        self.session.is_some() && self.listed && !self.draining && !self.silent
    }

    fn has_room(&self) -> bool {
        let backlog = if self.fast { BACKLOG } else { 0 };
        self.open() && (self.credits > 0 || (self.owed == 0 && self.in_flight < self.max_ongoing + backlog))
    }

    fn load(&self) -> u32 {
        self.in_flight + self.others
    }

    /// Takes a slot; returns whether it used a credit.
    pub(super) fn take(&mut self) -> bool {
        self.in_flight += 1;
        let granted = self.credits > 0;
        self.credits -= u32::from(granted);
        granted
    }

    /// Undoes [`Replica::take`].
    pub(super) fn untake(&mut self, granted: bool) {
        self.give();
        self.credits += u32::from(granted);
    }

    /// Gives a slot back.
    pub(super) fn give(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// What an answer says: requests in flight there over all callers, and whether it is fast.
    pub(super) fn report(&mut self, load: u16, fast: bool) {
        self.others = u32::from(load).saturating_sub(self.in_flight);
        self.fast = fast;
    }

    /// It refused one and owes a credit.
    pub(super) fn refused(&mut self) {
        self.owed += 1;
    }

    /// It pays credits.
    pub(super) fn credit(&mut self, count: u32) {
        self.credits += count;
        self.owed = self.owed.saturating_sub(count);
    }

    /// Takes away credits that nobody needs.
    pub(super) fn unused(&mut self) -> u32 {
        std::mem::take(&mut self.credits)
    }

    /// A new link begins with nothing in flight.
    pub(super) fn reset(&mut self, session: Option<u64>) {
        let fresh = Self::new(String::new(), self.deployment, self.max_ongoing);
        let id = std::mem::take(&mut self.id);
        *self = Self { id, session, listed: self.listed, draining: self.draining, ..fresh };
    }
}

/// The least loaded of `members` that has room; `rotor` moves on, so that equals take turns.
pub(super) fn pick(replicas: &Slab<Replica>, members: &[ReplicaKey], rotor: &mut usize) -> Option<ReplicaKey> {
    let start = if *rotor < members.len() { *rotor } else { 0 };
    *rotor = start + 1;
    let (before, from) = members.split_at(start);
    let around = from.iter().chain(before);
    let open = around.filter(|key| replicas.get(key.0).is_some_and(Replica::has_room));
    open.min_by_key(|key| replicas[key.0].load()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(n: usize, max_ongoing: u32) -> (Slab<Replica>, Vec<ReplicaKey>) {
        let mut replicas = Slab::new();
        let members = (0..n)
            .map(|i| {
                let mut replica = Replica::new(i.to_string(), DeploymentKey { index: 0, life: 0 }, max_ongoing);
                replica.session = Some(i as u64);
                ReplicaKey(replicas.insert(replica))
            })
            .collect();
        (replicas, members)
    }

    fn take(replicas: &mut Slab<Replica>, members: &[ReplicaKey], rotor: &mut usize) -> Option<usize> {
        let key = pick(replicas, members, rotor)?;
        replicas[key.0].take();
        Some(key.0)
    }

    #[test]
    fn equals_take_turns_and_the_limit_holds() {
        let (mut replicas, members) = cluster(3, 2);
        let mut rotor = 0;
        let mut taken: Vec<_> = std::iter::from_fn(|| take(&mut replicas, &members, &mut rotor)).collect();
        taken[..3].sort_unstable();
        assert_eq!(taken[..3], [0, 1, 2], "each once before any twice");
        assert_eq!(taken.len(), 6, "two each");
    }

    #[test]
    fn what_other_callers_do_there_counts() {
        let (mut replicas, members) = cluster(2, 5);
        replicas[0].report(3, false);
        let mut rotor = 0;
        for _ in 0..3 {
            assert_eq!(take(&mut replicas, &members, &mut rotor), Some(1));
        }
    }

    #[test]
    fn a_backlog_is_allowed_only_while_fast() {
        let (mut replicas, members) = cluster(1, 1);
        replicas[0].report(0, true);
        let mut rotor = 0;
        let taken = std::iter::from_fn(|| take(&mut replicas, &members, &mut rotor)).count();
        assert_eq!(taken as u32, 1 + BACKLOG);
        replicas[0].report(33, false);
        replicas[0].give();
        assert_eq!(pick(&replicas, &members, &mut rotor), None);
    }

    #[test]
    fn after_a_refusal_only_credits_count_until_it_is_paid() {
        let (mut replicas, members) = cluster(1, 5);
        let mut rotor = 0;
        replicas[0].take();
        replicas[0].give();
        replicas[0].refused();
        assert_eq!(pick(&replicas, &members, &mut rotor), None);
        replicas[0].credit(1);
        assert!(replicas[0].take(), "by credit");
        assert!(!replicas[0].take(), "paid: optimistic again");
    }

    #[test]
    fn the_closed_the_draining_and_the_silent_are_not_picked() {
        let (mut replicas, members) = cluster(4, 5);
        replicas[0].reset(None);
        replicas[1].draining = true;
        replicas[2].listed = false;
        replicas[3].silent = true;
        assert_eq!(pick(&replicas, &members, &mut 0), None);
    }
}
