//! What a shard counts, cheaply: each counter has one writing thread, so an increment is a load and a store.
//!
//! Readers on other threads sum the shards. Gauges are counters that also go down.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{tally::Tallies, traffic::Traffic};

/// A number that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn up(&self) {
        self.0.store(self.0.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(count), Relaxed);
    }

    /// One less.
    pub fn down(&self) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(1), Relaxed);
    }

    /// As of now.
    pub fn value(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! metrics {
    ($($(#[doc = $help:literal])* $name:ident: $kind:ident,)*) => {
        /// The counters of one shard.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[doc = $help])* pub $name: Counter,)*
            /// What splits count.
            pub traffic: Traffic,
            /// Batches by deployment.
            pub batches: Tallies,
        }

        impl Metrics {
            /// Every counter's name, kind and meaning, in the order of declaration.
            pub const DESCRIBED: &[(&str, Kind, &str)] =
                &[$((stringify!($name), Kind::$kind, concat!($($help),*).trim_ascii())),*];

            /// Every counter with its name, in the same order.
            pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.value())),*].into_iter()
            }
        }
    };
}

/// What a counter's value means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ever.
    Total,
    /// Now.
    Gauge,
}

metrics! {
    /// Open client connections.
    connections: Gauge,
    /// Client connections ever accepted.
    accepted: Total,
    /// Times that accepting failed, as when descriptors run out.
    accept_errors: Total,
    /// Requests ever received, the proxy's own pages included.
    requests: Total,
    /// Requests that have not been answered to the end.
    requests_open: Gauge,
    /// Streams that a replica has not ended.
    streams: Gauge,
    /// Links that are up.
    links: Gauge,
    /// Links ever lost.
    links_lost: Total,
    /// Requests that waited for a replica.
    queued: Total,
    /// Requests sent once more after a death.
    retried: Total,
    /// BUSY answers.
    busy: Total,
    /// CANCEL frames sent.
    cancelled: Total,
    /// Answers made by the proxy because a request failed.
    errors: Total,
    /// Requests lost to a panic in the proxy.
    panics: Total,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_carry_their_names() {
        let metrics = Metrics::default();
        metrics.requests.up();
        metrics.streams.up();
        metrics.streams.down();
        let all: std::collections::HashMap<_, _> = metrics.all().collect();
        assert_eq!((all["requests"], all["streams"]), (1, 0));
    }
}
