"""What a call of a batched function costs its event loop: the queue in Rust against the same one in Python.

    python -m bench.batch_shapes            # a table of microseconds of CPU for each item, uvloop, no sockets

Both shapes let 64 callers of one item each go round as fast as they can, with a function that does nothing. `bare`
shows what the callers themselves cost: they let the loop go round instead of calling. The shape in Python is the least
that does the job (futures, a list, one task for each batch, no contexts, no models, no metrics), so its figure is a
lower bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from rayserve_fast import serve

CALLERS, ROUNDS, SIZE, WAIT_S = 64, 4000, 32, 0.005


async def nothing(items: list[int]) -> list[int]:
    return items


class PythonQueue:
    """Futures in a list, and a decision when it is full or the first has waited."""

    def __init__(self, function: Callable[[list[Any]], Awaitable[list[Any]]]) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._free = True
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, item: Any) -> Any:
        future = self._loop.create_future()
        self._waiting.append((item, future))
        if self._free and not self._asked:
            if len(self._waiting) >= SIZE:
                self._asked = True
                self._loop.call_soon(self._take)
            elif self._timer is None:
                self._timer = self._loop.call_later(WAIT_S, self._due)
        return await future

    def _due(self) -> None:
        self._timer = None
        if self._waiting and self._free:
            self._take()

    def _take(self) -> None:
        self._asked = False
        batch, self._waiting = self._waiting[:SIZE], self._waiting[SIZE:]
        if not batch:
            return
        self._free = False
        items = [item for item, _ in batch]
        task = self._loop.create_task(self._function(items))  # type: ignore[arg-type]
        task.add_done_callback(lambda task: self._ended(batch, task))

    def _ended(self, batch: list[tuple[Any, asyncio.Future[Any]]], task: asyncio.Task[list[Any]]) -> None:
        self._free = True
        for (_, future), result in zip(batch, task.result(), strict=True):
            if not future.done():
                future.set_result(result)
        if len(self._waiting) >= SIZE:
            self._asked = True
            self._loop.call_soon(self._take)
        elif self._waiting and self._timer is None:
            self._timer = self._loop.call_later(WAIT_S, self._due)


async def measure(call: Callable[[int], Awaitable[Any]]) -> float:
    """Microseconds of CPU for each call."""

    async def caller() -> None:
        for at in range(ROUNDS):
            await call(at)

    began = time.process_time()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return (time.process_time() - began) / CALLERS / ROUNDS * 1e6


async def main() -> None:
    batched = serve.batch(max_batch_size=SIZE, batch_wait_timeout_s=WAIT_S)(nothing)
    shapes: dict[str, Callable[[int], Awaitable[Any]]] = {
        "bare": lambda _: asyncio.sleep(0),
        "python": PythonQueue(nothing),
        "core": batched,
    }
    for _ in range(3):
        print("  ".join([f"{name} {await measure(call):.2f} us" for name, call in shapes.items()]), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
