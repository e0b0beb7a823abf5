"""Handlers of requests that wait for a batch: they are answered where it steps them, whatever else they wait for."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import wire_client as wire
from worker_replica import serving

from rayserve_fast.batching import batch

entered = threading.Event()


class Batched:
    @batch(max_batch_size=8, batch_wait_timeout_s=0.001)
    async def double(self, numbers: list[int]) -> list[int]:
        return [2 * number for number in numbers]

    @batch(max_batch_size=8, batch_wait_timeout_s=0.001)
    async def never(self, items: list[None]) -> list[None]:
        entered.set()
        await asyncio.sleep(3600)
        return items

    @batch(max_batch_size=2, batch_wait_timeout_s=10)
    async def callbacks(self, tasks: list[Any]) -> list[int]:
        return [len(task._callbacks or ()) for task in tasks]

    async def __call__(self) -> int:
        return await self.callbacks(asyncio.current_task())

    async def everywhere(self) -> list[int]:
        got = [await self.double(1)]
        await asyncio.sleep(0.001)
        got.append(await self.double(2))
        got.extend(await asyncio.gather(self.double(3), self.double(4)))
        got.append(await asyncio.wait_for(self.double(5), 5))
        got.append(await asyncio.shield(self.double(6)))
        return got

    async def late(self) -> str:
        try:
            await asyncio.wait_for(self.never(None), 0.02)
        except asyncio.TimeoutError:
            return "late"
        return "in time"

    async def left(self) -> str:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        try:
            await self.never(None)
        except asyncio.CancelledError:
            return str(await self.double(7))
        return "in time"

    async def raises(self) -> None:
        await self.double(1)
        raise ValueError("after the batch")

    async def blocked(self) -> None:
        await self.never(None)


def test_the_loop_is_not_asked_to_tell_of_the_end_of_a_handler_that_a_batch_will_step() -> None:
    with serving(Batched, max_ongoing_requests=4) as replica:
        link = replica.link()
        link.request(1)
        link.request(2)
        assert [json.loads(link.answer(stream).body) for stream in (1, 2)] == [0, 0]


def test_handlers_that_wait_for_batches_and_for_other_things_are_answered() -> None:
    with serving(Batched, max_ongoing_requests=8) as replica:
        link = replica.link()
        methods = {1: "everywhere", 2: "late", 3: "left", 4: "everywhere"}
        for stream, method in methods.items():
            link.call(stream, method)
        got = {stream: wire.value(link.answer(stream).last.payload) for stream in methods}
        assert got == {1: [2, 4, 6, 8, 10, 12], 2: "late", 3: "14", 4: [2, 4, 6, 8, 10, 12]}


def test_an_error_behind_a_batch_is_the_answer() -> None:
    with serving(Batched, max_ongoing_requests=1) as replica:
        link = replica.link()
        link.call(1, "raises")
        last = link.answer(1).last
        assert (last.kind, last.aux) == (wire.ERROR, wire.USER)
        link.call(2, "everywhere")
        assert link.answer(2).last.kind == wire.RESULT


def test_a_request_that_is_cancelled_while_it_waits_for_a_batch_gives_its_slot_back() -> None:
    entered.clear()
    with serving(Batched, max_ongoing_requests=1) as replica:
        link = replica.link()
        link.call(1, "blocked")
        assert entered.wait(5)
        link.send(wire.CANCEL, 1)
        last = link.answer(1).last
        assert (last.kind, last.aux) == (wire.ERROR, wire.CANCELLED)
        link.call(2, "everywhere")
        assert link.answer(2).last.kind == wire.RESULT
