"""The benchmark's parsing and rendering: what is measured is what is shown, and holes and failures stay visible."""

from __future__ import annotations

import json
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import load, plot, procs, profiler, report, targets, works

PEERS = ("rayserve-fast", "ray-serve", "ray-serve-best", "uvicorn", "granian", "haproxy-granian", "mosec")


def sample(peer: str, work: str, connections: int, rps: float, **changes: Any) -> dict[str, Any]:
    """One measured cell with plain costs: 10 us of proxy, 5 us of replica, 0.1 switches each per request."""
    processes = [
        {"pid": 1, "title": "p", "role": "proxy", "cpu_s": rps * 10e-6, "switches": int(rps * 0.1), "involuntary": 0},
        {"pid": 2, "title": "r", "role": "replica", "cpu_s": rps * 5e-6, "switches": int(rps * 0.1), "involuntary": 0},
    ]
    latency = {"p50_us": 100.0, "p99_us": 300.0}
    errors = {"connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0}
    cell = {"peer": peer, "work": work, "connections": connections, "rps": rps, "requests": int(rps), "errors": errors}
    return {**cell, **latency, "foreign_cpus": 0.0, "seconds": 1.0, "processes": processes, **changes}


def run_of(samples: list[dict[str, Any]], scalars: dict[str, float] | None = None) -> dict[str, Any]:
    machine = {"cpu": "a CPU", "cores": 2, "virtual": False, "memory_gib": 8, "kernel": "6", "wrk": "wrk 4"}
    return {
        "started": "today",
        "commit": "abc",
        "machine": machine,
        "settings": {"rounds": 1, "seconds": 1},
        "peers": {peer: {"title": peer} for peer in PEERS},
        "versions": {"granian": {"python": "3.11", "granian": "2"}},
        "samples": samples,
        "scalars": [{"name": name, "value": value, "round": 0} for name, value in (scalars or {}).items()],
        "failures": [],
    }


def verdict(raw: dict[str, Any], promise: str, work: str = "") -> dict[str, Any]:
    rows = [row for row in report.judge(report.Medians(raw)) if promise in row["promise"] and work in row["work"]]
    assert len(rows) == 1, rows
    return rows[0]


def test_the_result_line_of_wrk_becomes_seconds_and_a_rate() -> None:
    line = {"requests": 300, "duration_us": 1_500_000, "p50_us": 40, "errors": {"status": 0}}
    assert load.parse("Running 2s test\nRESULT " + json.dumps(line))["rps"] == pytest.approx(200)


def test_output_without_a_result_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 results"):
        load.parse("unable to connect")


@pytest.mark.parametrize(
    ("got", "expected", "equal"),
    [
        (b"ok", b"ok", True),
        (b'"ok"', b"ok", True),
        (b'{"a": 1}', b'{"a":1}', True),
        (b"no", b"ok", False),
        (b"", b"ok", False),
    ],
)
def test_an_answer_counts_as_expected_by_bytes_or_by_json_value(got: bytes, expected: bytes, equal: bool) -> None:
    assert load.same(got, expected) is equal


def test_the_median_over_rounds_is_shown_with_its_spread() -> None:
    cell = report.summary([sample("granian", "fastapi", 64, rps) for rps in (80.0, 100.0, 130.0)])
    assert cell["rps"] == 100.0
    assert cell["spread"] == pytest.approx(0.25)


def test_cost_is_per_request_and_split_by_role() -> None:
    cell = report.summary([sample("rayserve-fast", "async_noop", 64, 1000.0)])
    assert cell["cpu_us"] == pytest.approx({"proxy": 10.0, "replica": 5.0, "other": 0.0})
    assert cell["switches"] == pytest.approx({"proxy": 0.1, "replica": 0.1, "other": 0.0})


def test_a_target_is_met_at_its_bound_and_missed_below() -> None:
    for ours, met in ((20_000.0, True), (19_900.0, False)):
        raw = run_of([sample("rayserve-fast", "async_noop", 64, ours), sample("ray-serve", "async_noop", 64, 100.0)])
        row = verdict(raw, "200x")
        assert (row["measured"], row["met"]) == (pytest.approx(ours / 100), met)


def test_an_at_most_target_is_missed_above_its_bound() -> None:
    slow = sample("rayserve-fast", "async_noop", 1, 10.0, p50_us=61.0)
    raw = run_of([slow, sample("haproxy-granian", "async_noop", 1, 10.0)])
    assert verdict(raw, "0.6x")["met"] is False
    assert verdict(run_of([slow | {"p50_us": 59.0}, raw["samples"][1]]), "0.6x")["met"] is True


def test_a_missing_peer_gives_not_measured_and_never_a_pass() -> None:
    raw = run_of([sample("rayserve-fast", "async_noop", 64, 1e6)])
    assert verdict(raw, "200x")["met"] is None
    assert "not measured" in report.targets_table(report.Medians(raw))


def test_failed_requests_void_a_target_and_show_in_the_row() -> None:
    broken = sample("rayserve-fast", "async_noop", 64, 1e6, errors={"status": 7})
    raw = run_of([broken, sample("ray-serve", "async_noop", 64, 100.0)])
    assert verdict(raw, "200x")["met"] is False
    assert "**7 status**" in report.details(report.Medians(raw), "async_noop")


def test_the_sleep_row_is_held_against_the_measured_rate_of_one_thread() -> None:
    raw = run_of([sample("rayserve-fast", "sync_sleep", 64, 20_000.0)], {"one_thread_sleeps_per_s": 2_000.0})
    assert verdict(raw, "one thread")["measured"] == pytest.approx(10.0)


def test_every_target_names_works_and_peers_that_the_bench_measures() -> None:
    asked: list[tuple[str, str, int]] = []

    def cell(peer: str, work: str, connections: int) -> dict[str, Any]:
        asked.append((peer, work, connections))
        return report.summary([sample(peer, work, connections, 100.0)])

    for target in targets.TARGETS:
        target.value(cell, lambda name: 1.0)
    assert asked
    assert {peer for peer, _, _ in asked} <= set(PEERS)
    assert all(count in works.BY_NAME[work].connections for _, work, count in asked)


def test_the_report_has_a_table_for_every_measured_work_and_lists_what_failed() -> None:
    raw = run_of(
        [sample(peer, work.name, count, 50.0) for peer in PEERS for work in works.WORKS for count in work.connections]
    )
    raw["failures"] = [{"peer": "granian", "work": "stream_50", "round": 0, "error": "it burned"}]
    text = report.render(raw)
    assert all(f"## {report.capital(work.title)}" in text for work in works.WORKS)
    assert "granian, stream_50, round 1: it burned" in text
    assert plot.render(raw).count("<rect") > len(works.WORKS)


def test_the_readme_section_is_replaced_between_its_marks_only() -> None:
    text = "before\n<!-- bench:begin (made) -->\nold\n<!-- bench:end -->\nafter\n"
    once = report.replace_section(text, "new")
    assert "old" not in once
    assert once.startswith("before\n<!-- bench:begin (made) -->\n")
    assert once.endswith("<!-- bench:end -->\nafter\n")
    assert report.replace_section(once, "new") == once


def test_a_file_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0"):
        report.replace_section("nothing here", "new")


def test_context_switches_are_voluntary_plus_involuntary() -> None:
    assert procs.context_switches("Name:\tx\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t3\n") == (12, 3)


def test_what_was_spent_counts_new_threads_in_full_and_leaves_idle_processes_out() -> None:
    before = {1: procs.Usage("ray::Proxy", 1.0, {10: (5, 0)}), 2: procs.Usage("raylet", 2.0, {20: (7, 7)})}
    after = {1: procs.Usage("ray::Proxy", 1.5, {10: (6, 0), 11: (3, 1)}), 2: procs.Usage("raylet", 2.0, {20: (7, 7)})}
    assert procs.spent(before, after) == [
        {"pid": 1, "title": "ray::Proxy", "role": "proxy", "cpu_s": 0.5, "switches": 5, "involuntary": 1}
    ]


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::ServeReplica:app:Model", "replica"),
        ("ray::SERVE_REPLICA::app#Model#x", "replica"),
        ("ray::ProxyActor", "proxy"),
        ("haproxy", "proxy"),
        ("raylet", "other"),
        ("ray::ServeController.run", "other"),
    ],
)
def test_a_process_belongs_to_a_role_by_its_title(title: str, role: str) -> None:
    assert procs.role(title) == role


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::ServeReplica:calls:Caller", "caller"),
        ("ray::ServeReplica:calls:Callee.handle_request_with_rejection", "callee"),
        ("ray::ServeReplica:chain:Callee", "other"),
        ("python bench.driver", "caller"),
        ("python bench.host", "other"),
        ("haproxy haproxy.cfg", "proxy"),
    ],
)
def test_a_work_of_calls_tells_callers_from_callees_and_from_other_applications(title: str, role: str) -> None:
    assert procs.role(title, roles=procs.call_roles("calls")) == role


def test_every_link_of_a_chain_is_a_callee() -> None:
    roles = procs.call_roles("chain")
    assert [procs.role(f"ray::ServeReplica:chain:{name}", roles=roles) for name in ("Caller", "Link1", "Link5")] == [
        "caller",
        "callee",
        "callee",
    ]


def test_the_times_of_calls_become_a_rate_and_percentiles() -> None:
    each = [number / 1000 for number in range(100, 0, -1)]
    result = load.from_times(array("d", [0.5, *each]).tobytes())
    assert (result["requests"], result["rps"], result["seconds"]) == (100, 200.0, 0.5)
    assert (result["p50_us"], result["p99_us"], result["max_us"]) == pytest.approx((50e3, 99e3, 100e3))


def test_an_application_that_made_no_call_is_an_error() -> None:
    with pytest.raises(ValueError, match="no call"):
        load.from_times(array("d", [1.0]).tobytes())


def test_calls_show_their_own_unit_and_what_each_side_spent() -> None:
    spent = {"pid": 1, "title": "t", "cpu_s": 1.0, "switches": 50, "involuntary": 0}
    processes = [spent | {"role": "caller"}, spent | {"role": "callee", "cpu_s": 0.5}]
    raw = run_of([sample("rayserve-fast", "items", 1, 1e5, processes=processes)])
    text = report.details(report.Medians(raw), "items")
    assert text.startswith("| callers | peer | items/s |")
    assert "CPU µs per item, proxy / caller / callee / other" in text
    assert "| 0.0 / 10.0 / 5.0 / 0.0 |" in text


def test_arrays_are_held_against_the_faster_of_ray_serves_two_ways() -> None:
    ours, by_value = sample("rayserve-fast", "array", 8, 1200.0), sample("ray-serve-best", "array", 8, 100.0)
    raw = run_of([ours, by_value])
    assert verdict(raw, "6x", "8 callers")["met"] is None
    raw["samples"].append(sample("ray-serve-best", "array_ref", 8, 300.0))
    assert verdict(raw, "6x", "8 callers")["measured"] == pytest.approx(4.0)


def test_calls_and_http_requests_are_compared_in_tables_of_their_own() -> None:
    raw = run_of([sample("rayserve-fast", work, 64, 50.0) for work in ("async_noop", "calls", "chain")])
    tables = dict(report.overviews(report.Medians(raw)))
    http, calls = (
        tables["Requests per second, 64 connections"],
        tables["Calls, items or requests per second through handles"],
    )
    assert len(tables) == 2  # nothing was measured at one connection
    assert ("async no-op" in http, "chain" in http) == (True, False)
    assert ("async no-op" in calls, "chain of five, 64 callers" in calls) == (False, True)


def test_system_calls_are_counted_per_request() -> None:
    text = (
        "% time     seconds  usecs/call     calls    errors syscall\n 60.00    0.1    3    200        10 recvfrom\n"
        " 40.00    0.1    3    100           sendto\n100.00    0.2    3    300        10 total\n"
    )
    assert "2.000 a request       200  recvfrom" in profiler.calls(text, 100)
    assert "3.000 a request       300  together" in profiler.calls(text, 100)


def test_counters_that_the_machine_lacks_are_named_as_such() -> None:
    text = "<not supported>,,instructions:u,0,100.00,,\n120,,context-switches,1,100.00,,\n"
    assert profiler.counters(text, 60).splitlines()[0].endswith("not counted here  instructions:u")
    assert "2.0000 a request  context-switches" in profiler.counters(text, 60)
