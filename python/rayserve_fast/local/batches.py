"""Batches in local testing mode: what the engine, the worker and its groups do elsewhere, for one replica.

When a batch is released is decided as in ``rust/dataplane/src/engine/batch.rs``: never while no slot is free, else when
it is full or its oldest call has waited. Which calls are served together, and what their results are, is the same code
as in a replica (``replica.batches``).
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any

from rayserve_fast.replica import batches

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import DeploymentConfig
    from rayserve_fast.local.call import LocalHead


class Batcher:
    """Which of the waiting calls go together, and when; its user holds the lock that guards both.

    Args:
        config: of a deployment with `max_batch_size`.
        waiting: the queue, oldest first.
        later: has somebody ask again after so many seconds.
    """

    def __init__(self, config: DeploymentConfig, waiting: deque[LocalHead], later: Callable[[float], None]) -> None:
        assert config.max_batch_size is not None
        self._size, self._wait_s, self._slots = config.max_batch_size, config.batch_wait_timeout_s, config.slots
        self._waiting = waiting
        self._later = later
        self.running = 0  # batches

    @property
    def forming(self) -> int:
        """How many of the waiting calls a free slot is going to take: they are not queued."""
        return min(len(self._waiting), self._size * max(0, self._slots - self.running))

    def take(self) -> list[list[LocalHead]]:
        """The batches that go now, each of which takes a slot."""
        released = []
        while self._waiting and self.running < self._slots:
            left = self._waiting[0].since + self._wait_s - time.monotonic()
            if left > 0 and len(self._waiting) < self._size:
                self._later(left)
                break
            released.append([self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))])
            self.running += 1
        return released


class LocalGroup:
    """Calls that one call of the user's code serves.

    Args:
        group: what is called.
        enter: makes it see where it runs.
        answer: is told the call, and its result or its error.
        ended: is told when all are answered.
    """

    def __init__(
        self,
        group: batches.Group,
        enter: Callable[[batches.Group], None],
        answer: Callable[[LocalHead, Any, BaseException | None], None],
        ended: Callable[[], None],
    ) -> None:
        self._group = group
        self._enter = enter
        self._answer = answer
        self._ended = ended
        self._task: asyncio.Task[Any] | None = None

    @property
    def sync(self) -> bool:
        """Whether a thread runs it."""
        return self._group.sync

    def run(self) -> Any:
        """Call it; on a thread of the pool, or in a context on the loop's thread."""
        self._enter(self._group)
        return self._group.call()

    def start(self) -> None:
        """Run it as a task; on the loop's thread."""
        context = Context()
        try:
            context.run(self.follow, context.run(self.run))
        except BaseException as error:
            self.fail(error)

    def ran(self, result: Any, context: Context, loop: asyncio.AbstractEventLoop) -> None:
        """A thread has come back with this."""
        if inspect.iscoroutine(result):
            loop.call_soon_threadsafe(self.follow, result, context=context)
        else:
            self._finish(result)

    def fail(self, error: BaseException) -> None:
        """The same error for all."""
        for head in self._group.heads:
            self._answer(head, None, error)
        self._ended()

    def follow(self, coroutine: Any) -> None:
        """Run the coroutine as a task of the running loop."""
        self._task = asyncio.get_running_loop().create_task(coroutine)  # kept alive by whoever keeps this group
        self._task.add_done_callback(self._ended_task)

    def _ended_task(self, task: asyncio.Task[Any]) -> None:
        try:
            result = task.result()
        except BaseException as error:
            self.fail(error)
        else:
            self._finish(result)

    def _finish(self, result: Any) -> None:
        heads = self._group.heads
        try:
            values = batches.results(result, len(heads))
        except BaseException as error:
            return self.fail(error)
        for head, value in zip(heads, values, strict=True):
            failed = isinstance(value, BaseException)
            self._answer(head, None if failed else value, value if failed else None)
        return self._ended()


def countdown(count: int, then: Callable[[], None]) -> Callable[[], None]:
    """Something to call `count` times, from any thread; the last time calls `then`."""
    left = iter(range(count - 1, -1, -1))

    def ended() -> None:
        if next(left) == 0:
            then()

    return ended
