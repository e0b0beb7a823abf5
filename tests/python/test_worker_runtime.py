"""The life of a replica: construction, configuration, health, cleaning up, forks, and the interpreter's exit."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import wire_client as wire
from deployed import wait_for
from worker_replica import serving

from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica import facts


class Life:
    log: list[Any] = []  # noqa: RUF012

    async def __init__(self, start: str) -> None:  # type: ignore[misc]
        await asyncio.sleep(0)
        self.log = Life.log
        self.log.append(start)
        self.healthy = True

    async def __call__(self) -> list[Any]:
        return self.log

    def reconfigure(self, config: Any, rank: Any) -> None:
        self.log.append([config, rank.rank])

    def check_health(self) -> None:
        if len(self.log) > 3:
            raise RuntimeError("sick")

    async def __del__(self) -> None:  # type: ignore[misc]
        await asyncio.sleep(0)
        LOG.append("del")


LOG: list[str] = []


def test_the_hooks_of_a_class_are_called_once_each_in_their_order() -> None:
    with serving(Life, "start", user_config={"a": 1}) as replica:
        link = replica.link()
        assert link.get().body == b'["start",[{"a":1},0]]'
        replica.runtime.check_health()
        config = replica.runtime._spec.deployment.config
        replica.runtime.reconfigure(dataclasses.replace(config, user_config={"a": 2}))
        replica.runtime.reconfigure(dataclasses.replace(config, user_config={"a": 2}, max_ongoing_requests=9))
        assert link.get().body == b'["start",[{"a":1},0],[{"a":2},0]]'
        replica.runtime.reconfigure(dataclasses.replace(config, user_config={"a": 3}))
        with pytest.raises(RuntimeError, match="sick"):
            replica.runtime.check_health()
    assert sys.modules[__name__].LOG == ["del"]


def test_what_the_constructor_raises_comes_out_of_start() -> None:
    class Broken:
        def __init__(self) -> None:
            raise SystemExit("no model")

    with pytest.raises(SystemExit, match="no model"), serving(Broken):
        pass


def test_a_user_config_without_reconfigure_is_refused() -> None:
    class Plain:
        pass

    async def function() -> None:
        pass

    with pytest.raises(RayServeException, match="missing reconfigure method"), serving(Plain, user_config=1):
        pass
    with pytest.raises(ValueError, match="must be a class"), serving(function, user_config=1):
        pass


def wrapped(method: Any) -> Any:
    """As a decorator that knows nothing of coroutines."""

    def call(self: Any, *args: Any) -> Any:
        return method(self, *args)

    return call


class Wrapped:
    def __init__(self) -> None:
        self.config = 1

    @wrapped
    async def reconfigure(self, config: int) -> None:
        self.config = config

    @wrapped
    async def check_health(self) -> None:
        raise RuntimeError(f"sick of {self.config}")

    @wrapped
    async def record_routing_stats(self) -> dict[str, int]:
        return {"config": self.config}


def test_hooks_that_hide_behind_a_sync_decorator_are_awaited() -> None:
    with serving(Wrapped, user_config=2) as replica:
        assert facts.read(replica.runtime.routing_stats()) == {"config": 2}
        with pytest.raises(RuntimeError, match="sick of 2"):
            replica.runtime.check_health()


blocks, turns = threading.Event(), threading.Event()


async def blocks_the_loop() -> None:
    blocks.set()
    turns.wait(10)


def test_a_blocked_loop_does_not_answer_health_checks_until_it_turns_again() -> None:
    with serving(blocks_the_loop) as replica:
        replica.runtime.check_health()
        replica.link().request(1)
        assert blocks.wait(10)
        check = threading.Thread(target=replica.runtime.check_health)
        check.start()
        check.join(0.1)
        assert check.is_alive()
        turns.set()
        check.join(10)
        assert not check.is_alive()


SCRIPT = """
import asyncio, os, sys, threading, time, signal
sys.path.insert(0, {tests!r})
from worker_replica import TOKEN, spec_of
from wire_client import Link
import wire_client as wire
from rayserve_fast.replica.runtime import ReplicaRuntime

{body}

runtime = ReplicaRuntime(spec_of(handler, {sockets!r}, max_ongoing_requests=5))
address = runtime.start()
link = Link(address.unix, "r1", TOKEN)
{end}
"""


def run_script(body: str, end: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory(prefix="rsf", dir="/tmp") as sockets:
        script = SCRIPT.format(tests=tests, sockets=sockets, body=textwrap.dedent(body), end=textwrap.dedent(end))
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


ASYNC_WAITS = "async def handler(): await asyncio.sleep(60)"
SYNC_QUICK = "def handler(): return 'fine'"


@pytest.mark.parametrize(
    ("body", "end"),
    [
        (SYNC_QUICK, ""),
        (SYNC_QUICK, "assert link.get().body == b'fine'"),
        (SYNC_QUICK, "link.get(); runtime.stop()"),
        (SYNC_QUICK, "link.get(); sys.exit(0)"),
        (ASYNC_WAITS, "link.request(1); link.silent(0.1)"),
        ("async def handler(): time.sleep(60)", "link.request(1); link.silent(0.1)"),
        ("async def handler():\n    while True: pass", "link.request(1); link.silent(0.1)"),
        ("def handler(): time.sleep(60)", "link.request(1); link.silent(0.1)"),
        ("def handler():\n    while True: pass", "link.request(1); link.silent(0.1)"),
        ("def handler(): time.sleep(1.02)", "[link.request(n) for n in range(1, 6)]; link.silent(0.01)"),
        ("async def handler(): time.sleep(1.9)", "link.request(1); link.silent(0.01)"),
        (SYNC_QUICK, "[threading.Thread(target=lambda: runtime.stop()).start() for _ in range(2)]"),
    ],
    ids=[
        "started", "used", "stopped", "exit", "suspended", "loop-blocked", "loop-busy", "sync-blocked", "sync-busy",
        "sync-wakes-at-exit", "loop-wakes-at-exit", "stopped-twice",
    ],
)  # fmt: skip
def test_the_interpreter_exits_cleanly_in_every_state(body: str, end: str) -> None:
    done = run_script(body, end)
    assert done.returncode == 0, done.stderr
    assert "Fatal" not in done.stderr, done.stderr


def test_a_forked_child_does_not_hold_the_links() -> None:
    body = """
    async def handler():
        child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
        return str(child)
    """
    end = """
    child = int(link.get().body)
    print(child, flush=True)
    runtime.stop()
    start = time.monotonic()
    try:
        while True:
            link.frame()
    except wire.Refused:
        pass
    assert time.monotonic() - start < 2, "the end of the link is seen although the child lives"
    os.kill(child, signal.SIGKILL)
    """
    done = run_script(body, end)
    assert done.returncode == 0, done.stderr


def test_a_child_that_runs_on_into_the_replicas_code_ends_and_the_parent_serves() -> None:
    body = """
    async def handler(request):
        if request.query_params:
            os.fork()
        return str(os.getpid())
    """
    end = """
    mine = str(os.getpid()).encode()
    assert link.get(1, query="fork=1").body == mine
    for number in range(2, 50):
        assert link.get(number).body == mine
    assert link.silent(0.1)
    runtime.stop()
    print("served")
    """
    done = run_script(body, end)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "served\n"


def test_leaving_sockets_and_descriptors_are_closed_on_stop() -> None:
    import os

    async def handler() -> str:
        return "fine"

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with serving(handler) as replica:
        replica.link().get()
    before = descriptors()
    for _ in range(3):
        with serving(handler) as replica:
            path = replica.address.unix
            assert path is not None
            assert replica.link().get().body == b"fine"
        assert not os.path.exists(path)
    assert descriptors() <= before


def test_links_come_and_go_without_a_trace() -> None:
    async def handler() -> str:
        return "fine"

    with serving(handler) as replica:
        for _ in range(20):
            link = replica.link()
            link.request(1)
            link.close()
        last = replica.link()
        assert last.get().body == b"fine"
        wait_for(lambda: replica.runtime.counters()["links"] == 1, 5)
        counters = replica.runtime.counters()
        assert (counters["streams"], counters["running"]) == (0, 0)


def test_stopping_cancels_what_runs_without_calling_it_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    async def handler() -> None:
        await asyncio.sleep(60)

    logging.getLogger("ray").propagate = True
    with serving(handler) as replica:
        link = replica.link()
        link.request(1)
        assert link.silent(0.05)
        replica.runtime.stop()
        with pytest.raises(wire.Refused):
            link.frame()
    assert "failed" not in caplog.text
