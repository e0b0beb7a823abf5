//! What is counted of the batches of each deployment: how large, for how long the first request waited, why released.
//!
//! One shard writes and any thread reads, as in `metrics.rs`; a batch costs a look-up and four stores.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{engine::batch::Reason, metrics::Counter, roster::Roster};

/// Powers of two up to what a batch can have, or to more than a minute in microseconds.
const BUCKETS: usize = 28;

/// Values by the least power of two that is not below them.
#[derive(Debug, Default)]
pub struct Powers([Counter; BUCKETS]);

impl Powers {
    fn add(&self, value: u64) {
        let bucket = value.max(1).next_power_of_two().trailing_zeros() as usize;
        self.0[bucket.min(BUCKETS - 1)].up();
    }
}

/// The batches of one deployment.
#[derive(Debug, Default)]
pub struct Tally {
    full: Counter,
    waited: Counter,
    requests: Counter,
    wait_us: Counter,
    sizes: Powers,
    waits: Powers,
}

impl Tally {
    /// One batch was sent; one that is refused and sent again counts again.
    pub fn add(&self, size: usize, wait: Duration, reason: Reason) {
        match reason {
            Reason::Full => self.full.up(),
            Reason::Waited => self.waited.up(),
        }
        let wait_us = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX / 2);
        self.requests.add(size as u64);
        self.wait_us.add(wait_us);
        self.sizes.add(size as u64);
        self.waits.add(wait_us);
    }
}

/// Of every deployment of a shard, by `{app}#{deployment}`.
#[derive(Debug, Default)]
pub struct Tallies(Mutex<Roster<String, Tally>>);

impl Tallies {
    /// That of this deployment.
    pub fn of(&self, deployment: &str) -> Arc<Tally> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).of(deployment.to_owned())
    }

    /// All of them by deployment, summed over the shards.
    pub fn sum<'t>(shards: impl Iterator<Item = &'t Self>) -> BTreeMap<String, Batches> {
        let mut sums: BTreeMap<String, Batches> = BTreeMap::new();
        for shard in shards {
            for (name, tally) in shard.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                sums.entry(name.clone()).or_default().add(tally);
            }
        }
        sums
    }
}

/// Several tallies at one moment.
#[derive(Debug, Default)]
pub struct Batches {
    /// Released because they were full.
    pub full: u64,
    /// Released because their first request had waited.
    pub waited: u64,
    /// In all of them.
    pub requests: u64,
    /// Microseconds that the first requests of all have waited.
    pub wait_us: u64,
    /// How many were so large, by powers of two.
    pub sizes: [u64; BUCKETS],
    /// Of how many the first request has waited for so many microseconds, by powers of two.
    pub waits_us: [u64; BUCKETS],
}

impl Batches {
    fn add(&mut self, tally: &Tally) {
        self.full += tally.full.value();
        self.waited += tally.waited.value();
        self.requests += tally.requests.value();
        self.wait_us += tally.wait_us.value();
        for (sums, powers) in [(&mut self.sizes, &tally.sizes), (&mut self.waits_us, &tally.waits)] {
            sums.iter_mut().zip(&powers.0).for_each(|(sum, counter)| *sum += counter.value());
        }
    }

    /// What Python is told: `_core.Proxy.batches`.
    pub fn json(&self) -> Value {
        json!({"batches": self.full + self.waited, "requests": self.requests,
            "released": {"full": self.full, "waited": self.waited},
            "size": pairs(&self.sizes), "wait_us": pairs(&self.waits_us)})
    }
}

fn pairs(counts: &[u64; BUCKETS]) -> Vec<(u64, u64)> {
    let counted = counts.iter().enumerate().filter(|(_, count)| **count > 0);
    counted.map(|(power, count)| (1 << power, *count)).collect()
}

/// [`Batches::json`] by deployment.
pub fn json(sums: &BTreeMap<String, Batches>) -> Value {
    sums.iter().map(|(name, batches)| (name.clone(), batches.json())).collect::<serde_json::Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_summed_over_the_shards_by_deployment() {
        let shards = [Tallies::default(), Tallies::default()];
        shards[0].of("a#D").add(32, Duration::from_micros(900), Reason::Full);
        shards[0].of("a#D").add(3, Duration::from_millis(5), Reason::Waited);
        shards[1].of("a#D").add(1, Duration::ZERO, Reason::Waited);
        assert_eq!(
            super::json(&Tallies::sum(shards.iter())),
            json!({"a#D": {"batches": 3, "requests": 36, "released": {"full": 1, "waited": 2},
                "size": [[1, 1], [4, 1], [32, 1]], "wait_us": [[1, 1], [1024, 1], [8192, 1]]}})
        );
    }

    #[test]
    fn deployments_that_come_and_go_leave_a_bounded_number_of_tallies() {
        let tallies = Tallies::default();
        let held = tallies.of("stays");
        held.add(1, Duration::ZERO, Reason::Full);
        for release in 0..1000 {
            tallies.of(&format!("a{release}#D")).add(1, Duration::ZERO, Reason::Full);
        }
        let sums = Tallies::sum(std::iter::once(&tallies));
        assert!(sums.len() < 300 && sums["stays"].full == 1 && sums.contains_key("a999#D"), "{}", sums.len());
    }
}
