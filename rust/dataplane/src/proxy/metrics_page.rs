//! `/-/metrics`: the proxy's counters and those of its splits as Prometheus reads them, summed when somebody asks.

use std::{collections::BTreeMap, fmt};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet, text::encode},
    metrics::MetricType,
    registry::Registry,
};

use super::Shared;
use crate::{
    histogram::Latency,
    metrics::{Kind, Metrics},
    tally::Batches,
    traffic::{SplitTotals, TargetTotals},
};

pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Upper bounds of the exported histogram in microseconds, as powers of two: 128 µs to 134 s.
const BOUNDS: std::ops::RangeInclusive<u32> = 7..=27;
/// Powers of two up to the largest batch, 16,384.
const SIZES: usize = 15;

/// The page's text.
pub(super) fn text(shared: &Shared) -> String {
    let page = Page { counters: shared.counters(), splits: shared.traffic(), batches: shared.batches() };
    let mut registry = Registry::default();
    registry.register_collector(Box::new(page));
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes everything");
    text
}

#[derive(Debug)]
struct Page {
    counters: BTreeMap<&'static str, u64>,
    splits: BTreeMap<String, SplitTotals>,
    batches: BTreeMap<String, Batches>,
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_counters(&mut encoder)?;
        self.encode_splits(&mut encoder)?;
        self.encode_batches(&mut encoder)
    }
}

impl Page {
    fn encode_counters(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for (name, kind, help) in Metrics::DESCRIBED {
            let (name, help, value) =
                (format!("ray_serve_proxy_{name}"), help.trim_end_matches('.'), self.counters[name]);
            match kind {
                Kind::Total => {
                    encoder
                        .encode_descriptor(&name, help, None, MetricType::Counter)?
                        .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
                }
                Kind::Gauge => {
                    encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?.encode_gauge(&value)?;
                }
            }
        }
        Ok(())
    }

    fn encode_splits(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Requests of a split that wait for the head of their answer";
        let mut family = encoder.encode_descriptor("ray_serve_traffic_open", help, None, MetricType::Gauge)?;
        self.targets(&mut family, |mut metric, target| {
            metric.encode_gauge(&i64::try_from(target.open).unwrap_or(i64::MAX))
        })?;
        let help = "Requests of a split that have ended";
        let mut family = encoder.encode_descriptor("ray_serve_traffic_requests", help, None, MetricType::Counter)?;
        self.targets(&mut family, |mut metric, target| {
            metric.encode_counter::<NoLabelSet, _, u64>(&target.requests, None)
        })?;
        let help = "Requests of a split that were answered with 5xx, not to the end, or not at all";
        let mut family = encoder.encode_descriptor("ray_serve_traffic_errors", help, None, MetricType::Counter)?;
        self.targets(&mut family, |mut metric, target| {
            metric.encode_counter::<NoLabelSet, _, u64>(&target.errors, None)
        })?;
        let help = "Milliseconds from the choice of a target to the head of its answer";
        let mut family =
            encoder.encode_descriptor("ray_serve_traffic_latency_ms", help, None, MetricType::Histogram)?;
        self.targets(&mut family, |mut metric, target| {
            let buckets = coarse(&target.latency);
            let count = buckets.iter().map(|(_, count)| count).sum();
            metric.encode_histogram::<NoLabelSet>(milliseconds(target.latency.sum_us), count, &buckets, None)
        })?;
        let help = "Copies of a split's requests, by what became of them";
        let mut family = encoder.encode_descriptor("ray_serve_traffic_shadow", help, None, MetricType::Counter)?;
        for (split, totals) in &self.splits {
            for (name, shadow) in &totals.shadows {
                let known = [("copied", shadow.copied), ("answered", shadow.answered), ("error", shadow.errors)];
                let known = known.into_iter().map(|(outcome, count)| (outcome.to_owned(), count));
                let dropped = shadow.dropped.iter().map(|(reason, &count)| (format!("dropped_{reason}"), count));
                for (outcome, count) in known.chain(dropped) {
                    let labels = [("route", escaped(split)), ("target", escaped(name)), ("outcome", outcome)];
                    family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
        }
        Ok(())
    }

    fn encode_batches(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Batches of the router, by why they were released";
        let mut family = encoder.encode_descriptor("ray_serve_router_batches", help, None, MetricType::Counter)?;
        for (name, batches) in &self.batches {
            for (reason, count) in [("full", batches.full), ("waited", batches.waited)] {
                let [app, deployment] = deployment_labels(name);
                let labels = [app, deployment, ("reason", reason.to_owned())];
                family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
            }
        }
        let help = "Requests in a batch of the router";
        let mut family = encoder.encode_descriptor("ray_serve_router_batch_size", help, None, MetricType::Histogram)?;
        for (name, batches) in &self.batches {
            put_powers(&mut family, name, &batches.sizes[..SIZES], batches.requests, float)?;
        }
        let help = "Milliseconds that the first request of a batch has waited for others";
        let mut family =
            encoder.encode_descriptor("ray_serve_router_batch_wait_ms", help, None, MetricType::Histogram)?;
        for (name, batches) in &self.batches {
            put_powers(&mut family, name, &batches.waits_us, batches.wait_us, milliseconds)?;
        }
        Ok(())
    }

    fn targets(
        &self,
        family: &mut MetricEncoder<'_>,
        put: impl Fn(MetricEncoder<'_>, &TargetTotals) -> fmt::Result,
    ) -> fmt::Result {
        for (split, totals) in &self.splits {
            for (name, target) in &totals.targets {
                put(family.encode_family(&labels(split, name))?, target)?;
            }
        }
        Ok(())
    }
}

fn labels(split: &str, target: &str) -> impl EncodeLabelSet + use<> {
    [("route", escaped(split)), ("target", escaped(target))]
}

/// Of `{app}#{deployment}`.
fn deployment_labels(key: &str) -> [(&'static str, String); 2] {
    let (app, deployment) = key.rsplit_once('#').unwrap_or(("", key));
    [("application", escaped(app)), ("deployment", escaped(deployment))]
}

/// A histogram of counts by powers of two, in another unit; its bounds are the same at each scrape.
fn put_powers(
    family: &mut MetricEncoder<'_>,
    deployment: &str,
    counts: &[u64],
    sum: u64,
    unit: fn(u64) -> f64,
) -> fmt::Result {
    let bounds = (0..counts.len()).map(|power| unit(1 << power));
    let buckets: Vec<_> = bounds.zip(counts.iter().copied()).chain([(f64::MAX, 0)]).collect();
    let labels = deployment_labels(deployment);
    let mut metric = family.encode_family(&labels)?;
    metric.encode_histogram::<NoLabelSet>(unit(sum), counts.iter().sum(), &buckets, None)
}

/// The library writes values as they are.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Sums up to each bound in milliseconds; what is above the last stands at infinity.
fn coarse(latency: &Latency) -> Vec<(f64, u64)> {
    let mut buckets: Vec<_> = BOUNDS.map(|bits| (milliseconds(1 << bits), 0)).chain([(f64::MAX, 0)]).collect();
    for (bound, count) in latency.buckets() {
        let at = buckets.partition_point(|(upper, _)| *upper < milliseconds(bound));
        buckets[at].1 += count;
    }
    buckets
}

fn milliseconds(us: u64) -> f64 {
    float(us) / 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "a sum above 2^53 microseconds is 285 years")]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::histogram::Histogram;

    #[test]
    fn coarse_buckets_hold_what_the_fine_ones_do() {
        let histogram = Histogram::default();
        for us in [1, 128, 129, 1024, 1025, 200_000_000] {
            histogram.record(Duration::from_micros(us));
        }
        let mut sums = Latency::default();
        histogram.add_to(&mut sums);
        let filled: Vec<_> = coarse(&sums).into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(0.128, 2), (0.256, 1), (1.024, 1), (2.048, 1), (f64::MAX, 1)]);
    }

    #[test]
    fn names_cannot_break_the_text() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
