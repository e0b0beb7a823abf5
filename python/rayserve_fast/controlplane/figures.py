"""What the proxies have counted about traffic: read, summed, subtracted, and told to people.

A proxy counts requests, errors (status 5xx and broken answers) and a histogram of latencies for each target of each
split, since it started; ARCHITECTURE.md, "Splitting", says what. A *reading* is what every proxy answered at one
moment, by proxy process, so that a restarted proxy, which counts from zero, is another one. Pure.

The dataclasses at the top are what `serve.get_traffic` returns; `rayserve_fast.traffic` re-exports them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: What each proxy process counted: proxy -> split -> what `_core.Proxy.traffic` says of it.
Reading = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TargetTraffic:
    """One target of a route; counts are since the proxies that run now have started."""

    weight: float
    ready_replicas: int
    requests: int  # that have ended, whatever the end
    errors: int  # of them: answered with a status of 5xx, not to the end, or not at all
    p50_ms: float | None  # from the choice of the target to the head of the answer; None: no answer yet
    p95_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class ShadowTraffic:
    """One shadow of a route: what became of the copies."""

    share: float
    ready_replicas: int
    copied: int
    answered: int
    errors: int
    dropped: int
    dropped_because: Mapping[str, int]  # reason -> copies


@dataclass(frozen=True)
class RouteTraffic:
    """Where the requests of a route or an endpoint go, and what was counted."""

    name: str
    targets: Mapping[str, TargetTraffic]
    shadows: Mapping[str, ShadowTraffic]
    sticky: Mapping[str, str] | None
    rules: Sequence[Mapping[str, str | None]]
    rollout: str | None  # the state of the route's last rollout


@dataclass
class Tally:
    """Counts of one target, over any number of proxies."""

    requests: int = 0
    errors: int = 0
    latency: Counter[float] = field(default_factory=Counter)  # upper bound of the bucket in microseconds -> requests
    open: int = 0  # that wait for the head of their answer, as of now

    @classmethod
    def read(cls, counted: Mapping[str, Any]) -> Tally:
        """From the JSON of one proxy."""
        latency = Counter(dict(counted.get("latency", ())))
        return cls(counted.get("requests", 0), counted.get("errors", 0), latency, counted.get("open", 0))

    def add(self, other: Tally) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.latency.update(other.latency)
        self.open += other.open

    def since(self, earlier: Tally) -> Tally:
        """What came after `earlier`; everything, if the proxy has begun to count anew in between.

        Its `open` are those that have waited since `earlier` at least: as many as if all others had ended first.
        """
        before = Tally() if earlier.requests > self.requests else earlier
        requests = self.requests - before.requests
        waiting = max(0, min(self.open, earlier.open - requests))
        return Tally(requests, self.errors - before.errors, self.latency - before.latency, waiting)

    def quantile_ms(self, share: float) -> float | None:
        """The latency in ms that this share of the requests did not exceed: the upper bound of its bucket."""
        rank = share * self.latency.total()
        seen = 0
        for bound, n in sorted(self.latency.items()):
            seen += n
            if seen >= rank:
                return bound / 1000
        return None


def of_targets(reading: Reading, split: str) -> dict[str, dict[str, Tally]]:
    """The tallies of one split: proxy -> target -> tally."""
    return {
        proxy: {target: Tally.read(c) for target, c in splits.get(split, {}).get("targets", {}).items()}
        for proxy, splits in reading.items()
    }


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum."""
    result = Tally()
    for tally in tallies:
        result.add(tally)
    return result


def target_traffic(weight: float, ready: int, tally: Tally) -> TargetTraffic:
    """A target's counts as people read them."""
    p50, p95, p99 = (tally.quantile_ms(q) for q in (0.5, 0.95, 0.99))
    return TargetTraffic(weight, ready, tally.requests, tally.errors, p50, p95, p99)


def shadow_traffic(reading: Reading, split: str, name: str, share: float, ready: int) -> ShadowTraffic:
    """A shadow's counts, over all proxies."""
    counted = [splits.get(split, {}).get("shadows", {}).get(name, {}) for splits in reading.values()]
    copied, answered, errors = (sum(c.get(key, 0) for c in counted) for key in ("copied", "answered", "errors"))
    because: Counter[str] = Counter()
    for c in counted:
        because.update({reason: n for reason, n in c.get("dropped", {}).items() if n})
    return ShadowTraffic(share, ready, copied, answered, errors, because.total(), dict(because))
