//! A random walk of the engine that holds its invariants: nothing is lost, no limit is passed, nobody waits in vain.

use std::collections::HashMap;

use proptest::prelude::*;

use super::{
    super::affinity::{Affinity, key, score},
    Admission, Driver, Place, ReplicaKey, snapshot,
};

#[derive(Debug, Clone)]
enum Event {
    /// Of this session; 0: of none.
    Request(u8),
    Finish(prop::sample::Index),
    Busy(prop::sample::Index),
    Credit(prop::sample::Index),
    /// A link comes up.
    Link(prop::sample::Index),
    /// A link is gone, or an attempt has failed.
    Death(prop::sample::Index),
    /// A replica leaves the snapshot, or one of its name comes.
    Turn(prop::sample::Index),
    Cancel(prop::sample::Index),
}

fn any_event() -> impl Strategy<Value = Event> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => (0_u8..6).prop_map(Event::Request),
        4 => index().prop_map(Event::Finish),
        1 => index().prop_map(Event::Busy),
        1 => index().prop_map(Event::Credit),
        2 => index().prop_map(Event::Link),
        1 => index().prop_map(Event::Death),
        1 => index().prop_map(Event::Turn),
        1 => index().prop_map(Event::Cancel),
    ]
}

const IDS: [&str; 3] = ["r", "s", "t"];

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Unlisted,
    Untried,
    Up,
    Lost,
}

struct Walk {
    driver: Driver,
    version: u64,
    states: [State; 3],
    sessions: HashMap<u32, u8>,
    waiting: HashMap<u32, Place>,
    owed: HashMap<ReplicaKey, u32>,
    done: u32,
}

impl Walk {
    fn new() -> Self {
        let (sessions, waiting, owed) = Default::default();
        let driver = Driver::new(&snapshot(1, 2, -1, &IDS));
        Self { driver, version: 1, states: [State::Untried; 3], sessions, waiting, owed, done: 0 }
    }

    fn request(&mut self, session: u8) {
        let waiter = self.sessions.len() as u32;
        let affinity = if session == 0 { Affinity::default() } else { Affinity::new(b"", &[session]) };
        self.sessions.insert(waiter, session);
        match self.driver.engine.request(self.driver.key, affinity, |_| waiter).expect("no limit") {
            Admission::Go(lease) => self.driver.started.push((waiter, lease)),
            Admission::Wait(place) => drop(self.waiting.insert(waiter, place)),
        }
    }

    fn link(&mut self, at: usize) {
        if matches!(self.states[at], State::Untried | State::Lost) {
            self.states[at] = State::Up;
            self.driver.link(IDS[at], 2);
        }
    }

    fn die(&mut self, at: usize) {
        let key = self.driver.keys[IDS[at]];
        if self.states[at] != State::Unlisted {
            self.states[at] = State::Lost;
        }
        self.driver.engine.closed(key);
        self.owed.remove(&key);
        let (dead, alive): (Vec<_>, Vec<_>) =
            self.driver.started.drain(..).partition(|(_, lease)| lease.replica == key);
        self.driver.started = alive;
        self.done += dead.len() as u32;
    }

    fn turn(&mut self, at: usize) {
        let leaves = self.states[at] != State::Unlisted;
        self.states[at] = if leaves { State::Unlisted } else { State::Untried };
        let listed: Vec<_> = (0..3).filter(|&at| self.states[at] != State::Unlisted).map(|at| IDS[at]).collect();
        self.version += 1;
        self.driver.engine.apply(&snapshot(self.version, 2, -1, &listed));
        if leaves {
            self.die(at);
        }
    }

    fn happen(&mut self, event: &Event) {
        let Driver { started, keys, engine, .. } = &mut self.driver;
        match event {
            Event::Request(session) => self.request(*session),
            Event::Finish(which) if !started.is_empty() => {
                let (_, lease) = started.remove(which.index(started.len()));
                engine.answered(lease, None);
                self.done += 1;
            }
            Event::Busy(which) if !started.is_empty() => {
                let (waiter, lease) = started.remove(which.index(started.len()));
                *self.owed.entry(lease.replica).or_default() += 1;
                let place = engine.busy(lease, 0);
                self.waiting.insert(waiter, place);
                self.driver.again(place, waiter);
            }
            Event::Credit(which) => {
                let key = keys[IDS[which.index(3)]];
                if let Some(owed) = self.owed.get_mut(&key).filter(|owed| **owed > 0) {
                    *owed -= 1;
                    engine.credit(key, 1);
                }
            }
            Event::Link(which) => self.link(which.index(3)),
            Event::Death(which) if self.states[which.index(3)] != State::Unlisted => self.die(which.index(3)),
            Event::Turn(which) => self.turn(which.index(3)),
            Event::Cancel(which) if !self.waiting.is_empty() => {
                let waiter = *which.get(&self.waiting.keys().copied().collect::<Vec<_>>());
                if engine.cancel(self.waiting[&waiter]).is_some() {
                    self.waiting.remove(&waiter);
                    self.done += 1;
                }
            }
            _ => {}
        }
        self.driver.settle();
        let started = self.driver.waiters();
        self.waiting.retain(|waiter, _| !started.contains(waiter));
    }

    /// Whether the replica to which a session belongs is still being linked to for the first time.
    fn awaits_own(&self, waiter: u32) -> bool {
        let session = key(&[self.sessions[&waiter]]);
        let there = (0..3).filter(|&at| matches!(self.states[at], State::Up | State::Untried));
        let own = there.max_by_key(|&at| score(session, key(IDS[at].as_bytes())));
        self.sessions[&waiter] != 0 && own.is_some_and(|at| self.states[at] == State::Untried)
    }

    fn has_room(&self) -> bool {
        (0..3).any(|at| {
            let key = self.driver.keys[IDS[at]];
            self.states[at] == State::Up && self.driver.engine.replicas[key.0].has_room()
        })
    }
}

proptest! {
    /// Whatever happens, every request is started once a life, no replica is above its limit, nobody waits while a replica
    /// has room but for the first link to a session's own, and when everything is decided, paid and finished nobody is left.
    #[test]
    fn nothing_is_lost_no_limit_is_passed_and_nobody_waits_in_vain(
        events in prop::collection::vec(any_event(), 0..200), last in 0_usize..3,
    ) {
        let mut walk = Walk::new();
        for event in &events {
            let before = walk.driver.waiters();
            walk.happen(event);
            for waiter in walk.driver.waiters() {
                prop_assert!(before.contains(&waiter) || !walk.awaits_own(waiter), "it went elsewhere");
            }
            let in_vain = walk.waiting.keys().find(|waiter| !walk.awaits_own(**waiter));
            prop_assert!(in_vain.is_none() || !walk.has_room(), "{in_vain:?} waits in vain");
            for key in walk.driver.keys.values() {
                let running = walk.driver.started.iter().filter(|(_, lease)| lease.replica == *key && !lease.granted);
                prop_assert!(running.count() <= 2);
            }
        }
        if walk.states[last] == State::Unlisted {
            walk.turn(last);
            walk.driver.settle();
        }
        for at in (0..3).filter(|&at| at != last) {
            if walk.states[at] == State::Untried {
                walk.die(at); // its attempt has failed
            }
        }
        walk.link(last);
        walk.driver.settle();
        for (key, owed) in std::mem::take(&mut walk.owed) {
            walk.driver.engine.credit(key, owed);
            walk.driver.settle();
        }
        while !walk.driver.started.is_empty() {
            walk.driver.finish_first();
            walk.done += 1;
        }
        prop_assert_eq!(walk.done as usize, walk.sessions.len());
        prop_assert_eq!(walk.driver.engine.queued(walk.driver.key), 0);
    }
}
