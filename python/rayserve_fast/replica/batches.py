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

from rayserve_fast.batching import columns_of
from rayserve_fast.context import _batch_size, _RequestContext, _serve_request_context
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica import responses
from rayserve_fast.replica.calls import (
    WrongKindError,
    await_references,
    get_references,
    has_references,
    read_arguments,
)
from rayserve_fast.tracebacks import from_user_code

if TYPE_CHECKING:
    from rayserve_fast._core import RequestHead
    from rayserve_fast.replica.calls import Arguments, CallHead, Calls

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
        groups: dict[Any, tuple[list[H], list[Arguments]]] = {}
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
            together, given = groups.setdefault(key, ([], []))
            together.append(head)
            given.append((args, kwargs))
        return [self._together(*group) for group in groups.values()], failures

    def _together(self, heads: list[H], given: list[Arguments]) -> Group:
        first = heads[0]
        method, sync = self._calls.find_method(first.method, False)
        call: Callable[..., Any] = _call
        if any(has_references(args, kwargs) for args, kwargs in given):
            call = _run_with_values if sync else _with_values
        return Group(heads, sync, partial(call, method, given), first.multiplexed_model_id)


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
        exc_info=(type(error), error, from_user_code(error.__traceback__)),
    )
    return responses.failure(error)


def _call(method: Callable[..., Any], given: list[Arguments]) -> Any:
    """Calls `method` with the list of what the calls have given each of its parameters."""
    columns, by_name = columns_of(given)
    return method(*columns, **by_name)


async def _with_values(method: Callable[..., Any], given: list[Arguments]) -> Any:
    """The same with the values of the references among the arguments."""
    return await _call(method, await asyncio.gather(*(await_references(args, kwargs) for args, kwargs in given)))


def _run_with_values(method: Callable[..., Any], given: list[Arguments]) -> Any:
    return _call(method, [get_references(args, kwargs) for args, kwargs in given])
