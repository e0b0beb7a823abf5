"""A rollout: one target of a route gets its share in steps, and loses it by itself when it does badly.

A state machine without clock, Ray or storage: `observe` takes the time and what was counted in the latest window, and
decides. Time is Unix time, as a rollout outlives the process that drives it.

    RUNNING ── every step lasted its time, with a window that passed ──▶ COMPLETED (the last step's share stays)
       │ ▲ resume: the step begins anew                  ┌──▶ ROLLED_BACK (the weights from before)
       ▼ │                                               │
    PAUSED: no further step ─── a window crosses a bound, from RUNNING as well ── or abort ──▶ ABORTED (the same)

Invariant: no window with fewer than `min_requests` requests of the new target decides anything. A step that has
lasted its time without such a window is held, which is said once. Requests that have waited for an answer since before
the window count against the target, as having taken all of it, but no step passes because of them. While the old
targets get too few requests for a p99 of their own, as in a last step of 1, the ratio is taken to the last one that
was known; without any, the step is held too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rayserve_fast.controlplane.figures import Tally, total

#: How many decisions are remembered; the oldest go first.
HISTORY = 100
#: No step passes on a window shorter than this part of what it shall cover, as it is after a restart of the controller.
FULL = 0.8
#: A window moves on in so many steps; it is at most one of them longer than asked for.
GRAINS = 20


@dataclass(frozen=True)
class Plan:
    """What was asked for; `serve.rollout` documents and checks each of them."""

    steps: tuple[float, ...]
    step_duration_s: float
    window_s: float
    min_requests: int
    max_error_rate: float | None
    max_p99_ms: float | None
    max_p99_ratio: float | None


@dataclass(frozen=True)
class Window:
    """What was counted in the latest window, of the new target and of the old ones together."""

    seconds: float  # that it covers so far
    requests: int
    errors: int
    p99_ms: float | None
    old_requests: int
    old_errors: int
    old_p99_ms: float | None
    waiting: int = 0  # so many at least wait for the new target since before; in p99_ms they took the whole window

    @property
    def error_rate(self) -> float:
        """Errors per request of the new target, 0 without requests."""
        return self.errors / self._seen if self._seen else 0.0

    @property
    def _seen(self) -> int:
        return self.requests + self.waiting

    def enough(self, min_requests: int) -> bool:
        """Whether a bound that it crosses is crossed."""
        return self._seen >= min_requests


@dataclass(frozen=True)
class Decision:
    """One thing that was decided, by whom, and why."""

    at: float  # Unix time in seconds
    action: str  # start, advance, hold, complete, roll_back; pause, resume, abort
    share: float  # of the new target, once this is in force
    reason: str
    window: Window | None


@dataclass(frozen=True)
class RolloutStatus:
    """How far a rollout is, and each decision that led there, oldest first."""

    route: str
    target: str
    state: str  # RUNNING, PAUSED; COMPLETED, ROLLED_BACK, ABORTED are final
    step: int  # counted from 1
    steps: tuple[float, ...]
    share: float  # the weight of the new target now
    window: Window | None  # what was counted last in this step
    history: tuple[Decision, ...]

    @property
    def over(self) -> bool:
        """Whether nothing more will be decided."""
        return self.state not in ("RUNNING", "PAUSED")

    @property
    def reason(self) -> str:
        """Why the last decision was taken."""
        return self.history[-1].reason


@dataclass
class Rollout:
    """One rollout, from its start on; what of it must survive the controller."""

    id: str
    name: str  # the route or endpoint
    target: str
    plan: Plan
    before: Mapping[str, float]  # the weights to go back to; has the new target too
    step_at: float
    state: str = "RUNNING"
    step: int = 0
    old_p99_ms: float | None = None  # the last that was known
    window: Window | None = None
    history: list[Decision] = field(default_factory=list)

    @property
    def active(self) -> bool:
        return self.state in ("RUNNING", "PAUSED")

    def weights(self) -> dict[str, float]:
        """What each target shall get now; the old ones share the rest as they did before."""
        if self.state in ("ROLLED_BACK", "ABORTED"):
            return dict(self.before)
        share = self.plan.steps[self.step]
        rest = 1 - self.before[self.target]
        return {t: share if t == self.target else w / rest * (1 - share) for t, w in self.before.items()}

    def start(self, now: float) -> None:
        """Note that it has begun."""
        self._decide(now, "start", f"first of {len(self.plan.steps)} steps")

    def observe(self, now: float, window: Window) -> Decision | None:
        """Look at the latest window; what is decided because of it, if anything."""
        if not self.active:
            return None
        self.window = window
        if window.old_requests >= self.plan.min_requests:
            self.old_p99_ms = window.old_p99_ms
        if window.enough(self.plan.min_requests) and (why := self._crossed(window)) is not None:
            self.state = "ROLLED_BACK"
            return self._decide(now, "roll_back", why)
        full = window.seconds >= FULL * min(self.plan.window_s, self.plan.step_duration_s)
        if self.state == "PAUSED" or now - self.step_at < self.plan.step_duration_s or not full:
            return None
        if (lack := self._lack(window)) is not None:
            return None if self.history[-1].action == "hold" else self._decide(now, "hold", lack)
        good = _told(window)
        if self.step + 1 == len(self.plan.steps):
            self.state = "COMPLETED"
            return self._decide(now, "complete", good)
        self._begin(now, self.step + 1)
        return self._decide(now, "advance", good, window)

    def pause(self, now: float) -> Decision | None:
        """Stay at this share; bounds are watched as before."""
        return self._order(now, "pause", "PAUSED")

    def resume(self, now: float) -> Decision | None:
        """Go on; the step begins anew."""
        decision = self._order(now, "resume", "RUNNING")
        if decision is not None:
            self._begin(now, self.step)
        return decision

    def abort(self, now: float) -> Decision | None:
        """Go back to the weights from before."""
        return self._order(now, "abort", "ABORTED")

    def status(self) -> RolloutStatus:
        """What people see of it."""
        return RolloutStatus(
            self.name,
            self.target,
            self.state,
            self.step + 1,
            self.plan.steps,
            self.weights()[self.target],
            self.window,
            tuple(self.history),
        )

    def _order(self, now: float, action: str, state: str) -> Decision | None:
        """An operator's order; nothing if it is carried out already, as a call may be repeated after a crash."""
        if self.state == state:
            return None
        if not self.active:
            raise ValueError(f"Cannot {action} the rollout of {self.target!r} on {self.name!r}: it is {self.state}.")
        self.state = state
        return self._decide(now, action, "ordered by an operator")

    def _begin(self, now: float, step: int) -> None:
        self.step, self.step_at, self.window = step, now, None

    def _lack(self, window: Window) -> str | None:
        """What there must be more of before the step can pass, in words."""
        if window.requests < self.plan.min_requests:
            more = f" ({window.waiting} more have no answer yet)" if window.waiting else ""
            return (
                f"{window.requests} of the {self.plan.min_requests} requests that a window must have to be judged{more}"
            )
        if window.p99_ms is None and (self.plan.max_p99_ms is not None or self.plan.max_p99_ratio is not None):
            return "no answer whose time could be judged"
        if self.plan.max_p99_ratio is not None and self.old_p99_ms is None:
            needed = f"{self.plan.min_requests} requests of the old targets that max_p99_ratio needs"
            return f"{window.old_requests} of the {needed}"
        return None

    def _crossed(self, window: Window) -> str | None:
        """The bound that the window crosses, in words."""
        plan, p99, requests = self.plan, window.p99_ms or 0.0, _requests(window)
        if plan.max_error_rate is not None and window.error_rate > plan.max_error_rate:
            return f"error rate {window.error_rate:.2%} is above {plan.max_error_rate:.2%} {requests}"
        if plan.max_p99_ms is not None and p99 > plan.max_p99_ms:
            return f"p99 {p99:.1f} ms is above {plan.max_p99_ms:g} ms {requests}"
        if plan.max_p99_ratio is not None and self.old_p99_ms and p99 > plan.max_p99_ratio * self.old_p99_ms:
            bound = f"{plan.max_p99_ratio:g} times the old targets' {self.old_p99_ms:.1f} ms"
            return f"p99 {p99:.1f} ms is above {bound} {requests}"
        return None

    def _decide(self, now: float, action: str, reason: str, window: Window | None = None) -> Decision:
        decision = Decision(now, action, self.weights()[self.target], reason, window or self.window)
        self.history = [*self.history[1 - HISTORY :], decision]
        return decision


class Samples:
    """Readings of one split over the present step; says what came in the last so many seconds."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, Mapping[str, Mapping[str, Tally]]]] = []

    def clear(self) -> None:
        """A step begins: what was counted before it is not its own."""
        self._samples.clear()

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, now: float, tallies: Mapping[str, Mapping[str, Tally]], seconds: float) -> None:
        """Take a reading; of those older than `seconds` only the newest is still needed.

        The others are kept at a distance, so that a window of a day needs no more of them than one of a second.
        """
        while len(self._samples) > 1 and self._samples[1][0] <= now - seconds:
            self._samples.pop(0)
        if len(self._samples) > 1 and self._samples[-1][0] - self._samples[-2][0] < seconds / GRAINS:
            self._samples.pop()
        self._samples.append((now, tallies))

    def window(self, target: str) -> Window:
        """What was counted from the oldest reading on. A proxy counts from the first reading that has it."""
        first: dict[str, Mapping[str, Tally]] = {}
        last: dict[str, Mapping[str, Tally]] = {}
        for _, tallies in self._samples:
            first = {**tallies, **first}
            last = {**last, **tallies}
        new: list[Tally] = []
        old: list[Tally] = []
        for proxy, targets in last.items():
            for name, tally in targets.items():
                (new if name == target else old).append(tally.since(first[proxy].get(name, Tally())))
        seconds = self._samples[-1][0] - self._samples[0][0] if self._samples else 0.0
        a, b = total(new), total(old)
        for tally in (a, b):
            if tally.open:
                tally.latency[seconds * 1e6] += tally.open
        p99, old_p99 = a.quantile_ms(0.99), b.quantile_ms(0.99)
        return Window(seconds, a.requests, a.errors, p99, b.requests, b.errors, old_p99, a.open)


def _told(window: Window) -> str:
    p99 = f", p99 {window.p99_ms:.1f} ms" if window.p99_ms is not None else ""
    return f"error rate {window.error_rate:.2%}{p99} {_requests(window)}"


def _requests(window: Window) -> str:
    more = f", {window.waiting} more without an answer yet" if window.waiting else ""
    return f"in {window.requests} requests within {window.seconds:.1f} s{more}"
