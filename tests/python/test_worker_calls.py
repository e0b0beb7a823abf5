"""Handle calls at the replica: methods, arguments, results and errors."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy
import pytest
import wire_client as wire
from worker_replica import serving

from rayserve_fast import values


class Methods:
    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    async def add(self, a: int, b: int = 1) -> int:
        return a + b + self.offset

    async def slow(self, a: int) -> int:
        await asyncio.sleep(0.01)
        return a

    def thread(self) -> str:
        return threading.current_thread().name

    async def double(self, array: Any) -> Any:
        array *= 2
        return array

    async def fails(self) -> None:
        raise KeyError("of the user")

    async def unpicklable(self) -> Any:
        return threading.Lock()

    def items(self) -> Any:
        yield 1

    def hidden_items(self) -> Any:
        return (item for item in [1])

    async def context(self) -> list[Any]:
        from rayserve_fast.context import _serve_request_context

        context = _serve_request_context.get()
        assert context is not None
        return [context.request_id, context.route, context.app_name, context.is_http_request]


def ask(link: wire.Link, method: str, *args: Any, **kwargs: Any) -> Any:
    link.call(1, method, *args, **kwargs)
    last = link.answer(1).last
    assert last.kind == wire.RESULT, last
    return wire.value(last.payload)


@pytest.fixture(scope="module")
def replica() -> Any:
    with serving(Methods, 100) as replica:
        yield replica


def test_methods_are_called_with_their_arguments(replica: Any) -> None:
    link = replica.link()
    assert ask(link, "add", 1) == 102
    assert ask(link, "add", 1, b=5) == 106
    assert ask(link, "slow", 7) == 7
    assert ask(link, "thread").startswith("serve-Methods-sync")
    assert ask(link, "context") == ["id-1", "/", "default", False]


def test_arrays_travel_out_of_band_and_arrive_writable(replica: Any) -> None:
    array = numpy.arange(200_000, dtype=numpy.float64)
    assert (ask(replica.link(), "double", array) == array * 2).all()


def test_an_exception_of_the_user_comes_with_its_traceback(replica: Any) -> None:
    link = replica.link()
    link.call(1, "fails")
    last = link.answer(1).last
    assert (last.kind, last.aux) == (wire.ERROR, wire.USER)
    error = values.load_error(last.payload)
    assert isinstance(error, KeyError)
    assert "of the user" in str(error)


@pytest.mark.parametrize(
    ("method", "fault", "text"),
    [
        (
            "missing",
            wire.NO_METHOD,
            "Tried to call a method 'missing' that does not exist. Available methods: ['add', ",
        ),
        ("items", wire.WRONG_KIND, "Method 'items' returned a generator."),
        ("hidden_items", wire.WRONG_KIND, "Method 'hidden_items' returned a generator."),
        ("unpicklable", 8, "cannot be sent"),
    ],
)
def test_what_cannot_be_answered_says_why(replica: Any, method: str, fault: int, text: str) -> None:
    link = replica.link()
    link.call(1, method)
    last = link.answer(1).last
    assert (last.kind, last.aux) == (wire.ERROR, fault)
    assert text in last.payload.decode()
    assert replica.runtime.counters()["running"] == 0


def test_a_function_answers_every_method_name() -> None:
    def double(number: int) -> int:
        return 2 * number

    with serving(double) as replica:
        assert ask(replica.link(), "__call__", 4) == 8


def test_a_call_is_cancelled(replica: Any) -> None:
    link = replica.link()
    link.call(1, "slow", 1)
    link.send(wire.CANCEL, 1)
    last = link.answer(1).last
    assert (last.kind, last.aux) == (wire.ERROR, wire.CANCELLED)
