"""A replica that is sent batches frame by frame: parking, one slot, groups, and an answer for each request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from wire_client import (
    BATCH,
    BATCHED,
    BUSY,
    CANCEL,
    CANCELLED,
    CREDIT,
    DRAIN,
    ERROR,
    FIN,
    GRANTED,
    REQUEST,
    RESPONSE,
    Link,
    Refused,
    request_head,
    value,
)
from worker_replica import Replica, serving

from rayserve_fast import values
from rayserve_fast.context import _batch_size

BATCHES = {"max_batch_size": 8}


class Gate:
    """Where blocking handlers are, and what lets them go; a new one for each test."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        self.both = threading.Barrier(2)
        self.calls: list[tuple[int, int | None]] = []


gate = Gate()


@pytest.fixture(autouse=True)
def fresh_gate() -> Iterator[None]:
    global gate
    gate = Gate()
    yield
    gate.release.set()


def blocking(requests: list[Any]) -> list[str]:
    gate.entered.set()
    gate.release.wait(10)
    return [f"one of {len(requests)}"] * len(requests)


async def counting(requests: list[Any]) -> list[int]:
    return [len(requests)] * len(requests)


def meeting(requests: list[Any]) -> list[int]:
    gate.both.wait(10)
    return [1] * len(requests)


async def noting(requests: list[Any]) -> list[dict[str, Any]]:
    gate.calls.append((len(requests), _batch_size.get()))
    return [{"n": await request.json()} for request in requests]


async def single(request: Any) -> bytes:
    await asyncio.sleep(0)
    body: bytes = await request.body()
    return body


def some_bad(requests: list[Any]) -> list[Any]:
    return ["good", ValueError("bad"), {"unserializable": object()}, "good"]


async def async_some_bad(requests: list[Any]) -> list[Any]:
    return some_bad(requests)


def broken(requests: list[Any]) -> list[Any]:
    raise ValueError("broken")


async def async_broken(requests: list[Any]) -> list[Any]:
    raise ValueError("broken")


async def responses(requests: list[Any]) -> list[Any]:
    return [None, b"bytes", "text", PlainTextResponse("made", 201), StreamingResponse(iter(["a", "b"]))]


def sync_responses(requests: list[Any]) -> list[Any]:
    return [StreamingResponse(iter(["a", "b"])), "plain"]


class Returning:
    """Returns what it was made with, and then a good list."""

    def __init__(self, result: Any) -> None:
        self.results = [result, [1, 2]]

    async def __call__(self, items: list[int]) -> Any:
        return self.results.pop(0)


def settles(replica: Replica) -> None:
    """Waits until every slot is free: that of a streamed response is a moment after its last byte."""
    deadline = time.monotonic() + 10
    while replica.runtime.counters()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.002)  # no event tells


def post(link: Link, *bodies: bytes, first: int = 1) -> list[int]:
    """Sends one batch, and its streams come back."""
    streams = list(range(first, first + len(bodies)))
    for stream, body in zip(streams, bodies, strict=True):
        link.request(stream, body, method="POST", flags=BATCHED)
    link.batch(*streams)
    return streams


async def lengths(requests: list[Any]) -> list[int]:
    return [len(await request.body()) for request in requests]


def sync_texts(requests: list[Any]) -> tuple[str, ...]:
    return tuple(f"{i} of {len(requests)}" for i in range(len(requests)))


def test_a_batch_is_one_call_with_a_list_in_order() -> None:
    with serving(noting, **BATCHES) as replica:
        link = replica.link()
        streams = post(link, b"1", b"2", b"3")
        assert [link.answer(stream).body for stream in streams] == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
        assert gate.calls == [(3, 3)]
        settles(replica)


def test_sync_handlers_run_in_the_pool_and_may_return_another_sequence() -> None:
    with serving(sync_texts, **BATCHES) as replica:
        link = replica.link()
        streams = post(link, b"", b"")
        assert [link.answer(stream).body for stream in streams] == [b"0 of 2", b"1 of 2"]


def test_a_request_without_a_batch_is_a_list_of_one() -> None:
    with serving(lengths, **BATCHES) as replica:
        assert replica.link().get(1, b"four").body == b"4"


def test_a_replica_that_does_not_take_lists_runs_a_batch_as_single_requests_within_its_limit() -> None:
    with serving(single, max_ongoing_requests=2) as replica:
        link = replica.link()
        one, two, three = post(link, b"a", b"b", b"c")
        assert {(frame.kind, frame.stream) for frame in (link.frame() for _ in range(4))} == {
            (RESPONSE, one),
            (RESPONSE, two),
            (BUSY, three),
            (CREDIT, 0),
        }
        link.request(three, b"c", method="POST", flags=GRANTED)
        assert link.answer(three).body == b"c"
        settles(replica)


def test_a_batch_takes_one_slot_whatever_max_ongoing_requests_says() -> None:
    with serving(blocking, max_batch_size=8, max_ongoing_requests=100) as replica:
        one, other = replica.link(), replica.link()
        assert one.max_ongoing == 1
        post(one, b"", b"", b"")
        post(other, b"", b"")
        refused = [other.frame(), other.frame()]
        assert [(frame.kind, frame.stream) for frame in refused] == [(BUSY, 1), (BUSY, 2)]
        assert other.silent(0.05)
        gate.release.set()
        assert [one.answer(stream).body for stream in (1, 2, 3)] == [b"one of 3"] * 3
        assert (credit := other.frame()).kind == CREDIT
        assert credit.aux == 1
        for stream in (1, 2):
            other.request(stream, flags=BATCHED)
        other.batch(1, 2, flags=GRANTED)
        assert [other.answer(stream).body for stream in (1, 2)] == [b"one of 2"] * 2


def test_concurrent_batches_run_at_once() -> None:
    with serving(meeting, max_batch_size=2, max_concurrent_batches=2) as replica:
        link = replica.link()
        post(link, b"", b"")
        post(link, b"", b"", first=3)
        assert [link.answer(stream).body for stream in (1, 2, 3, 4)] == [b"1"] * 4


def test_the_numbers_change_in_place() -> None:
    with serving(lengths, max_batch_size=2) as replica:
        from rayserve_fast.controlplane.spec import DeploymentConfig

        replica.runtime.reconfigure(DeploymentConfig(max_batch_size=4, max_concurrent_batches=3))
        assert replica.link().max_ongoing == 3


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ([1], "The input list has length 2 but the returned list has length 1."),
        ({"a": 1, "b": 2}, "The input list has length 2 but the function returned a dict of length 2."),
        ("ab", "The input list has length 2 but the function returned a str of length 2."),
        ({1, 2}, "The input list has length 2 but the function returned a set of length 2."),
        (7, "The input list has length 2 but the function returned a int."),
    ],
)
def test_a_result_that_is_no_list_of_that_length_fails_the_batch_and_no_other(result: Any, told: str) -> None:
    with serving(Returning, result, **BATCHES) as replica:
        link = replica.link()
        for stream in (1, 2):
            link.call(stream, "__call__", stream, flags=BATCHED)
        link.batch(1, 2)
        for stream in (1, 2):
            failed = link.answer(stream).last
            assert failed.kind == ERROR
            assert told in str(values.load_error(failed.payload))
        post(link, b"", b"")
        assert [link.answer(stream).body for stream in (1, 2)] == [b"1", b"2"]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_an_exception_among_the_results_fails_its_own_request(kind: str) -> None:
    with serving(async_some_bad if kind == "async" else some_bad, **BATCHES) as replica:
        link = replica.link()
        streams = post(link, b"", b"", b"", b"")
        assert [link.answer(stream).status for stream in streams] == [200, 500, 500, 200]
        settles(replica)


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_an_exception_fails_every_request_with_an_answer_of_its_own_and_is_logged_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(async_broken if kind == "async" else broken, **BATCHES) as replica:
        link = replica.link()
        streams = post(link, b"", b"")
        for stream in streams:
            answer = link.answer(stream)
            assert (answer.status, answer.body) == (500, b"Internal Server Error")
        settles(replica)
    logged = [record.getMessage() for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    assert logged[0].startswith("A batch of 2 requests to Replica(id='r1'")


def test_results_become_responses_as_ever() -> None:
    with serving(responses, **BATCHES) as replica:
        link = replica.link()
        streams = post(link, *[b""] * 5)
        answers = [link.answer(stream) for stream in streams]
        assert [answer.body for answer in answers] == [b"", b"bytes", b"text", b"made", b"ab"]
        assert [answer.status for answer in answers] == [200, 200, 200, 201, 200]
        settles(replica)


def test_sync_handlers_may_stream_too() -> None:
    with serving(sync_responses, **BATCHES) as replica:
        link = replica.link()
        streams = post(link, b"", b"")
        assert [link.answer(stream).body for stream in streams] == [b"ab", b"plain"]


class Model:
    def both(self, xs: list[int], ys: list[int] | None = None, *, z: list[int] | None = None) -> list[Any]:
        return [(x, ys and ys[i], z and z[i], len(xs)) for i, x in enumerate(xs)]

    async def other(self, xs: list[int]) -> list[int]:
        return [-x for x in xs]


def test_each_parameter_is_a_list_and_what_differs_is_another_call_under_the_same_slot() -> None:
    with serving(Model, **BATCHES) as replica:
        link = replica.link()
        link.call(1, "both", 1, flags=BATCHED)
        link.call(2, "both", 2, 20, flags=BATCHED)
        link.call(3, "other", 3, flags=BATCHED)
        link.call(4, "both", 4, flags=BATCHED)
        link.call(5, "both", 5, z=50, flags=BATCHED)
        link.call(6, "missing", 6, flags=BATCHED)
        link.batch(1, 2, 3, 4, 5, 6)
        assert [value(link.answer(stream).last.payload) for stream in (1, 2, 3, 4, 5)] == [
            (1, None, None, 2),
            (2, 20, None, 1),
            -3,
            (4, None, None, 2),
            (5, None, 50, 1),
        ]
        assert link.answer(6).last.kind == ERROR
        settles(replica)


def test_a_request_that_is_cancelled_while_it_is_parked_is_left_out() -> None:
    with serving(lengths, **BATCHES) as replica:
        link = replica.link()
        for stream in (1, 2):
            link.request(stream, b"x" * stream, flags=BATCHED)
        link.send(CANCEL, 1)
        assert link.answer(1).last.aux == CANCELLED
        link.batch(1, 2)
        assert link.answer(2).body == b"2"


def test_a_request_that_is_cancelled_in_its_batch_does_not_end_the_others() -> None:
    with serving(blocking, **BATCHES) as replica:
        link = replica.link()
        post(link, b"", b"")
        assert gate.entered.wait(10)
        link.send(CANCEL, 1)
        assert link.silent(0.05)
        gate.release.set()
        assert link.answer(1).last.aux == CANCELLED
        assert link.answer(2).body == b"one of 2"
        settles(replica)


def test_what_is_over_before_it_starts_is_not_in_the_list() -> None:
    with serving(counting, **BATCHES) as replica:
        link = replica.link()
        link.request(1, flags=BATCHED)
        link.send(REQUEST, 2, flags=BATCHED | FIN, aux=1, payload=request_head())
        threading.Event().wait(0.02)
        link.batch(1, 2)
        assert link.answer(2).last.aux == 5
        assert link.answer(1).body == b"1"


def test_a_draining_replica_refuses_batches_and_finishes_those_that_run() -> None:
    with serving(blocking, **BATCHES) as replica:
        link = replica.link()
        post(link, b"", b"")
        assert gate.entered.wait(10)
        replica.runtime.drain()
        assert link.frame().kind == DRAIN
        post(link, b"", first=3)
        assert link.frame().kind == BUSY
        gate.release.set()
        assert [link.answer(stream).body for stream in (1, 2)] == [b"one of 2", b"one of 2"]
        assert replica.runtime.wait_idle(10)


def test_a_link_that_is_lost_with_a_batch_frees_its_slot() -> None:
    with serving(blocking, **BATCHES) as replica:
        link, other = replica.link(), replica.link()
        link.request(9, flags=BATCHED)
        post(link, b"", b"")
        assert gate.entered.wait(10)
        link.close()
        gate.release.set()
        other.request(1, flags=BATCHED)
        other.batch(1)
        if (frame := other.frame()).kind == BUSY:
            assert other.frame().kind == CREDIT
            other.request(2, flags=BATCHED)
            other.batch(2, flags=GRANTED)
            frame = other.frame()
        assert frame.aux == 200
        settles(replica)


@pytest.mark.parametrize(
    "hostile",
    [
        lambda link: link.send(BATCH),
        lambda link: link.send(BATCH, payload=b"123"),
        lambda link: link.send(BATCH, payload=bytes(4 * 16385)),
        lambda link: (link.request(1), link.batch(1)),
        lambda link: [link.request(n, flags=BATCHED) for n in range(1, 16386)],
    ],
)
def test_a_batch_that_no_caller_sends_ends_its_link(hostile: Callable[[Link], Any]) -> None:
    with serving(blocking, **BATCHES) as replica:
        link = replica.link()
        with contextlib.suppress(BrokenPipeError):
            hostile(link)
        with pytest.raises(Refused):
            link.frame()


def test_a_batch_of_streams_that_are_gone_runs_nothing_and_keeps_no_slot() -> None:
    with serving(lengths, **BATCHES) as replica:
        link = replica.link()
        link.batch(1, 2, 3)
        assert link.get(4, b"four").body == b"4"
