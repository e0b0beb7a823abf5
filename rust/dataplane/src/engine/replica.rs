//! One replica as a caller knows it: whether it has room, what it holds, how it ranks.
//!
//! Load is this caller's own requests in flight there plus what the replica last said about everybody else's. Room is
//! `max_ongoing_requests` and, while the replica is FAST, a short backlog; after a BUSY only its credits count until it has
//! paid what it owes.

use slab::Slab;

use super::{
    DeploymentKey, Lease,
    affinity::{Affinity, Bound, key, score},
    bind::Shared,
};
use crate::{snapshot, wire::BACKLOG};

/// What a router in Python is told of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id, and where it is.
    pub address: snapshot::Replica,
    /// It is linked and takes requests.
    pub open: bool,
    /// Requests in flight there.
    pub load: u32,
    /// It takes one more.
    pub room: bool,
    /// How many it runs at once.
    pub max_ongoing: u32,
    /// The models that it holds or loads.
    pub models: Vec<String>,
}

/// One replica as this caller knows it.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, none implies another")]
pub(super) struct Replica {
    pub(super) id: String,
    /// The hash of `id`.
    seed: u64,
    pub(super) deployment: DeploymentKey,
    /// The link's number, unique in this engine; a lease of an earlier link frees nothing.
    pub(super) session: Option<u64>,
    /// The newest snapshot holds it.
    pub(super) listed: bool,
    /// It said DRAIN, which outranks any snapshot.
    pub(super) draining: bool,
    /// It has not answered a PING: no new picks, but the link lives.
    pub(super) silent: bool,
    /// It runs on the caller's node.
    pub(super) near: bool,
    /// The first attempt to link to it has neither come to a link nor failed.
    pub(super) untried: bool,
    pub(super) max_ongoing: u32,
    /// This caller's requests there; a batch is one.
    pub(super) in_flight: u32,
    /// This caller's batches there.
    pub(super) batches: Slab<Shared>,
    /// Other callers' requests there, from its last answer.
    others: u32,
    fast: bool,
    /// Slots reserved for this caller.
    credits: u32,
    /// BUSY answers not yet followed by a credit.
    owed: u32,
    /// Models that it holds or loads, by its own word, and their names.
    models: Vec<u64>,
    names: Vec<String>,
    /// Models of this caller's requests there, one entry a request: it will hold them before it says so.
    expected: Vec<u64>,
}

impl Replica {
    pub(super) fn new(id: String, deployment: DeploymentKey, max_ongoing: u32) -> Self {
        Self {
            seed: key(id.as_bytes()),
            id,
            deployment,
            session: None,
            listed: true,
            draining: false,
            silent: false,
            near: false,
            untried: true,
            max_ongoing,
            in_flight: 0,
            batches: Slab::new(),
            others: 0,
            fast: false,
            credits: 0,
            owed: 0,
            models: Vec::new(),
            names: Vec::new(),
            expected: Vec::new(),
        }
    }

    /// Whether requests may be sent there at all.
    pub(super) fn open(&self) -> bool {
        self.session.is_some() && self.listed && !self.draining && !self.silent
    }

    pub(super) fn has_room(&self) -> bool {
        let backlog = if self.fast { BACKLOG } else { 0 };
        self.open() && (self.credits > 0 || (self.owed == 0 && self.in_flight < self.max_ongoing + backlog))
    }

    /// Whether it may begin one more at once, as far as this caller's own requests tell.
    pub(super) fn has_slot(&self) -> bool {
        self.slots() > 0
    }

    /// The same, as far as is known of all callers.
    pub(super) fn is_free(&self) -> bool {
        self.has_slot() && (self.credits > 0 || self.load() < self.max_ongoing)
    }

    /// How many more it takes without a backlog.
    pub(super) fn slots(&self) -> u32 {
        let free = if self.owed == 0 { self.max_ongoing.saturating_sub(self.in_flight) } else { 0 };
        if self.open() { free.max(self.credits) } else { 0 }
    }

    pub(super) fn load(&self) -> u32 {
        self.in_flight + self.others
    }

    pub(super) fn holds(&self, model: u64) -> bool {
        self.models.contains(&model) || self.expected.contains(&model)
    }

    fn model_count(&self) -> usize {
        self.models.len() + self.expected.iter().filter(|model| !self.models.contains(model)).count()
    }

    /// Takes a slot; returns whether it used a credit.
    pub(super) fn take(&mut self, wish: Affinity) -> bool {
        self.in_flight += 1;
        if wish.model != 0 {
            self.expected.push(wish.model);
        }
        let granted = self.credits > 0;
        self.credits -= u32::from(granted);
        granted
    }

    /// Takes back the lease of a request that was answered; whether its slot is free now.
    pub(super) fn give_back(&mut self, lease: &Lease) -> bool {
        match lease.batch {
            None => self.give(lease.place.affinity),
            Some(batch) => match self.leave(batch, true) {
                None => return false,
                Some(shared) => self.give(shared.wish),
            },
        }
        true
    }

    /// Takes back the lease of a request that was never sent, and undoes [`Replica::take`] if it is the only one of its
    /// slot; whether that is free now.
    pub(super) fn unsend(&mut self, lease: &Lease) -> bool {
        let (wish, sent) = match lease.batch {
            None => (lease.place.affinity, false),
            Some(batch) => match self.leave(batch, false) {
                None => return false,
                Some(shared) => (shared.wish, shared.sent),
            },
        };
        self.give(wish);
        self.credits += u32::from(lease.granted && !sent);
        true
    }

    /// Gives a slot back.
    pub(super) fn give(&mut self, wish: Affinity) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if wish.model != 0
            && let Some(at) = self.expected.iter().position(|&model| model == wish.model)
        {
            self.expected.swap_remove(at);
        }
    }

    /// What an answer says: requests in flight there over all callers, and whether it is fast.
    pub(super) fn report(&mut self, load: u16, fast: bool) {
        self.others = u32::from(load).saturating_sub(self.in_flight);
        self.fast = fast;
    }

    /// The models that it holds from now on.
    pub(super) fn hold(&mut self, names: &[&[u8]]) {
        self.models = names.iter().map(|name| key(name)).collect();
        self.names = names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    }

    /// For a router that is not the engine's.
    pub(super) fn candidate(&self, address: snapshot::Replica) -> Candidate {
        let (open, load, room) = (self.open(), self.load(), self.has_room());
        Candidate { address, open, load, room, max_ongoing: self.max_ongoing, models: self.names.clone() }
    }

    /// It refused one and owes a credit; one for all requests of a batch.
    pub(super) fn refused(&mut self, batch: Option<usize>) {
        let known = batch.and_then(|batch| self.batches.get_mut(batch));
        let again = known.is_some_and(|shared| std::mem::replace(&mut shared.refused, true));
        self.owed += u32::from(!again);
    }

    /// The limits of a new snapshot; `batches`: requests go in batches.
    pub(super) fn limit(&mut self, max_ongoing: u32, batches: bool) {
        self.max_ongoing = max_ongoing;
        // Batches have no backlog, whatever was said of single requests.
        self.fast &= !batches;
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

    /// How much it is a session's own: the highest wins. `None`: it takes no requests, and no link to it is on the way.
    pub(super) fn claim(&self, session: u64) -> Option<u64> {
        (self.is_coming() || self.open()).then(|| score(session, self.seed))
    }

    /// Whether the first attempt to link to it is not over, and worth waiting for.
    pub(super) fn is_coming(&self) -> bool {
        self.untried && self.listed && !self.draining
    }

    /// A new link begins with nothing in flight.
    pub(super) fn reset(&mut self, session: Option<u64>) {
        let id = std::mem::take(&mut self.id);
        let fresh = Self::new(id, self.deployment, self.max_ongoing);
        *self =
            Self { session, listed: self.listed, draining: self.draining, near: self.near, untried: false, ..fresh };
    }

    /// Its rank for a request with wishes, the least is best: within the bound before beyond it; with the model before
    /// without; of those without the one with the fewest; the session's own; the least loaded.
    pub(super) fn rank(&self, wish: Affinity, bound: Bound) -> (u8, usize, u64, u32) {
        let load = self.load();
        if !bound.allows(load) {
            return (2, 0, 0, load);
        }
        let holds = wish.model == 0 || self.holds(wish.model);
        // Callers that do not know of each other load a new model at the same replica.
        let name = if wish.session == 0 && !holds { wish.model } else { wish.session };
        let own = if name == 0 { 0 } else { !score(name, self.seed) };
        if holds { (0, 0, own, load) } else { (1, self.model_count(), own, load) }
    }
}
