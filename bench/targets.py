"""The table of targets, each computed from the medians of one run.

A target is a function of the medians and a bound. Its inputs are named cells, so a missing cell gives "not measured",
never a pass. Nothing here is typed by hand but the bounds, which are the project's own promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.traffic import SHARE, TURN_S

US, DEFAULT, BEST, UVICORN = "rayserve-fast", "ray-serve", "ray-serve-best", "uvicorn"
FRONTED, MOSEC = "haproxy-granian", "mosec"
Cell = Callable[[str, str, int], dict[str, Any]]  # (peer, work, connections) -> medians; KeyError when not measured


@dataclass(frozen=True)
class Target:
    """`value(cell, scalar)` against `bound`: at least it, or at most it when `at_most`."""

    work: str
    promise: str
    bound: float
    value: Callable[[Cell, Callable[[str], float]], float]
    at_most: bool = False

    def met(self, measured: float) -> bool:
        return measured <= self.bound if self.at_most else measured >= self.bound


def rate(work: str, connections: int, peer: str, own: str = "") -> Callable[[Cell, object], float]:
    """Our requests (or calls) per second for `work` over those of `peer` for `own` (the same work unless given)."""
    return lambda cell, _: cell(US, work, connections)["rps"] / cell(peer, own or work, connections)["rps"]


def arrays(callers: int) -> Callable[[Cell, object], float]:
    """Our arrays per second over those of the best mode, by value or by reference, whichever is faster."""

    def ratio(cell: Cell, _: object) -> float:
        return cell(US, "array", callers)["rps"] / max(
            cell(BEST, work, callers)["rps"] for work in ("array", "array_ref")
        )

    return ratio


def median_latency(work: str, peer: str) -> Callable[[Cell, object], float]:
    """Our p50 at one connection over that of `peer`."""
    return lambda cell, _: cell(US, work, 1)["p50_us"] / cell(peer, work, 1)["p50_us"]


def against_one_thread(cell: Cell, scalar: Callable[[str], float]) -> float:
    return cell(US, "sync_sleep", 64)["rps"] / scalar("one_thread_sleeps_per_s")


def stuck_tail(cell: Cell, _: object) -> float:
    return cell(US, "sync_stuck", 64)["p99_us"] / cell(US, "sync_sleep", 64)["p99_us"]


def proxy_cost(cell: Cell, _: object) -> float:
    own_answer = cell(US, "healthz", 64)["cpu_us"]["proxy"]
    return cell(US, "async_noop", 64)["cpu_us"]["proxy"] / own_answer


def switches(cell: Cell, _: object) -> float:
    per_request = cell(US, "async_noop", 64)["switches"]
    return per_request["proxy"] + per_request["replica"]


def steady_tail(cell: Cell, _: object) -> float:
    """p99 of the batched model over a window and the time of two full batches."""
    return cell(US, "model", 1)["p99_us"] / 1e6 / TURN_S


def with_copies(cell: Cell, _: object) -> float:
    """Requests and copies per second together, over the requests without a shadow."""
    return (1 + SHARE) * cell(US, "shadow_10", 64)["rps"] / cell(US, "split_1", 64)["rps"]


def deploy_time(name: str) -> Callable[[object, Callable[[str], float]], float]:
    return lambda _, scalar: scalar(f"{US}:{name}")


NOOP = "async no-op, 64 connections, limit 100"
TARGETS = (
    Target(NOOP, "at least 200x Ray Serve default", 200, rate("async_noop", 64, DEFAULT)),
    Target(NOOP, "at least 15x Ray Serve's best mode", 15, rate("async_noop", 64, BEST)),
    Target(NOOP, "at least 2x HAProxy in front of Granian", 2, rate("async_noop", 64, FRONTED)),
    Target(NOOP, "at least 0.7x `/-/healthz` by the same proxy", 0.7, rate("async_noop", 64, US, "healthz")),
    Target(
        "the same, default limit of 5", "at least 0.8x of limit 100", 0.8, rate("default_limit", 64, US, "async_noop")
    ),
    Target(
        "the same, 1 connection, p50", "at most 1/6 of the best mode's", 1 / 6, median_latency("async_noop", BEST), True
    ),
    Target(
        "the same, 1 connection, p50",
        "at most 0.6x HAProxy in front of Granian's",
        0.6,
        median_latency("async_noop", FRONTED),
        True,
    ),
    Target("sync no-op, 64 connections", "at least 0.8x the async one", 0.8, rate("sync_noop", 64, US, "async_noop")),
    Target("sync sleep of 0.3 ms, limit 64, 64 connections", "at least 8x one thread alone", 8, against_one_thread),
    Target("the same, one handler stuck for a second", "p99 of the others at most 2x usual", 2, stuck_tail, True),
    Target("FastAPI route, 64 connections", "at least 1.0x uvicorn alone", 1.0, rate("fastapi", 64, UVICORN)),
    Target("FastAPI route, 64 connections", "at least 2.5x the best mode", 2.5, rate("fastapi", 64, BEST)),
    Target(
        "1 MiB body up, 8 connections", "at least 0.8x HAProxy in front of Granian", 0.8, rate("upload_1m", 8, FRONTED)
    ),
    Target("1 MiB body up, 8 connections", "at least 2x the best mode", 2, rate("upload_1m", 8, BEST)),
    Target(
        "1 MiB body down, 8 connections",
        "at least 0.8x HAProxy in front of Granian",
        0.8,
        rate("download_1m", 8, FRONTED),
    ),
    Target("1 MiB body down, 8 connections", "at least 2x the best mode", 2, rate("download_1m", 8, BEST)),
    Target("streaming 50 small chunks, 64 connections", "at least 10x the best mode", 10, rate("stream_50", 64, BEST)),
    Target(
        "proxy CPU per request, 64 connections", "at most 1.7x `/-/healthz` by the same proxy", 1.7, proxy_cost, True
    ),
    Target("context switches per request, 64 connections", "at most 0.3 over proxy and replica", 0.3, switches, True),
    Target("sequential calls from one deployment to another", "at least 50x the best mode", 50, rate("calls", 1, BEST)),
    Target("64 concurrent calls from one to another", "at least 100x the best mode", 100, rate("calls", 64, BEST)),
    Target("sequential `.result()` from a driver script", "at least 20x the best mode", 20, rate("driver", 1, BEST)),
    Target("1 MiB numpy array echoed, bytes/s, one caller", "at least 6x the best mode", 6, arrays(1)),
    Target("1 MiB numpy array echoed, bytes/s, 8 callers", "at least 6x the best mode", 6, arrays(8)),
    Target("items of a streaming call", "at least 40x the best mode", 40, rate("items", 1, BEST)),
    Target("FastAPI, call with 10 KB, 64 connections", "at least 8x the best mode", 8, rate("fastapi_call", 64, BEST)),
    Target("SSE through two deployments, 64 connections", "at least 10x the best mode", 10, rate("events", 64, BEST)),
    Target("a chain of five deployments, 64 concurrent", "at least 20x the best mode", 20, rate("chain", 64, BEST)),
    Target("JSON through `@serve.batch`, 64 connections", "at least 2x Mosec", 2, rate("batch", 64, MOSEC)),
    Target(
        "JSON, batched in the router, 64 connections", "at least 2x Mosec", 2, rate("router_batch", 64, MOSEC, "batch")
    ),
    Target("a batched model at 80 %, p99", "at most 2x (window + 2 full batches)", 2, steady_tail, True),
    Target("a split with one target", "at least 0.95x no split", 0.95, rate("split_1", 64, US, "plain")),
    Target(
        "a split over 5 targets", "at least 0.95x 5 replicas, no split", 0.95, rate("split_5", 64, US, "replicas_5")
    ),
    Target("10 % shadowed, requests and copies", "at least 0.95x one target", 0.95, with_copies),
    Target("classic endpoint", "at least 0.9x the modern one", 0.9, rate("endpoint", 64, US, "plain")),
    Target("classic endpoint, typed path", "at least 0.9x the modern one", 0.9, rate("typed", 64, US, "plain")),
    Target("DAGDriver with one step", "at least 0.8x an ingress with a handle", 0.8, rate("dag", 64, US, "one_call")),
    Target("first `serve.run` of a no-op on a running Ray", "at most 2.5 s", 2.5, deploy_time("first_deploy_s"), True),
    Target("a further `serve.run`", "at most 1 s", 1.0, deploy_time("next_deploy_s"), True),
)
