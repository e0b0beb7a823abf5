"""What is measured: one `Work` is one kind of request against one application, at some numbers of connections.

The works are data; `run.py` measures them, `report.py` prints them and `targets.py` compares them. Every answer is
checked against `answer` before its cell is measured, so a fast wrong peer does not win. The works of a group share a
visit. Those by wrk are HTTP requests; those by `INSIDE` are calls that a deployment makes, those by `DRIVER` are calls
that a script makes, and their `connections` are callers at once. Those by `STEADY` are HTTP requests at `rate`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from bench.apps import CHUNK, CHUNKS, ONE_MIB
from bench.calls import EVENT, TEXT_LENGTH
from bench.traffic import MODEL_RATE

# Which peers a work is for: all ASGI servers and serves; those with Ray Serve's API; those and Mosec; one of them.
EVERYONE, SERVES, BATCHERS, OURS, BEST = "everyone", "serves", "batchers", "rayserve-fast", "ray-serve-best"
HTTP, HANDLES, TRAFFIC = "http", "handles", "traffic"  # groups
WRK, INSIDE, DRIVER, STEADY = "wrk", "inside", "driver", "steady"  # who makes the load
RECORD = json.dumps({"user": 42, "name": "Ada", "scores": [0.5, 0.25, 1.0], "active": True}, separators=(",", ":"))


@dataclass(frozen=True)
class Work:
    """One kind of request. `app` names the application; `path` follows the application's prefix."""

    name: str
    title: str
    app: str
    answer: bytes = b"ok"
    path: str = ""
    body: bytes = b""
    content_type: str = "application/octet-stream"
    connections: tuple[int, ...] = (1, 8, 64)
    peers: str = EVERYONE
    stuck: bool = False  # one further client keeps one handler blocked all the time
    group: str = HTTP
    by: str = WRK
    unit: str = "request"  # what is counted
    stretch: int = 1  # so many times the usual seconds, where a request can take as long as a cell
    rate: float = 0.0  # requests per second, for those by STEADY

    @property
    def source(self) -> str:
        """What the requests come from, so many at once."""
        return "caller" if self.by in (INSIDE, DRIVER) else "connection"


def calls(name: str, title: str, app: str, path: str, connections: tuple[int, ...], **more: Any) -> Work:
    """A work of calls that a deployment makes."""
    about: dict[str, Any] = {"peers": SERVES, "group": HANDLES, "by": INSIDE, "unit": "call", "answer": b"True"} | more
    return Work(name, title, app, path=path, connections=connections, **about)


def ours(name: str, title: str, **more: Any) -> Work:
    """A no-op by HTTP that only this project serves."""
    about: dict[str, Any] = {"connections": (64,), "peers": OURS, "group": TRAFFIC} | more
    return Work(name, title, name, **about)


POSTED: dict[str, Any] = {"answer": RECORD.encode(), "body": RECORD.encode(), "content_type": "application/json"}
WORKS = (
    Work("async_noop", "async no-op", "async_noop"),
    Work("sync_noop", "sync no-op", "sync_noop"),
    Work("json_echo", "JSON echo", "json_echo", **POSTED),
    Work("fastapi", "FastAPI route", "fastapi", b'{"item":7,"q":"abc"}', path="/items/7?q=abc"),
    Work("body_10k", "10 KB body, echoed", "body_echo", b"b" * 10_000, body=b"b" * 10_000),
    Work("upload_1m", "1 MiB body up", "upload", b"%d" % ONE_MIB, body=b"u" * ONE_MIB),
    Work("download_1m", "1 MiB body down", "download", b"d" * ONE_MIB),
    Work("stream_50", "streaming 50 small chunks", "stream", CHUNK * CHUNKS),
    Work("healthz", "`/-/healthz` by the proxy itself", "", b"", path="/-/healthz", connections=(1, 64), peers=OURS),
    Work("default_limit", "async no-op, default limit of 5", "default_limit", connections=(64,), peers=SERVES),
    Work("sync_sleep", "sync sleep of 0.3 ms, limit 64", "sync_sleep", connections=(64,), peers=SERVES),
    Work("sync_stuck", "the same, one handler stuck", "sync_sleep", connections=(64,), peers=SERVES, stuck=True),
    calls("calls", "call from a deployment to another", "calls", "?what=empty", (1, 64)),
    calls("driver", "call from a driver script, `.result()`", "driven", "", (1,), by=DRIVER),
    calls("array", "1 MiB array, echoed (calls/s are MiB/s)", "calls", "?what=array", (1, 8)),
    calls("array_ref", "1 MiB array, by reference", "calls", "?what=array&by_reference=1", (1, 8), peers=BEST),
    calls("items", "items of a streaming call", "calls", "?what=items", (1,), unit="item"),
    calls("chain", "call through a chain of five", "chain", "?what=empty", (64,)),
    Work(
        "fastapi_call",
        "FastAPI route, a call with 10 KB",
        "fastapi_call",
        b'{"length":%d}' % TEXT_LENGTH,
        path="/length",
        connections=(64,),
        peers=SERVES,
        group=HANDLES,
    ),
    Work(
        "events",
        "50 SSE chunks through two deployments",
        "events",
        EVENT.encode() * CHUNKS,
        stretch=2,
        connections=(64,),
        peers=SERVES,
        group=HANDLES,
    ),
    Work("batch", "JSON through `@serve.batch`", "batch", connections=(64,), peers=BATCHERS, group=TRAFFIC, **POSTED),
    ours("router_batch", "JSON, batched in the router", **POSTED),
    Work(
        "model",
        "a batched model, open loop at 80 %",
        "model",
        connections=(1,),
        peers=SERVES,
        group=TRAFFIC,
        by=STEADY,
        rate=MODEL_RATE,
        stretch=3,
        **POSTED,
    ),
    ours("split_1", "a split with one target"),
    ours("split_5", "a split over 5 targets"),
    ours("replicas_5", "5 replicas, no split"),
    ours("shadow_10", "one target, 10 % shadowed"),
    ours("plain", "no split"),
    ours("endpoint", "classic endpoint"),
    ours("typed", "classic endpoint, typed path", path="/123/3.14"),
    ours("dag", "DAGDriver with one step"),
    ours("one_call", "ingress that calls one handle"),
)
GROUPS = (HTTP, HANDLES, TRAFFIC)
BY_NAME = {work.name: work for work in WORKS}


def with_connections(work: Work, connections: tuple[int, ...]) -> Work:
    """The same work at these numbers of connections only."""
    return replace(work, connections=connections)
