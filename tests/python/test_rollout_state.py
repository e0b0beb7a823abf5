"""What a rollout decides on which counts, and how counts of proxies become windows; without Ray and without a clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rayserve_fast.controlplane.figures import Tally, of_targets, shadow_traffic, target_traffic, total
from rayserve_fast.controlplane.rollout import GRAINS, HISTORY, Plan, Rollout, Samples, Window

T0 = 1000.0


def rollout(before: dict[str, float] | None = None, **options: Any) -> Rollout:
    asked: dict[str, Any] = {
        "steps": (0.1, 0.5, 1.0),
        "step_duration_s": 10.0,
        "window_s": 10.0,
        "min_requests": 100,
        "max_error_rate": 0.01,
        "max_p99_ms": None,
        "max_p99_ratio": None,
    }
    r = Rollout("id", "/x", "new", Plan(**{**asked, **options}), before or {"old": 1.0, "new": 0.0}, T0)
    r.start(T0)
    return r


def window(
    requests: int, errors: int = 0, p99: float = 5.0, old: int = 1000, old_p99: float = 5.0, seconds: float = 10.0
) -> Window:
    return Window(seconds, requests, errors, p99 if requests else None, old, 0, old_p99 if old else None)


GOOD, FEW, FAILING = window(200), window(99), window(200, errors=3)


def actions(r: Rollout) -> list[str]:
    return [d.action for d in r.history]


def test_it_advances_step_by_step_and_completes_after_the_last_one() -> None:
    r = rollout()
    shares = [r.weights()]
    for step in (1, 2, 3):
        assert r.observe(T0 + step * 10 - 0.1, GOOD) is None, "each step lasts its time"
        assert r.observe(T0 + step * 10, GOOD) is not None
        shares.append(r.weights())
    assert shares == [
        {"old": 0.9, "new": 0.1},
        {"old": 0.5, "new": 0.5},
        {"old": 0.0, "new": 1.0},
        {"old": 0.0, "new": 1.0},
    ]
    assert actions(r) == ["start", "advance", "advance", "complete"]
    assert r.status().over
    assert r.observe(T0 + 100, FAILING) is None, "what comes later is not its business"


def test_old_targets_share_the_rest_as_before() -> None:
    r = rollout({"a": 0.6, "b": 0.2, "new": 0.2}, steps=(0.6,))
    assert r.weights() == pytest.approx({"a": 0.3, "b": 0.1, "new": 0.6})


@pytest.mark.parametrize(
    ("options", "crossing", "reason"),
    [
        ({}, FAILING, r"error rate 1.50% is above 1.00% in 200 requests"),
        ({"max_p99_ms": 50}, window(200, p99=51), "p99 51.0 ms is above 50 ms in 200 requests"),
        ({"max_p99_ratio": 2}, window(200, p99=11), "p99 11.0 ms is above 2 times the old targets' 5.0 ms in 200"),
    ],
)
def test_a_window_that_crosses_a_bound_rolls_back_at_once(options: Any, crossing: Window, reason: str) -> None:
    r = rollout({"old": 0.95, "new": 0.05}, **options)
    assert r.observe(T0 + 1, GOOD) is None
    r.observe(T0 + 1.5, crossing)
    assert r.state == "ROLLED_BACK"
    assert r.weights() == {"old": 0.95, "new": 0.05}
    assert reason in r.status().reason
    assert r.status().share == 0.05
    assert r.history[-1].window == crossing


@pytest.mark.parametrize(
    ("options", "within"),
    [
        ({}, window(200, errors=2)),
        ({"max_error_rate": None}, window(200, errors=200)),
        ({"max_p99_ms": 50}, window(200, p99=50)),
        ({"max_p99_ratio": 2}, window(200, p99=10)),
    ],
)
def test_what_is_exactly_at_a_bound_is_within_it(options: Any, within: Window) -> None:
    r = rollout(**options)
    assert r.observe(T0 + 10, within) is not None
    assert r.step == 1


def test_windows_with_too_few_requests_decide_nothing_and_hold_the_step_which_is_said_once() -> None:
    r = rollout()
    few_but_bad = window(99, errors=99)
    assert r.observe(T0 + 5, few_but_bad) is None
    assert r.observe(T0 + 10, FEW) is not None
    assert r.observe(T0 + 11, FEW) is None
    assert (r.state, r.step) == ("RUNNING", 0)
    assert r.history[-1].reason == "99 of the 100 requests that a window must have to be judged"
    r.observe(T0 + 12, GOOD)
    r.observe(T0 + 22, FEW)
    assert actions(r) == ["start", "hold", "advance", "hold"], "each step may be held"


def test_requests_without_an_answer_count_against_the_target_and_let_no_step_pass() -> None:
    hanging = replace(window(20, p99=10_000.0), waiting=80)
    for bound in ({"max_p99_ms": 300}, {"max_p99_ratio": 3}):
        r = rollout(**bound)
        r.observe(T0 + 5, hanging)
        assert r.state == "ROLLED_BACK"
        assert r.status().reason.endswith("in 20 requests within 10.0 s, 80 more without an answer yet")
    r = rollout()
    assert r.observe(T0 + 10, hanging) is not None
    assert (r.state, r.step) == ("RUNNING", 0)
    assert "(80 more have no answer yet)" in r.status().reason


def test_a_latency_that_nobody_knows_is_within_no_bound() -> None:
    r = rollout(max_p99_ms=300)
    assert r.observe(T0 + 10, replace(GOOD, p99_ms=None)) is not None
    assert (r.step, r.status().reason) == (0, "no answer whose time could be judged")


def test_a_step_does_not_pass_on_a_glimpse_but_may_end_on_one() -> None:
    """The controller was restarted, and has seen little of a step that has lasted its time."""
    r = rollout()
    assert r.observe(T0 + 60, window(200, seconds=2)) is None
    assert r.observe(T0 + 69, window(200, seconds=9)) is not None
    assert actions(r) == ["start", "advance"]
    r.observe(T0 + 70, window(200, errors=100, seconds=1))
    assert r.state == "ROLLED_BACK"


def test_the_ratio_is_not_judged_against_too_few_old_requests() -> None:
    r = rollout(max_p99_ratio=2)
    few_old = window(200, p99=100, old=99, old_p99=1)
    assert r.observe(T0 + 1, few_old) is None
    assert r.observe(T0 + 10, few_old) is not None
    assert r.step == 0, "nor does a step pass that was not judged"
    assert r.status().reason == "99 of the 100 requests of the old targets that max_p99_ratio needs"


def test_when_the_old_ones_get_nothing_any_more_the_ratio_is_to_what_they_had() -> None:
    r = rollout(max_p99_ratio=2, steps=(0.5, 1.0))
    r.observe(T0 + 10, GOOD)
    assert r.observe(T0 + 11, window(200, p99=10, old=0)) is None
    r.observe(T0 + 12, window(200, p99=10.1, old=0))
    assert r.state == "ROLLED_BACK"


def test_paused_it_takes_no_step_but_still_rolls_back() -> None:
    r = rollout()
    assert r.pause(T0 + 1) is not None
    assert r.observe(T0 + 50, GOOD) is None
    r.observe(T0 + 51, FAILING)
    assert r.state == "ROLLED_BACK"


def test_a_resumed_step_begins_anew() -> None:
    r = rollout()
    r.pause(T0 + 9)
    r.resume(T0 + 100)
    assert r.observe(T0 + 109, GOOD) is None
    assert r.observe(T0 + 110, GOOD) is not None
    assert actions(r) == ["start", "pause", "resume", "advance"]


def test_aborted_it_goes_back_to_the_weights_from_before() -> None:
    r = rollout({"old": 0.95, "new": 0.05})
    r.observe(T0 + 10, GOOD)
    r.abort(T0 + 11)
    assert r.state == "ABORTED"
    assert r.weights() == {"old": 0.95, "new": 0.05}
    assert r.observe(T0 + 12, FAILING) is None


def test_an_order_may_be_repeated_but_not_given_when_it_is_over() -> None:
    r = rollout()
    r.pause(T0)
    assert r.pause(T0) is None
    r.abort(T0)
    assert r.abort(T0) is None
    assert actions(r) == ["start", "pause", "abort"]
    for order in (r.pause, r.resume):
        with pytest.raises(ValueError, match=r"Cannot .* the rollout of 'new' on '/x': it is ABORTED"):
            order(T0)


def test_the_history_is_bounded_and_keeps_the_newest() -> None:
    r = rollout()
    for i in range(HISTORY):
        r.pause(T0 + i)
        r.resume(T0 + i)
    assert len(r.history) == HISTORY
    assert r.history[-1].action == "resume"


def tally(requests: int, errors: int = 0, **latency: int) -> Tally:
    return Tally.read(
        {"requests": requests, "errors": errors, "latency": [(int(k[1:]), n) for k, n in latency.items()]}
    )


def test_quantiles_are_the_bounds_of_their_buckets_in_ms() -> None:
    t = tally(100, b1000=50, b2000=45, b9000=5)
    assert [t.quantile_ms(q) for q in (0.01, 0.5, 0.51, 0.95, 0.99)] == [1.0, 1.0, 2.0, 2.0, 9.0]
    assert Tally().quantile_ms(0.5) is None
    assert total([t, tally(100, b9000=100)]).quantile_ms(0.5) == 9.0


def test_a_window_is_the_difference_of_two_readings_over_all_proxies() -> None:
    s = Samples()
    s.add(0, {"p": {"new": tally(100, 5, b1000=100), "old": tally(10)}, "q": {"new": tally(7)}}, 10)
    s.add(1, {"p": {"new": tally(150, 5, b1000=100, b2000=50), "old": tally(30)}, "q": {"new": tally(8)}}, 10)
    w = s.window("new")
    assert (w.seconds, w.requests, w.errors, w.old_requests, w.p99_ms) == (1, 51, 0, 20, 2.0)


def test_requests_that_wait_since_before_the_window_have_taken_its_length_so_far() -> None:
    s = Samples()
    s.add(0, {"p": {"new": Tally(100, open=30), "old": Tally(10, open=1)}}, 10)
    s.add(8, {"p": {"new": Tally(105, latency=Counter({1000.0: 5}), open=60), "old": Tally(11)}}, 10)
    w = s.window("new")
    assert (w.requests, w.waiting, w.p99_ms, w.old_p99_ms) == (5, 25, 8000.0, None)
    s.add(9, {"p": {"new": Tally(200, latency=Counter({1000.0: 100}), open=2)}}, 10)
    assert s.window("new").waiting == 0, "any of those that have ended may be one of them"
    restarted = {"p": {"new": Tally(1, open=1)}}
    s.add(10, restarted, 10)
    assert s.window("new").waiting == 1, "and no more than there are"


def test_a_window_that_is_looked_at_leaves_its_readings_as_they_were() -> None:
    s, anew = Samples(), Tally(1, latency=Counter({1000.0: 1}), open=1)
    s.add(0, {"p": {"new": Tally(100, open=30)}}, 10)
    s.add(5, {"p": {"new": anew}}, 10)  # counts anew
    assert s.window("new").waiting == 1
    assert anew.latency == Counter({1000.0: 1})


def test_a_window_forgets_what_is_older_than_itself() -> None:
    s = Samples()
    for second in range(100):
        s.add(second, {"p": {"new": tally(10 * second)}}, 5)
    assert s.window("new").requests == 50


def test_a_long_window_needs_few_readings() -> None:
    s = Samples()
    for second in range(100_000):
        s.add(second, {"p": {"new": tally(second)}}, 10_000)
    assert len(s) <= GRAINS + 3
    assert 10_000 <= s.window("new").requests <= 10_000 * (1 + 1.1 / GRAINS)


def test_a_proxy_that_starts_counts_from_its_first_reading_and_one_that_misses_a_reading_loses_nothing() -> None:
    s = Samples()
    s.add(0, {"n:1": {"new": tally(1000)}}, 10)
    s.add(1, {"n:2": {"new": tally(5)}}, 10)  # restarted: another process
    s.add(2, {"n:2": {"new": tally(25)}}, 10)
    assert s.window("new").requests == 20
    s.add(3, {}, 10)
    assert s.window("new").requests == 20


def test_a_counter_that_began_anew_in_the_same_process_counts_whole() -> None:
    assert tally(5, 1).since(tally(100, 50)).errors == 1


def test_a_target_that_a_proxy_has_not_counted_before_counts_from_nothing() -> None:
    s = Samples()
    s.add(0, {"p": {}}, 10)
    s.add(1, {"p": {"new": tally(5)}}, 10)
    assert s.window("new").requests == 5


#: What a proxy answers, as ARCHITECTURE.md has it.
COUNTED = {
    "/x": {
        "targets": {"a": {"requests": 10, "errors": 1, "latency": [[1000, 9], [50000, 1]]}},
        "shadows": {"c": {"copied": 5, "answered": 3, "errors": 1, "dropped": {"full": 4, "no_replica": 1}}},
    }
}


def test_figures_are_sums_over_proxies() -> None:
    reading = {"n:1": COUNTED, "m:2": COUNTED, "k:3": {}}
    tallies = of_targets(reading, "/x")
    figures = target_traffic(0.5, 2, total(t["a"] for t in tallies.values() if "a" in t))
    assert (figures.requests, figures.errors, figures.p50_ms, figures.p99_ms) == (20, 2, 1.0, 50.0)
    shadow = shadow_traffic(reading, "/x", "c", 0.1, 1)
    assert (shadow.copied, shadow.answered, shadow.errors, shadow.dropped) == (10, 6, 2, 10)
    assert shadow.dropped_because == {"full": 8, "no_replica": 2}
    assert shadow_traffic(reading, "/x", "nobody", 0.1, 1).copied == 0
