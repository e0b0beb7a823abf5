"""Calls whose link ends: what the user's code has begun goes on to its end, as its caller may not wait for it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import wire_client as wire
from deployed import wait_for
from worker_gate import fresh_gate, gate, settles  # noqa: F401 - a fixture
from worker_replica import Replica, serving

from rayserve_fast import serve
from rayserve_fast.replica.sync_pool import SyncPool

pytestmark = pytest.mark.usefixtures("fresh_gate")

#: Of a CALL that wants items.
STREAM = 8
#: What the methods below have come to.
ends: list[str] = []


@pytest.fixture(autouse=True)
def _no_ends() -> None:
    ends.clear()


class Works:
    """Every method notes how it ends."""

    async def until_released(self, tag: str) -> str:
        gate.entered.set()
        try:
            while not gate.release.is_set():
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            ends.append(f"cancelled {tag}")
            raise
        ends.append(f"done {tag}")
        return "for nobody" * 100_000

    def in_thread(self, tag: str) -> None:
        gate.entered.set()
        gate.release.wait(10)
        ends.append(f"done {tag}")

    async def fails(self, tag: str) -> None:
        await self.until_released(tag)
        raise ValueError("to nobody")

    async def items(self, tag: str) -> Any:
        gate.entered.set()
        try:
            while True:
                yield bytes(100_000)
        finally:
            ends.append(f"closed {tag}")

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=10)
    async def together(self, tags: list[str]) -> list[None]:
        for tag in tags:
            await self.until_released(tag)
        return [None] * len(tags)

    async def quick(self, tag: str) -> None:
        ends.append(f"done {tag}")


def running(replica: Replica) -> int:
    return replica.runtime.counters()["running"]


def loses(replica: Replica, link: wire.Link, links: int = 0) -> None:
    """Ends a link and waits until the replica has seen it."""
    link.close()
    wait_for(lambda: replica.runtime.counters()["links"] == links, 5)


@pytest.mark.parametrize("method", ["until_released", "in_thread", "fails"])
def test_a_call_that_runs_goes_on_without_its_link(method: str) -> None:
    with serving(Works, max_ongoing_requests=1) as replica:
        link = replica.link()
        link.call(1, method, "a")
        assert gate.entered.wait(10)
        loses(replica, link)
        assert (running(replica), ends) == (1, []), "it keeps its slot"
        other = replica.link()
        other.call(1, method, "b")
        assert other.frame().kind == wire.BUSY
        gate.release.set()
        assert other.frame().kind == wire.CREDIT
        assert ends == ["done a"]
        assert replica.runtime.counters()["cancelled"] == 0


def test_a_drain_waits_for_a_call_without_a_link() -> None:
    with serving(Works) as replica:
        link = replica.link()
        link.call(1, "until_released", "a")
        assert gate.entered.wait(10)
        loses(replica, link)
        replica.runtime.drain()
        assert not replica.runtime.wait_idle(0.1)
        gate.release.set()
        assert replica.runtime.wait_idle(10)
        assert ends == ["done a"]


def test_a_call_that_was_cancelled_before_stays_cancelled() -> None:
    with serving(Works) as replica:
        link = replica.link()
        link.call(1, "until_released", "a")
        assert gate.entered.wait(10)
        link.send(wire.CANCEL, 1)
        link.close()
        wait_for(lambda: ends == ["cancelled a"], 5)
        settles(replica)


def test_a_stream_that_nobody_reads_ends_with_its_link() -> None:
    with serving(Works) as replica:
        link = replica.link()
        link.call(1, "items", "a", flags=STREAM)
        assert gate.entered.wait(10)
        link.close()
        wait_for(lambda: ends == ["closed a"], 5)
        settles(replica)


def test_a_call_that_is_held_is_dropped_with_its_link() -> None:
    with serving(Works, max_ongoing_requests=1) as replica:
        first, second = replica.link(), replica.link()
        first.call(1, "until_released", "a")
        assert gate.entered.wait(10)
        second.call(1, "until_released", "b")
        busy = second.frame().kind == wire.BUSY
        loses(replica, second, 1)
        gate.release.set()
        assert first.answer(1).last.kind == wire.RESULT
        settles(replica)
        assert busy
        assert ends == ["done a"]


def test_a_job_that_no_thread_has_begun_is_dropped_with_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = SyncPool.spawn
    # As on a machine that cannot start a second thread.
    monkeypatch.setattr(SyncPool, "spawn", lambda self: None if self._threads else spawn(self))
    with serving(Works, max_ongoing_requests=2) as replica:
        link = replica.link()
        link.call(1, "in_thread", "a")
        assert gate.entered.wait(10)
        link.call(2, "in_thread", "b")
        wait_for(lambda: running(replica) == 2, 5)
        loses(replica, link)
        assert running(replica) == 1
        gate.release.set()
        settles(replica)
        assert ends == ["done a"]


def test_the_items_of_a_batch_go_on_without_their_links() -> None:
    with serving(Works) as replica:
        first, second = replica.link(), replica.link()
        first.call(1, "together", "a")
        second.call(1, "together", "b")
        assert gate.entered.wait(10)
        loses(replica, first, 1)
        assert running(replica) == 2
        gate.release.set()
        assert second.answer(1).last.kind == wire.RESULT
        settles(replica)
        assert ends == ["done a", "done b"]


def test_calls_with_lists_go_on_without_their_link() -> None:
    class Lists:
        async def __call__(self, tags: list[str]) -> list[None]:
            await Works().until_released("+".join(tags))
            return [None] * len(tags)

    with serving(Lists, max_batch_size=2, batch_wait_timeout_s=0.0, max_concurrent_batches=1) as replica:
        link = replica.link()
        for stream in (1, 2):
            link.call(stream, "__call__", f"{stream}", flags=wire.BATCHED)
        link.batch(1, 2)
        assert gate.entered.wait(10)
        loses(replica, link)
        gate.release.set()
        settles(replica)
        assert ends == ["done 1+2"]


def test_stopping_a_replica_cancels_its_calls() -> None:
    with serving(Works) as replica:
        link = replica.link()
        link.call(1, "until_released", "a")
        assert gate.entered.wait(10)
        replica.runtime.stop()
        assert ends == ["cancelled a"]


def test_all_that_a_caller_has_sent_before_it_left_is_begun() -> None:
    """Its answers find nobody, which must not keep the replica from reading on."""
    calls, held = range(1, 301), threading.Event()
    with serving(Works, max_ongoing_requests=2) as replica:
        link = replica.link()
        replica.runtime._loop.call(lambda: held.wait(10) and None)  # it sees the calls and the end together
        payloads = ((n, wire.call_payload("quick", (f"{n}",), {})) for n in calls)
        link.sock.sendall(b"".join(wire.frame(wire.CALL, n, payload=payload) for n, payload in payloads))
        link.close()
        held.set()
        wait_for(lambda: replica.runtime.counters()["links"] == 0, 5)
        assert ends == [f"done {n}" for n in calls]
