"""Requests that the router has put together: which of them one call serves, and what it returns for each.

The worker admits a batch as one. Its HTTP requests are one call with a list of them; its handle calls come here, where
their arguments are read: calls of one method, one model and the same parameters are one call in which each parameter is
a list of its own, in order. What that returns is judged by :func:`results`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ray import ObjectRef

from rayserve_fast.context import _batch_size, _RequestContext, _serve_request_context
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica import responses
from rayserve_fast.replica.calls import WrongKindError, read_arguments

if TYPE_CHECKING:
    from rayserve_fast._core import RequestHead
    from rayserve_fast.replica.calls import CallHead, Calls

H = TypeVar("H", bound="CallHead")

logger = logging.getLogger("ray.serve")


class Group(NamedTuple):
    """Calls that are served together."""

    heads: list[Any]
    sync: bool  # whether a pool thread runs it
    call: Callable[[], Any]  # for an async method it gives the coroutine
    model_id: str  # of all of them; empty: none


class Batches:
    """Puts handle calls together.

    Args:
        calls: the methods.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def group(self, heads: Sequence[H]) -> tuple[list[Group], list[tuple[H, Exception]]]:
        """The groups of these calls, and the calls that have failed already."""
        groups: dict[Any, tuple[list[H], list[tuple[Any, ...]], list[dict[str, Any]]]] = {}
        failures: list[tuple[H, Exception]] = []
        for head in heads:
            try:
                if head.streaming:
                    raise WrongKindError(
                        f"Method '{head.method}' cannot be called with `handle.options(stream=True)`: its deployment "
                        "sets max_batch_size, and a batch has one result for each call."
                    )
                self._calls.find_method(head.method, False)
                args, kwargs = read_arguments(head)
            except Exception as error:
                failures.append((head, error))
                continue
            key = head.method, head.multiplexed_model_id, len(args), frozenset(kwargs) if kwargs else None
            together, rows, named = groups.setdefault(key, ([], [], []))
            together.append(head)
            rows.append(args)
            named.append(kwargs)
        return [self._together(*group) for group in groups.values()], failures

    def _together(self, heads: Sequence[CallHead], rows: list[tuple[Any, ...]], named: list[dict[str, Any]]) -> Group:
        first = heads[0]
        method, sync = self._calls.find_method(first.method, False)
        columns = [list(column) for column in zip(*rows, strict=True)]
        by_name = {name: [kwargs[name] for kwargs in named] for name in named[0]}
        call: Callable[[], Any] = partial(method, *columns, **by_name)
        if any(type(value) is ObjectRef for column in (*columns, *by_name.values()) for value in column):
            call = partial(_run_with_values if sync else _with_values, method, columns, by_name)
        return Group(list(heads), sync, call, first.multiplexed_model_id)


def run(call: Callable[[], Any]) -> Any:
    """What a pool thread does with a group."""
    return call()


def enter(app: str, size: int, model_id: str) -> None:
    """Make what runs next see the size of its batch, and the model that all its requests name; 0: it is in none.

    There is no single request, so there is no other context of one.
    """
    _batch_size.set(size or None)
    _serve_request_context.set(_RequestContext(app_name=app, multiplexed_model_id=model_id) if model_id else None)


def results(result: Any, size: int) -> list[Any]:
    """The results of a batch of `size` requests, in their order.

    Raises:
        RayServeException: it is no list, nor another ordered sequence, or it has another length.
    """
    ordered = hasattr(result, "__getitem__") and not isinstance(result, (str, bytes, bytearray, Mapping, Set))
    length = len(result) if hasattr(result, "__len__") else None
    if not ordered or length is None:
        of = "" if length is None else f" of length {length}"
        raise RayServeException(
            f"Batched function doesn't preserve batch size. The input list has length {size} but the function returned "
            f"a {type(result).__name__}{of}. Return a list with one result for each request, in their order."
        )
    if length != size:
        raise RayServeException(
            f"Batched function doesn't preserve batch size. The input list has length {size} but the returned list has "
            f"length {length}."
        )
    return list(result)


def failed(replica: object, heads: Sequence[RequestHead], error: BaseException) -> responses.Answer:
    """Log, once, the error of a call that has served these requests, and give the answer for each."""
    logger.error(
        "A batch of %d requests to %s failed: %s.",
        len(heads),
        replica,
        ", ".join(head.request_id for head in heads),
        exc_info=(type(error), error, error.__traceback__),
    )
    return responses.failure(error)


async def _with_values(method: Callable[..., Any], columns: list[list[Any]], by_name: dict[str, list[Any]]) -> Any:
    """Calls `method` with the values of the references among the arguments."""
    lists = await asyncio.gather(*(_values(column) for column in (*columns, *by_name.values())))
    return await method(*lists[: len(columns)], **dict(zip(by_name, lists[len(columns) :], strict=True)))


async def _values(column: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*(_value(value) for value in column)))


async def _value(given: Any) -> Any:
    return await given if type(given) is ObjectRef else given


def _run_with_values(method: Callable[..., Any], columns: list[list[Any]], by_name: dict[str, list[Any]]) -> Any:
    import ray

    def read(column: list[Any]) -> list[Any]:
        return [ray.get(value) if type(value) is ObjectRef else value for value in column]

    return method(*map(read, columns), **{name: read(column) for name, column in by_name.items()})
