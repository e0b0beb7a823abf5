"""Calls of one item each, run in batches: `serve.batch`.

The decorated function takes lists and is called with single items, by as many requests as there are; each caller gets
its own result. What waits, and when it goes, is `rust/pyext/src/batcher/` over the same decision as the router's
batching; how a batch runs is `batch_queue.py`. There is one queue for each decorated function and event loop, made at
the first call and shared by all instances of a class.

Unlike Ray Serve's, a batch is not put together while earlier ones occupy all `max_concurrent_batches`, but when a slot
is free, of everything that waits by then. Works in a replica, in local testing mode, and in any other asyncio loop.
"""

from __future__ import annotations

import functools
import inspect
from asyncio import AbstractEventLoop, Task, get_running_loop
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any, TypeVar, overload

from rayserve_fast.batch_metrics import BatchMetrics
from rayserve_fast.batch_queue import BatchQueue
from rayserve_fast.context import _serve_request_context

if TYPE_CHECKING:
    from rayserve_fast._core import Ticket

__all__ = ["batch"]

R = TypeVar("R")


@overload
def batch(_func: Callable[..., Coroutine[Any, Any, Iterable[R]]], /) -> Callable[..., Coroutine[Any, Any, R]]: ...
@overload
def batch(_func: Callable[..., AsyncIterator[Iterable[R]]], /) -> Callable[..., AsyncGenerator[R, None]]: ...
@overload
def batch(
    _func: None = None,
    /,
    max_batch_size: int = 10,
    batch_wait_timeout_s: float = 0.01,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], int] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def batch(
    _func: Any = None,
    /,
    max_batch_size: int = 10,
    batch_wait_timeout_s: float = 0.01,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], int] | None = None,
) -> Any:
    """Call an async function of lists with one item at a time, and have the calls run together.

    The function, or method, gets a list for each of its parameters and returns as many results, in the same order. An
    async generator yields such lists: each call is then an async generator of its own items, which ends when the
    class `StopIteration` (or `StopAsyncIteration`) stands in its place.

    The result has `set_max_batch_size(n)` and `set_batch_wait_timeout_s(seconds)`, which act from the next batch on.

    Args:
        _func: the function, if there are no options.
        max_batch_size: most items in a batch, or the greatest size by `batch_size_fn`.
        batch_wait_timeout_s: seconds for which the first item of a batch waits for others while a slot is free; 0: a
            batch is what there is.
        max_concurrent_batches: batches that may run at once. While so many do, items are collected.
        batch_size_fn: the size of a list of items (of the first parameter), instead of their number. An item that makes
            a batch too large begins the next one.

    Raises:
        TypeError: `_func` is neither an async function nor an async generator function, or an option has a wrong type.
        ValueError: `max_batch_size` is below 1, or `batch_wait_timeout_s` below 0.

    A call raises what the function has raised, the same exception for all callers of the batch; `RayServeException` if
    it has returned more or fewer results than there were items; `RuntimeError` if an item alone is too large.

    >>> import asyncio
    >>> @batch(max_batch_size=3, batch_wait_timeout_s=0.1)
    ... async def double(numbers: list[int]) -> list[int]:
    ...     return [2 * number for number in numbers]
    >>> async def main() -> list[int]:
    ...     return await asyncio.gather(double(1), double(2), double(3))
    >>> asyncio.run(main())
    [2, 4, 6]
    """
    options = Options(
        _checked_size(max_batch_size),
        _checked_wait(batch_wait_timeout_s),
        _checked_concurrency(max_concurrent_batches),
        _checked_measure(batch_size_fn),
    )
    if _func is None:
        return functools.partial(_decorate_wrapped, options=options)
    return _decorate(_func, options)


@dataclass(frozen=True)
class Options:
    """What `batch` is given besides the function."""

    max_batch_size: int
    batch_wait_timeout_s: float
    max_concurrent_batches: int
    batch_size_fn: Callable[[list[Any]], int] | None


def _decorate_wrapped(func: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Like `_decorate`, but as in Ray Serve `func` may also be a plain function around an async one, by its `wraps`."""
    is_async = inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func)
    if is_async or not (callable(func) and inspect.iscoroutinefunction(inspect.unwrap(func))):
        return _decorate(func, options)

    @functools.wraps(func)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await func(*args, **kwargs)

    return _decorate(awaited, options)


def _decorate(func: Callable[..., Any], options: Options) -> Callable[..., Any]:
    if not callable(func):
        raise TypeError("@serve.batch can only be used to decorate functions or methods.")
    is_generator = inspect.isasyncgenfunction(func)
    if not (is_generator or inspect.iscoroutinefunction(func)):
        raise TypeError("Functions decorated with @serve.batch must be 'async def'")
    function = BatchedFunction(func, options)
    put = function.put
    batched: Any

    if is_generator:

        @functools.wraps(func)
        def batched(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            return _items(_Claim(put(args, kwargs)))

        batched._gives_async_generator = True  # which it cannot be itself, as it queues before it is read

    else:

        @functools.wraps(func)
        async def batched(*args: Any, **kwargs: Any) -> Any:
            ticket = put(args, kwargs)
            await ticket
            return ticket.take()

    for name in _METHODS:
        setattr(batched, name, getattr(function, name))
    return batched  # type: ignore[no-any-return]


#: Of `BatchedFunction`, what the decorated function has as attributes; the names are Ray Serve's.
_METHODS = (
    "set_max_batch_size",
    "set_batch_wait_timeout_s",
    "_get_max_batch_size",
    "_get_batch_wait_timeout_s",
    "_get_curr_iteration_start_times",
    "_is_batching_task_alive",
    "_get_handling_task_stack",
    "_get_metrics",
)


class BatchedFunction:
    """A decorated function: its options, and its queue on each event loop that calls it.

    It is pickled with the code that refers to it, and then is one without queues.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        self.func = func
        self.options = options
        self.is_generator = inspect.isasyncgenfunction(func)
        self.name = getattr(func, "__name__", repr(func))  # a partial has none
        self.metrics = BatchMetrics(self.name)
        self._queues: dict[AbstractEventLoop, BatchQueue] = {}
        parameters = list(inspect.signature(func).parameters.values())
        self._signatures = [inspect.Signature(parameters), inspect.Signature(parameters[1:])]

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchedFunction, (self.func, self.options)

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ticket:
        """Queue a call; TypeError if the function does not take these arguments."""
        queue = self._queues.get(get_running_loop()) or self._open()
        return queue.put(args, kwargs, _serve_request_context.get())

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many of the arguments are the object that this is a method of; TypeError if the others do not fit."""
        skip = int(bool(args) and self._is_method_of(args[0]))
        self._signatures[skip].bind(*args[skip:], **kwargs)
        return skip

    def columns(self, tickets: list[Ticket]) -> tuple[list[list[Any]], dict[str, list[Any]]]:
        """The arguments of a batch: of each parameter, the list of what the calls have given it."""
        given = [(args, kwargs or {}) for args, kwargs in (ticket.arguments() for ticket in tickets)]
        if len({(len(args), *kwargs) for args, kwargs in given}) > 1:
            signature = self._signatures[tickets[0].owner is not None]
            bound = [signature.bind(*args, **kwargs) for args, kwargs in given]
            given = [(call.args, call.kwargs) for call in bound]
            if len({(len(args), frozenset(kwargs)) for args, kwargs in given}) > 1:
                raise TypeError(
                    f"All calls of '{self.name}' must give the same parameters, because they are batched: "
                    "give a value also where the default would do, or to none of them."
                )
        return columns_of(given)

    def set_max_batch_size(self, new_max_batch_size: int) -> None:
        """Change `max_batch_size` from the next batch on; on any thread. Errors as those of `serve.batch`."""
        self._change(replace(self.options, max_batch_size=_checked_size(new_max_batch_size)))
        for queue in list(self._queues.values()):
            queue.warn_of_limit()

    def set_batch_wait_timeout_s(self, new_batch_wait_timeout_s: float) -> None:
        """Change `batch_wait_timeout_s` from the next batch on; on any thread. Errors as those of `serve.batch`."""
        self._change(replace(self.options, batch_wait_timeout_s=_checked_wait(new_batch_wait_timeout_s)))

    def _change(self, options: Options) -> None:
        self.options = options
        for queue in list(self._queues.values()):
            queue.resize()

    def _get_max_batch_size(self) -> int:
        return self.options.max_batch_size

    def _get_batch_wait_timeout_s(self) -> float:
        return self.options.batch_wait_timeout_s

    def _get_curr_iteration_start_times(self) -> RuntimeSummaryStatistics:
        """Of the batches that run now, by `time.time()`."""
        return RuntimeSummaryStatistics([start for _, start in self._running()])

    async def _is_batching_task_alive(self) -> bool:
        """Whether calls are taken; there is no task in the background that could have died."""
        return True

    async def _get_handling_task_stack(self) -> str:
        """Where the batches that run are, for a person to read."""
        text = StringIO()
        for task, _ in self._running():
            task.print_stack(file=text)
        waiting = sum(queue.load()[0] for queue in list(self._queues.values()))
        text.write(f"{len(self._running())} batches of {self.name} run, {waiting} items wait.\n")
        return text.getvalue()

    def _get_metrics(self) -> dict[str, Any]:
        """Counters and histograms since the start of the process, see `batch_metrics.BatchMetrics.read`."""
        return self.metrics.read(sum(queue.load()[0] for queue in list(self._queues.values())))

    def _running(self) -> list[tuple[Task[Any], float]]:
        return [running for queue in list(self._queues.values()) for running in list(queue.running.values())]

    def _open(self) -> BatchQueue:
        for other in list(self._queues):  # other threads may open one of their own
            if other.is_closed():
                self._queues.pop(other, None)
        loop = get_running_loop()
        queue = self._queues[loop] = BatchQueue(self, loop)
        self.metrics.publish(self)
        return queue

    def _is_method_of(self, first: Any) -> bool:
        """Whether its class, or it as a class, has this function under its name; perhaps below other decorators."""
        for base in (first if isinstance(first, type) else type(first)).__mro__:
            found = base.__dict__.get(self.name)
            if isinstance(found, staticmethod):
                continue
            if isinstance(found, classmethod):
                found = found.__func__
            while found is not None and found is not self.func:
                found = getattr(found, "__wrapped__", None)
            if found is not None:
                return True
        return False


@dataclass(frozen=True)
class RuntimeSummaryStatistics:
    """When the batches that run now have started, seconds since the epoch."""

    start_times: list[float]

    @property
    def min_start_time(self) -> float | None:
        return min(self.start_times, default=None)

    @property
    def mean_start_time(self) -> float | None:
        return sum(self.start_times) / len(self.start_times) if self.start_times else None

    @property
    def max_start_time(self) -> float | None:
        return max(self.start_times, default=None)

    @property
    def num_requests(self) -> int:
        return len(self.start_times)


def columns_of(given: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[list[list[Any]], dict[str, list[Any]]]:
    """Of each parameter, the list of what the calls have given it; all of them give the same ones."""
    columns = [list(column) for column in zip(*(args for args, _ in given), strict=True)]
    return columns, {name: [kwargs[name] for _, kwargs in given] for name in given[0][1]}


class _Claim:
    """What a caller's generator holds of its ticket: when it goes, begun or not, the ticket is given up."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket

    def __del__(self) -> None:
        self.ticket.abandon()


async def _items(claim: _Claim) -> AsyncGenerator[Any, None]:
    ticket = claim.ticket
    while True:
        await ticket
        try:
            item = ticket.take()
        except StopAsyncIteration:
            return
        yield item


def _checked_size(size: Any) -> int:
    whole = isinstance(size, int) or (isinstance(size, float) and size.is_integer())
    if not whole or isinstance(size, bool):
        raise TypeError(f"max_batch_size must be an integer of at least 1, got {size!r}.")
    if size < 1:
        raise ValueError(f"max_batch_size must be an integer of at least 1, got {size!r}.")
    return int(size)


def _checked_wait(wait: Any) -> float:
    if not isinstance(wait, (int, float)) or isinstance(wait, bool):
        raise TypeError(f"batch_wait_timeout_s must be a number of seconds of at least 0, got {wait!r}.")
    if not wait >= 0:
        raise ValueError(f"batch_wait_timeout_s must be a number of seconds of at least 0, got {wait!r}.")
    return wait


def _checked_concurrency(concurrency: Any) -> int:
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
        raise TypeError(f"max_concurrent_batches must be an integer of at least 1, got {concurrency!r}.")
    return concurrency


def _checked_measure(measure: Any) -> Callable[[list[Any]], int] | None:
    if measure is not None and not callable(measure):
        raise TypeError(f"batch_size_fn must be a function of a list of items, or None, got {measure!r}.")
    return measure  # type: ignore[no-any-return]
