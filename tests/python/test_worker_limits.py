"""`max_ongoing_requests`, the backlog of fast replicas, BUSY and CREDIT, DRAIN and RETURNED."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import wire_client as wire
from deployed import wait_for
from worker_gate import fresh_gate, gate  # noqa: F401 - a fixture
from worker_replica import serving


class Gate:
    """Requests wait until the gate opens; counts how many are inside."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.gate = asyncio.Event()

    async def __call__(self) -> str:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await self.gate.wait()
        self.inside -= 1
        return "through"

    async def open(self) -> int:
        self.gate.set()
        return self.most

    async def reconfigure(self, config: Any) -> None:
        if config == "open":
            self.gate.set()


def quick(link: wire.Link) -> None:
    """Makes the replica FAST; where the machine holds it up that takes a few more."""
    for count in range(1000):
        answer = link.get(1000, query="quick=1")
        assert answer.status == 200
        if count >= 40 and answer.last.flags & wire.FAST:
            return
    raise AssertionError("it does not become FAST")


async def stuck_or_quick(request: Any) -> str:
    if not request.query_params:
        await asyncio.to_thread(gate.release.wait, 10)
    return "done"


def test_beyond_the_limit_a_slow_replica_answers_busy_and_then_owes_the_slot() -> None:
    with serving(Gate, max_ongoing_requests=2) as replica:
        first, second = replica.link(), replica.link()
        first.request(1)
        first.request(2)
        second.request(1)
        busy = second.frame()
        assert (busy.kind, busy.stream, busy.load, busy.fin) == (wire.BUSY, 1, 2, True)
        first.send(wire.CANCEL, 1)
        assert first.answer(1).last.aux == wire.CANCELLED
        credit = second.frame()
        assert (credit.kind, credit.stream, credit.aux) == (wire.CREDIT, 0, 1)
        # The slot is the second link's: the first link's newcomer is refused.
        first.request(3)
        assert first.answer(3).last.kind == wire.BUSY
        second.request(2, flags=wire.GRANTED)
        assert second.silent(0.05)
        second.send(wire.CANCEL, 2)
        assert second.answer(2).last.aux == wire.CANCELLED
        assert first.frame().kind == wire.CREDIT
        first.send(wire.UNUSED, aux=1)
        second.request(3)
        assert second.silent(0.05)
        assert replica.runtime.counters()["running"] == 2


def test_a_granted_slot_dies_with_its_link() -> None:
    with serving(Gate, max_ongoing_requests=1) as replica:
        first, second, third = replica.link(), replica.link(), replica.link()
        first.request(1)
        second.request(1)
        assert second.frame().kind == wire.BUSY
        third.request(1)
        assert third.frame().kind == wire.BUSY
        first.send(wire.CANCEL, 1)
        first.answer(1)
        assert second.frame().kind == wire.CREDIT
        second.close()
        assert third.frame().kind == wire.CREDIT


def test_a_granted_slot_that_a_frozen_caller_keeps_goes_to_the_next() -> None:
    with serving(Gate, max_ongoing_requests=1) as replica:
        first, frozen, third = replica.link(), replica.link(), replica.link()
        first.request(1)
        for stream in (1, 2):
            frozen.request(stream)
            assert frozen.frame().kind == wire.BUSY
        third.request(1)
        assert third.frame().kind == wire.BUSY
        began = time.monotonic()
        first.send(wire.CANCEL, 1)
        first.answer(1)
        assert frozen.frame().kind == wire.CREDIT
        assert third.frame().kind == wire.CREDIT
        assert time.monotonic() - began > 0.45, "it is given some time"
        third.request(2, flags=wire.GRANTED)
        # It wakes: its late request is one without a grant, and it is still owed for the other.
        frozen.request(3, flags=wire.GRANTED)
        assert frozen.frame().kind == wire.BUSY
        third.send(wire.CANCEL, 2)
        third.answer(2)
        for stream in (4, 5):
            assert frozen.frame().kind == wire.CREDIT
            frozen.request(stream, flags=wire.GRANTED)
            frozen.send(wire.CANCEL, stream)
            assert frozen.answer(stream).last.aux == wire.CANCELLED
        assert replica.runtime.counters()["running"] == 0


def test_a_caller_that_wakes_where_nobody_else_is_gets_its_slot() -> None:
    with serving(Gate, max_ongoing_requests=1) as replica:
        first, frozen = replica.link(), replica.link()
        first.request(1)
        for stream in (1, 2):
            frozen.request(stream)
            assert frozen.frame().kind == wire.BUSY
        first.send(wire.CANCEL, 1)
        assert frozen.frame().kind == wire.CREDIT
        assert frozen.silent(1.5), "what else it is owed waits for a sign of life"
        frozen.request(3, flags=wire.GRANTED)
        assert [frozen.frame().kind for _ in range(2)] == [wire.BUSY, wire.CREDIT]


@pytest.mark.usefixtures("fresh_gate")
def test_a_fast_replica_holds_a_backlog_and_starts_it_in_order() -> None:
    with serving(stuck_or_quick, max_ongoing_requests=1) as replica:
        link = replica.link()
        quick(link)
        last = link.get(1000, query="quick=1").last
        assert last.flags & wire.FAST
        assert last.load == 0
        link.request(1)
        for stream in range(2, 34):
            link.request(stream, query="quick=1")
        link.request(34)
        assert link.answer(34).last.kind == wire.BUSY
        assert replica.runtime.counters()["held"] == 32
        gate.release.set()
        assert [link.answer(stream).body for stream in range(1, 34)] == [b"done"] * 33
        assert link.frame().kind == wire.CREDIT


def test_a_held_request_that_is_cancelled_never_starts() -> None:
    class Counts:
        started = 0

        async def __call__(self, request: Any) -> int:
            if request.query_params.get("quick"):
                return 0
            Counts.started += 1
            await asyncio.sleep(0.2)
            return Counts.started

    with serving(Counts, max_ongoing_requests=1) as replica:
        link = replica.link()
        quick(link)
        link.request(1)
        link.request(2)
        link.request(3)
        link.send(wire.CANCEL, 2)
        assert link.answer(2).last.aux == wire.CANCELLED
        assert link.answer(1).body == b"1"
        assert link.answer(3).body == b"2"


@pytest.mark.usefixtures("fresh_gate")
def test_drain_returns_held_requests_and_finishes_begun_ones() -> None:
    with serving(stuck_or_quick, max_ongoing_requests=1) as replica:
        link = replica.link()
        quick(link)
        link.request(1)
        link.request(2)
        assert link.silent(0.05)
        replica.runtime.drain()
        assert {link.frame().kind, link.frame().kind} == {wire.RETURNED, wire.DRAIN}
        link.request(3)
        assert link.answer(3).last.kind == wire.BUSY
        assert not replica.runtime.wait_idle(0.01)
        late = replica.link()
        assert late.frame().kind == wire.DRAIN
        gate.release.set()
        assert link.answer(1).body == b"done"
        assert replica.runtime.wait_idle(5)
        assert link.silent(0.05), "a draining replica grants nothing"


def test_a_drained_replica_is_idle_when_its_callers_have_every_byte() -> None:
    window, size = 256 * 1024, 1024 * 1024

    async def handler() -> bytes:
        return b"z" * size

    with serving(handler) as replica:
        link = replica.link()
        link.request(1)
        assert link.frame().kind == wire.RESPONSE
        got = 0
        while got < window:
            got += len(link.frame().payload)
        replica.runtime.drain()
        assert not replica.runtime.wait_idle(0.2), "the handler has returned, but its answer waits for the window"
        link.send(wire.WINDOW, 1, aux=window)
        assert got + len(link.answer(1).body) == size
        assert replica.runtime.wait_idle(5)


async def body_or_block(request: Any) -> bytes:
    if request.query_params:
        gate.entered.set()
        gate.release.wait(10)  # holds the loop
    return await request.body()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("fresh_gate")
def test_a_link_that_ends_right_behind_its_last_bytes_is_noticed() -> None:
    with serving(body_or_block, max_ongoing_requests=2) as replica:
        first, second = replica.link(), replica.link()
        first.request(1, fin=False)
        wait_for(lambda: replica.runtime.counters()["running"] == 1, 5)
        second.request(1, query="block=1")
        assert gate.entered.wait(10)
        first.send(wire.BODY, 1, payload=b"half")  # the bytes and the end of the link come while the loop is held
        first.close()
        gate.release.set()
        assert second.answer(1).status == 200
        idle = {"running": 0, "links": 1}
        wait_for(lambda: replica.runtime.counters().items() >= idle.items(), 5, so_far=replica.runtime.counters)


def test_the_limit_holds_at_every_moment_for_sync_handlers_too() -> None:
    class Sync:
        def __init__(self) -> None:
            self.lock, self.inside, self.most = threading.Lock(), 0, 0

        def __call__(self) -> None:
            with self.lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            time.sleep(0.003)
            with self.lock:
                self.inside -= 1

        async def highest(self) -> int:
            return self.most

    with serving(Sync, max_ongoing_requests=3) as replica:
        link = replica.link()
        waiting = list(range(1, 41))
        active: list[int] = []
        while waiting or active:
            while waiting and len(active) < 3:
                active.append(waiting.pop(0))
                link.request(active[-1])
            got = link.frame()
            assert got.kind == wire.RESPONSE, got
            active.remove(got.stream)
        link.call(99, "highest")
        assert wire.value(link.answer(99).last.payload) == 3


def test_a_raised_limit_starts_who_waits() -> None:
    with serving(Gate, max_ongoing_requests=1) as replica:
        first, second = replica.link(), replica.link()
        first.request(1)
        second.request(1)
        assert second.frame().kind == wire.BUSY
        spec = replica.runtime._spec.deployment.config
        import dataclasses

        replica.runtime.reconfigure(dataclasses.replace(spec, max_ongoing_requests=2))
        assert second.frame().kind == wire.CREDIT
        replica.runtime.reconfigure(dataclasses.replace(spec, max_ongoing_requests=2, user_config="open"))
        assert first.answer(1).body == b"through"


def test_the_welcome_names_the_limit() -> None:
    with serving(Gate, max_ongoing_requests=7) as replica:
        assert replica.link().max_ongoing == 7
