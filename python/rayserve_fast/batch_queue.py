"""How the batches of one function run on one event loop; which items they hold has been decided.

A batch is one asyncio task, of the user's own coroutine, with nothing wrapped around it; an item has no task. It makes
its first step at once, and its results go to the callers in the callback that ends it. Calls for different models
(`serve.multiplexed`) are batches of their own that share the slot and run side by side.

Batches run in a copy of the context of the call that made the queue, without its request: a batch has many. Their
contexts are in `context._serve_batch_request_context`.
"""

from __future__ import annotations

import contextvars
import logging
import time
from asyncio import AbstractEventLoop, Task
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from rayserve_fast._core import Batcher
from rayserve_fast.context import _current_replica, _serve_batch_request_context, _serve_request_context
from rayserve_fast.controlplane.spec import BOUNDLESS

if TYPE_CHECKING:
    from rayserve_fast._core import Ticket
    from rayserve_fast.batching import BatchedFunction

logger = logging.getLogger("ray.serve")

#: In the place of an item, the end of a caller's stream; `StopIteration` says the same.
_END = StopAsyncIteration


class BatchQueue:
    """What waits for a function on a loop, and what runs.

    Args:
        function: the decorated function.
        loop: on whose thread everything happens, except `resize` and `load`.
    """

    def __init__(self, function: BatchedFunction, loop: AbstractEventLoop) -> None:
        self.function = function
        self.running: dict[Batch, tuple[Task[Any], float]] = {}  # with the start of each, by `time.time()`
        self._loop = loop
        self._replica = _current_replica()
        self._context = contextvars.copy_context()
        self._context.run(_serve_request_context.set, None)
        options = function.options
        self.batcher = Batcher(
            loop,
            function.check,
            self._run,
            options.batch_size_fn,
            min(options.max_batch_size, BOUNDLESS),
            min(options.batch_wait_timeout_s, BOUNDLESS),
            min(options.max_concurrent_batches, BOUNDLESS),
            function.name,
        )
        self.put = self.batcher.put
        self.load = self.batcher.load
        self.warn_of_limit()

    def resize(self) -> None:
        """Take the function's options for the next batch; on any thread."""
        options = self.function.options
        self.batcher.resize(min(options.max_batch_size, BOUNDLESS), min(options.batch_wait_timeout_s, BOUNDLESS))
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.batcher.turn)

    def warn_of_limit(self) -> None:
        """Say so in the log if the replica cannot have as many requests at once as its batches could hold."""
        options = self.function.options
        wanted = options.max_batch_size * options.max_concurrent_batches
        if self._replica is not None and (limit := self._replica._deployment_config.max_ongoing_requests) < wanted:
            logger.warning(
                "Batches of '%s' cannot become full: the replica runs at most max_ongoing_requests=%d requests, "
                "but max_batch_size=%d times max_concurrent_batches=%d is %d. Let it be at least as many.",
                self.function.name,
                limit,
                options.max_batch_size,
                options.max_concurrent_batches,
                wanted,
            )

    def _run(
        self,
        tickets: list[Ticket],
        items: list[Any] | None,
        contexts: list[Any],
        mixed: bool,
        size: float,
        waited_s: float,
    ) -> None:
        """Run a batch that has a slot; called by the batcher.

        Args:
            items: the argument of each, if none of them has more than one.
            contexts: of the requests.
            mixed: these are for different models.
            size: by the user's measure, or the number of items.
            waited_s: how long the oldest has waited.
        """
        self.function.metrics.released(waited_s)
        if not mixed:
            Batch(self, tickets, items, contexts, size, Slot(1, self.batcher)).begin(self._context.copy())
            return
        parts: dict[str, list[int]] = {}
        for at, context in enumerate(contexts):
            parts.setdefault("" if context is None else context.multiplexed_model_id, []).append(at)
        slot = Slot(len(parts), self.batcher)
        for part in parts.values():
            batch = Batch(self, [tickets[at] for at in part], None, [contexts[at] for at in part], None, slot)
            batch.begin(self._context.copy())


class Slot:
    """The right to run a batch, shared by its parts for different models."""

    def __init__(self, parts: int, batcher: Batcher) -> None:
        self._parts = parts
        self._batcher = batcher

    def release(self) -> None:
        """One part has ended."""
        self._parts -= 1
        if not self._parts:
            self._batcher.release()


class Batch:
    """One call of the user's function.

    Args:
        queue: where it comes from.
        tickets, items, contexts: see `BatchQueue._run`.
        size: None: to be measured.
        slot: released when it has ended.
    """

    def __init__(
        self,
        queue: BatchQueue,
        tickets: list[Ticket],
        items: list[Any] | None,
        contexts: list[Any],
        size: float | None,
        slot: Slot,
    ) -> None:
        self._queue = queue
        self._tickets = tickets
        self._items = items
        self._contexts = contexts
        self._size = size
        self._slot = slot
        self._began = time.perf_counter()

    def begin(self, context: contextvars.Context) -> None:
        """Call the function, in `context`, whose own it is from now on."""
        try:
            task: Task[Any] = context.run(self._start)
        except BaseException as error:
            self._end(error=error)
            return
        if task.done():
            self._ended(task)
        else:
            self._queue.running[self] = task, time.time()
            task.add_done_callback(self._ended)

    def _start(self) -> Task[Any]:
        queue, tickets = self._queue, self._tickets
        function = queue.function
        _serve_batch_request_context.set(self._contexts)
        owner = tickets[0].owner
        owners = () if owner is None else (owner,)
        if self._items is not None:
            columns: list[list[Any]] = [self._items]
            keywords: dict[str, list[Any]] = {}
        else:
            columns, keywords = function.columns(tickets)
        if self._size is None:
            measure = function.options.batch_size_fn
            self._size = len(tickets) if measure is None else measure([*columns, *keywords.values()][0])
        function.metrics.begun(self._size, function.options.max_batch_size)
        called = function.func(*owners, *columns, **keywords)
        task: Task[Any] = queue.batcher.start(self._stream(called) if function.is_generator else called)
        return task

    async def _stream(self, generator: AsyncGenerator[Any, None]) -> None:
        """Hand out what the generator yields, until it ends; what it raises is raised at those who still take part."""
        batcher, places = self._queue.batcher, len(self._tickets)
        async with aclosing(generator):
            async for items in generator:
                items = [_END if item is StopIteration else item for item in _one_each(items, places)]
                batcher.give(self._tickets, items, _END)

    def _ended(self, task: Task[Any]) -> None:
        self._queue.running.pop(self, None)
        try:
            results = task.result()
            if self._queue.function.is_generator:
                results = [_END] * len(self._tickets)
            else:
                results = _one_each(results, len(self._tickets))
        except BaseException as error:
            self._end(error=error)
        else:
            self._end(results)

    def _end(self, results: Any = None, error: BaseException | None = None) -> None:
        queue = self._queue
        queue.function.metrics.executed(time.perf_counter() - self._began)
        try:
            if error is not None:
                queue.batcher.fail(self._tickets, error)
            elif queue.function.is_generator:
                queue.batcher.give(self._tickets, results, _END)
            else:
                queue.batcher.finish(self._tickets, results)
        finally:
            self._slot.release()


def _one_each(results: Any, items: int) -> list[Any]:
    """RayServeException if there is not one result for each item; TypeError if they cannot be counted."""
    length = len(results)
    if type(results) is not list:
        results = list(results)
    if not len(results) == length == items:
        from rayserve_fast.exceptions import RayServeException  # imports Ray: only when it is needed

        raise RayServeException(
            "Batched function doesn't preserve batch size. "
            f"The input list has length {items} but the returned list has length {length}."
        )
    return results  # type: ignore[no-any-return]
