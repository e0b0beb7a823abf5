//! What a shard counts, cheaply: each counter has one writing thread, so an increment is a load and a store.
//!
//! Readers on other threads sum the shards. Gauges are counters that also go down.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::tally::Tallies;

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
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one shard.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[$doc])* pub $name: Counter,)*
            /// Batches by deployment.
            pub batches: Tallies,
        }

        impl Metrics {
            /// Every counter with its name, in the order of declaration.
            pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.value())),*].into_iter()
            }
        }
    };
}

metrics! {
    /// Open client connections.
    connections,
    /// Client connections ever accepted.
    accepted,
    /// Times that accepting failed, as when descriptors run out.
    accept_errors,
    /// Requests ever received, the proxy's own pages included.
    requests,
    /// Requests that have not been answered to the end.
    requests_open,
    /// Streams that a replica has not ended.
    streams,
    /// Links that are up.
    links,
    /// Links ever lost.
    links_lost,
    /// Requests that waited for a replica.
    queued,
    /// Requests sent once more after a death.
    retried,
    /// BUSY answers.
    busy,
    /// CANCEL frames sent.
    cancelled,
    /// Answers made by the proxy because a request failed.
    errors,
    /// Requests lost to a panic in the proxy.
    panics,
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
