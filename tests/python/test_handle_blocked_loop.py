"""Calls of a replica's loop that has no time for them, and of its threads when the loop has nothing to do with them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import wire_client as wire
from scripted_replica import TOKEN, Cluster, Replicas, replicas  # noqa: F401 - fixtures
from worker_replica import serving

from rayserve_fast import caller
from rayserve_fast.handle import DeploymentHandle


class Caller:
    async def burst(self, count: int, block_s: float) -> float:
        handle, began = DeploymentHandle("D", "app"), time.monotonic()
        responses = [handle.remote(time.monotonic()) for _ in range(count)]
        time.sleep(block_s)  # user code that computes, and does not await
        blocked_until = time.monotonic()
        arrived = [await response for response in responses]
        assert blocked_until - began >= block_s
        return max(arrived)  # seconds after it was called, at the replica

    async def burst_behind_others(self, count: int, block_s: float) -> float:
        handle = DeploymentHandle("D", "app")
        unanswered = handle.remote(None)
        await asyncio.sleep(0.2)  # nobody waits for it, and the tender has the turn by now
        try:
            return await self.burst(count, block_s)
        finally:
            unanswered.cancel()

    def in_turn(self, count: int) -> int:
        handle = DeploymentHandle("D", "app")
        return sum(handle.remote(i).result(timeout_s=10) is not None for i in range(count))

    async def nothing(self) -> None:
        pass

    async def idle(self) -> None:
        await asyncio.sleep(60)


@pytest.fixture(name="asking")
def asking_replica(replica: Replicas) -> Any:
    def late(call: Any) -> None:
        if call.args[0] is not None:
            call.reply(time.monotonic() - call.args[0])  # one clock for all processes of a machine

    with serving(Caller) as asking:
        caller._set(caller.Caller("n", TOKEN, Cluster(replica(late, max_ongoing=100), max_ongoing_requests=100)))
        try:
            yield asking
        finally:
            caller.reset()


def ask(link: wire.Link, method: str, *args: Any) -> Any:
    link.call(1, method, *args)
    last = link.answer(1).last
    assert last.kind == wire.RESULT, last
    return wire.value(last.payload)


@pytest.mark.parametrize("method", ["burst", "burst_behind_others"])
def test_calls_before_code_that_blocks_the_loop_are_sent_all_the_same(asking: Any, method: str) -> None:
    link, other = asking.link(), asking.link()
    ask(link, "burst", 1, 0.0)  # connects
    other.call(1, "idle")
    assert ask(link, method, 5, 2.0) < 2.0, "seconds: the calls arrive before the code that blocks the loop has ended"


def test_answers_of_a_threads_calls_do_not_wake_the_loop(asking: Any) -> None:
    link = asking.link(timeout=6.0)
    ask(link, "burst", 1, 0.0)
    ask(link, "in_turn", 1)
    before = asking.runtime.counters()["wakes"]
    assert ask(link, "in_turn", 500) == 500
    assert asking.runtime.counters()["wakes"] - before < 250
