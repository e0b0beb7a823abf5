//! How long something took, in buckets that are a sixteenth of their value wide: log-linear, as HDR histograms are.
//!
//! One thread writes, any thread reads. A bucket reaches up to and with its bound, and every power of two is a bound, so
//! that coarser buckets are exact sums of these.

use std::time::Duration;

use crate::metrics::Counter;

/// Steps in each doubling, as a power of two.
const STEP_BITS: u32 = 4;
const STEPS: u64 = 1 << STEP_BITS;
/// More than an hour, in microseconds, as a power of two; what takes longer counts as that.
const MAX_BITS: u32 = 32;
const BUCKETS: usize = ((MAX_BITS - STEP_BITS + 1) << STEP_BITS) as usize;

/// See the module.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[Counter; BUCKETS]>,
    /// Microseconds.
    sum: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new(std::array::from_fn(|_| Counter::default())), sum: Counter::default() }
    }
}

impl Histogram {
    /// One that took so long.
    pub fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).min((1 << MAX_BITS) - 1);
        self.buckets[index(us)].up();
        self.sum.add(us);
    }

    /// Adds what it holds to `sums`.
    pub fn add_to(&self, sums: &mut Latency) {
        sums.sum_us += self.sum.value();
        sums.counts.resize(BUCKETS, 0);
        for (sum, bucket) in sums.counts.iter_mut().zip(self.buckets.iter()) {
            *sum += bucket.value();
        }
    }
}

/// Histograms, summed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latency {
    counts: Vec<u64>,
    /// Of all, in microseconds.
    pub sum_us: u64,
}

impl Latency {
    /// The upper bound in microseconds and the count of every bucket that holds something, in order.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        self.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(at, &count)| (bound(at), count))
    }
}

fn index(us: u64) -> usize {
    let below = us.saturating_sub(1);
    if below < STEPS {
        return below as usize;
    }
    let shift = below.ilog2() - STEP_BITS;
    ((u64::from(shift) << STEP_BITS) + (below >> shift)) as usize
}

fn bound(index: usize) -> u64 {
    let index = index as u64;
    if index < STEPS {
        return index + 1;
    }
    let shift = (index >> STEP_BITS) - 1;
    (STEPS + index % STEPS + 1) << shift
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap_and_powers_of_two_are_bounds() {
        for at in 0..BUCKETS {
            assert_eq!(index(bound(at)), at, "a bound belongs to its bucket");
            if at + 1 < BUCKETS {
                assert_eq!(index(bound(at) + 1), at + 1);
            }
        }
        assert!((0..MAX_BITS).all(|bits| bound(index(1 << bits)) == 1 << bits));
        assert_eq!(bound(BUCKETS - 1), 1 << MAX_BITS);
    }

    #[test]
    fn histograms_add_up() {
        let (one, two) = (Histogram::default(), Histogram::default());
        one.record(Duration::from_micros(3));
        two.record(Duration::from_micros(3));
        two.record(Duration::from_millis(1));
        two.record(Duration::MAX);
        let mut sums = Latency::default();
        one.add_to(&mut sums);
        two.add_to(&mut sums);
        assert_eq!(sums.buckets().collect::<Vec<_>>(), [(3, 2), (1024, 1), (1 << MAX_BITS, 1)]);
        assert_eq!(sums.sum_us, 1006 + (1 << MAX_BITS) - 1);
    }

    proptest! {
        #[test]
        fn a_bound_is_a_sixteenth_above_at_most(us in 1_u64..1 << MAX_BITS) {
            let bound = bound(index(us));
            prop_assert!(us <= bound && bound - us <= us / 16);
        }
    }
}
