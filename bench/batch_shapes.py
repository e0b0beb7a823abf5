"""What a call of a batched function costs its event loop: the queue in Rust against the same one in Python.

    python -m bench.batch_shapes            # a table of microseconds of CPU for each item, uvloop, no sockets

All let 64 callers of one item each go round as fast as they can, with a function that does nothing. `bare` shows what
the callers themselves cost: they let the loop go round instead of calling. `least` is the least in Python that could be
called a batcher (futures in a list, one task for each batch); `python` has the duties of the real one: any loop,
arguments checked, methods told from functions, the request's context and model, times, callers that leave. `core` is
the real one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import uvloop

from rayserve_fast import serve
from rayserve_fast.context import _serve_request_context

CALLERS, ROUNDS, SIZE, WAIT_S = 64, 4000, 32, 0.005


async def nothing(items: list[int]) -> list[int]:
    return items


class Least:
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
        self._ask()
        return await future

    def _ask(self) -> None:
        if self._free and not self._asked:
            if len(self._waiting) >= SIZE:
                self._asked = True
                self._loop.call_soon(self._take)
            elif self._timer is None:
                self._timer = self._loop.call_later(WAIT_S, self._due)

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
        if self._waiting:
            self._ask()


class Full(Least):
    """The same with the duties of the real one."""

    def __init__(self, function: Callable[[list[Any]], Awaitable[list[Any]]]) -> None:
        super().__init__(function)
        self._queues = {self._loop: self}
        self._owner: type | None = None
        self._stranger: type | None = int
        self._least = self._most = 1

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self._put(args, kwargs)

    def _put(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Any]:
        queue = self._queues[asyncio.get_running_loop()]
        skip = int(type(args[0]) is self._owner)
        if not skip and type(args[0]) is not self._stranger:
            raise TypeError
        if kwargs or not self._least <= len(args) - skip <= self._most:
            raise TypeError
        future = queue._loop.create_future()
        queue._waiting.append((Call(args, kwargs, _serve_request_context.get(), skip, time.monotonic()), future))
        queue._ask()
        return future

    def _take(self) -> None:
        self._waiting = [(call, future) for call, future in self._waiting if not future.cancelled()]
        calls = [call for call, _ in self._waiting[:SIZE]]
        contexts = [call.context for call in calls]
        if len({"" if context is None else context.multiplexed_model_id for context in contexts}) > 1:
            raise NotImplementedError
        if any(len(call.args) != 1 + call.skip or call.kwargs for call in calls):
            raise NotImplementedError
        self._waiting[:SIZE] = [(call.args[call.skip], future) for call, future in self._waiting[:SIZE]]
        super()._take()


@dataclass(slots=True)
class Call:
    """One call that waits."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Any
    skip: int
    since: float


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
        "least": Least(nothing),
        "python": Full(nothing),
        "core": batched,
    }
    for _ in range(3):
        print("  ".join([f"{name} {await measure(call):.2f} us" for name, call in shapes.items()]), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
