//! The life of a router's links: opened where the engine wants one, linked again when lost, closed when it wants none.
//!
//! No call outlives its link: one that its replica has not begun takes its old place in the queue, any other fails.

use std::{
    io,
    time::{Duration, Instant},
};

use mio::Token;
use rayserve_dataplane::{engine::ReplicaKey, snapshot::Replica};

use super::{
    link::{Link, Sent},
    pending::Outcome,
    router::Router,
};

const RECONNECT: Duration = Duration::from_millis(50);

impl Router {
    pub(super) fn open(&mut self, key: ReplicaKey, replica: Replica) {
        let entry = self.links.vacant_entry();
        let index = entry.key();
        match Link::open(key, replica.clone(), &self.node_id, &self.token, &self.registry, Token(index)) {
            Ok(link) => {
                entry.insert(link);
                self.by_key.insert(key, index);
            }
            Err(_) if self.engine.closed(key) => self.lose(key, replica),
            Err(_) => {}
        }
    }

    fn lose(&mut self, key: ReplicaKey, replica: Replica) {
        self.lost.push((Instant::now() + RECONNECT, key, replica));
    }

    pub(super) fn leave(&mut self, key: ReplicaKey) {
        self.lost.retain(|(_, lost, _)| *lost != key);
        match self.by_key.get(&key) {
            None => drop(self.engine.closed(key)),
            Some(&index) if self.links[index].streams.is_empty() => self.close(index, "the replica has left"),
            Some(&index) => self.links[index].leaving = true,
        }
    }

    /// Ends a link: calls that had not begun go elsewhere, the others fail.
    pub(super) fn close(&mut self, index: usize, why: &str) {
        let Some(link) = self.links.try_remove(index) else { return };
        let (key, replica) = (link.key, link.replica.clone());
        self.by_key.remove(&key);
        let calls = link.close(&self.registry);
        if self.engine.closed(key) {
            self.lose(key, replica.clone());
        }
        for (Sent { call, lease, .. }, begun) in calls {
            if begun {
                self.engine.answered(lease, None);
                self.finish(&call, Outcome::Died(format!("replica {} died during the call: {why}", replica.id)));
            } else {
                let place = self.engine.returned(lease);
                self.again(&call, place);
            }
        }
    }

    /// Links again and ends calls where it is time; returns when to come back, which is now if calls have ended.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        let late = |(index, link): (usize, &Link)| link.deadline().is_some_and(|at| at <= now).then_some(index);
        for index in self.links.iter().filter_map(late).collect::<Vec<_>>() {
            self.close(index, &io::Error::from(io::ErrorKind::TimedOut).to_string());
        }
        let due: Vec<_> = self.lost.extract_if(.., |(at, _, _)| *at <= now).collect();
        for (_, key, replica) in due {
            self.open(key, replica);
        }
        let ended = self.expire(now);
        self.seal_late(now);
        self.settle();
        if ended {
            return Some(now);
        }
        let handshakes = self.links.iter().filter_map(|(_, link)| link.deadline());
        handshakes.chain(self.lost.iter().map(|(at, _, _)| *at)).chain(self.due()).min()
    }

    /// When a call's time or a batch's window is over next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.deadlines.first().into_iter().chain(self.alarm).min()
    }

    /// Closes this process's copies of the sockets and nothing else.
    pub(super) fn abandon(&mut self) {
        self.links.clear();
        self.by_key.clear();
        self.lost.clear();
    }
}
