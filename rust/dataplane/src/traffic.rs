//! What the splits of one shard count, by split and target; every shard has its own, and a reader sums them.
//!
//! Meters are resolved when a snapshot is applied and outlive it, so that nothing is counted down by a target that leaves and
//! comes back; how many of those that have gone, says `roster.rs`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Serialize, Serializer, ser::SerializeSeq};

use crate::{
    histogram::{Histogram, Latency},
    metrics::Counter,
    roster::Roster,
};

/// Of one target.
#[derive(Debug, Default)]
pub struct TargetMeter {
    /// Requests that wait for the head of their answer.
    pub open: Counter,
    /// Requests that have ended, whatever the end.
    pub requests: Counter,
    /// Those that were answered with a status of 5xx, not to the end, or not at all though the client was still there.
    pub errors: Counter,
    /// From the choice of the target to the head of the answer; of those that ran out of time or whose client has left, until
    /// then.
    pub latency: Histogram,
}

/// Why a copy was not sent, or not awaited to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Too many copies were open.
    InFlight,
    /// The open copies held too many bytes.
    Bytes,
    /// The body did not come to its end: its client has left, or the target has answered without it.
    Body,
    /// The shadow had no replica that was ready.
    NotReady,
    /// The shadow's queue was full, or it has failed to deploy.
    Refused,
    /// It took too long.
    Timeout,
}

impl Dropped {
    const ALL: [(Self, &'static str); 6] = [
        (Self::InFlight, "in_flight"),
        (Self::Bytes, "bytes"),
        (Self::Body, "body"),
        (Self::NotReady, "not_ready"),
        (Self::Refused, "refused"),
        (Self::Timeout, "timeout"),
    ];
}

/// Of one shadow.
#[derive(Debug, Default)]
pub struct ShadowMeter {
    /// Copies that were sent to a replica.
    pub copied: Counter,
    /// Copies that were answered to the end with a status below 500.
    pub answered: Counter,
    /// Copies that were answered otherwise, or not by a replica's fault.
    pub errors: Counter,
    dropped: [Counter; Dropped::ALL.len()],
}

impl ShadowMeter {
    /// One more that was dropped.
    pub fn drop_for(&self, reason: Dropped) {
        self.dropped[reason as usize].up();
    }
}

/// By split and name.
#[derive(Debug, Default)]
struct Meters {
    targets: Roster<(String, String), TargetMeter>,
    shadows: Roster<(String, String), ShadowMeter>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Traffic(Mutex<Meters>);

impl Traffic {
    fn meters(&self) -> MutexGuard<'_, Meters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The meter of a split's target.
    pub fn target(&self, split: &str, name: &str) -> Arc<TargetMeter> {
        self.meters().targets.of((split.to_owned(), name.to_owned()))
    }

    /// The meter of a split's shadow.
    pub fn shadow(&self, split: &str, name: &str) -> Arc<ShadowMeter> {
        self.meters().shadows.of((split.to_owned(), name.to_owned()))
    }

    /// Adds what it holds to `sums`.
    pub fn add_to(&self, sums: &mut BTreeMap<String, SplitTotals>) {
        let meters = self.meters();
        for ((split, name), meter) in meters.targets.iter() {
            let target = sums.entry(split.clone()).or_default().targets.entry(name.clone()).or_default();
            target.open += meter.open.value();
            target.requests += meter.requests.value();
            target.errors += meter.errors.value();
            meter.latency.add_to(&mut target.latency);
        }
        for ((split, name), meter) in meters.shadows.iter() {
            let shadow = sums.entry(split.clone()).or_default().shadows.entry(name.clone()).or_default();
            shadow.copied += meter.copied.value();
            shadow.answered += meter.answered.value();
            shadow.errors += meter.errors.value();
            for (reason, name) in Dropped::ALL {
                *shadow.dropped.entry(name).or_default() += meter.dropped[reason as usize].value();
            }
        }
    }
}

/// What one split has counted, over all shards; its JSON is what `Proxy.traffic()` gives.
#[derive(Debug, Default, Serialize)]
pub struct SplitTotals {
    /// By the target's name.
    pub targets: BTreeMap<String, TargetTotals>,
    /// By the shadow's name.
    pub shadows: BTreeMap<String, ShadowTotals>,
}

/// See [`TargetMeter`].
#[derive(Debug, Default, Serialize)]
#[expect(missing_docs, reason = "documented where it is counted")]
pub struct TargetTotals {
    pub open: u64,
    pub requests: u64,
    pub errors: u64,
    #[serde(serialize_with = "buckets")]
    pub latency: Latency,
}

/// See [`ShadowMeter`].
#[derive(Debug, Default, Serialize)]
#[expect(missing_docs, reason = "documented where it is counted")]
pub struct ShadowTotals {
    pub copied: u64,
    pub answered: u64,
    pub errors: u64,
    /// By reason.
    pub dropped: BTreeMap<&'static str, u64>,
}

fn buckets<S: Serializer>(latency: &Latency, serializer: S) -> Result<S::Ok, S::Error> {
    let mut list = serializer.serialize_seq(None)?;
    for bucket in latency.buckets() {
        list.serialize_element(&bucket)?;
    }
    list.end()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn shards_add_up_and_meters_outlive_what_resolves_them() {
        let shards = [Traffic::default(), Traffic::default()];
        for shard in &shards {
            shard.target("/x", "a").requests.up();
            shard.target("/x", "a").latency.record(Duration::from_micros(100));
            shard.shadow("/x", "c").drop_for(Dropped::Body);
        }
        shards[1].target("/x", "b").errors.up();
        let mut sums = BTreeMap::new();
        for shard in &shards {
            shard.add_to(&mut sums);
        }
        let dropped =
            serde_json::json!({"body": 2, "bytes": 0, "in_flight": 0, "not_ready": 0, "refused": 0, "timeout": 0});
        assert_eq!(
            serde_json::to_value(&sums).expect("plain data"),
            serde_json::json!({"/x": {
                "targets": {"a": {"open": 0, "requests": 2, "errors": 0, "latency": [[100, 2]]},
                    "b": {"open": 0, "requests": 0, "errors": 1, "latency": []}},
                "shadows": {"c": {"copied": 0, "answered": 0, "errors": 0, "dropped": dropped}}}})
        );
    }

    #[test]
    fn reasons_stand_in_the_order_of_their_numbers() {
        assert!(Dropped::ALL.iter().enumerate().all(|(at, (reason, _))| *reason as usize == at));
    }
}
