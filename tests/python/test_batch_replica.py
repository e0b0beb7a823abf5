"""A replica that is sent batches frame by frame: parking, one slot, groups, and an answer for each request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
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
from worker_gate import fresh_gate, gate, settles  # noqa: F401 - a fixture
from worker_replica import serving

from rayserve_fast.context import _batch_size

pytestmark = pytest.mark.usefixtures("fresh_gate")

BATCHES = {"max_batch_size": 8}

#: What two handlers meet at, and what those saw that note it: in this process, as `gate`.
both = threading.Barrier(2)
calls: list[tuple[int, int | None]] = []


def blocking(requests: list[Any]) -> list[str]:
    gate.entered.set()
    gate.release.wait(10)
    return [f"one of {len(requests)}"] * len(requests)


def blocking_one() -> str:
    gate.entered.set()
    gate.release.wait(10)
    return "one"


async def counting(requests: list[Any]) -> list[int]:
    return [len(requests)] * len(requests)


def meeting(requests: list[Any]) -> list[int]:
    both.wait(10)
    return [1] * len(requests)


async def noting(requests: list[Any]) -> list[dict[str, Any]]:
    calls.append((len(requests), _batch_size.get()))
    return [{"n": await request.json()} for request in requests]


async def single(request: Any) -> bytes:
    await asyncio.sleep(0)
    body: bytes = await request.body()
    return body


async def lengths(requests: list[Any]) -> list[int]:
    return [len(await request.body()) for request in requests]


def test_a_batch_is_one_call_with_a_list_in_order() -> None:
    calls.clear()
    with serving(noting, **BATCHES) as replica:
        link = replica.link()
        streams = link.post_batch(b"1", b"2", b"3")
        assert [link.answer(stream).body for stream in streams] == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
        assert calls == [(3, 3)]
        settles(replica)


def test_a_request_without_a_batch_is_a_list_of_one() -> None:
    with serving(lengths, **BATCHES) as replica:
        assert replica.link().get(1, b"four").body == b"4"


def test_a_replica_that_does_not_take_lists_runs_a_batch_as_single_requests_within_its_limit() -> None:
    with serving(single, max_ongoing_requests=2) as replica:
        link = replica.link()
        one, two, three = link.post_batch(b"a", b"b", b"c")
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
        one.post_batch(b"", b"", b"")
        other.post_batch(b"", b"")
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
        link.post_batch(b"", b"")
        link.post_batch(b"", b"", first=3)
        assert [link.answer(stream).body for stream in (1, 2, 3, 4)] == [b"1"] * 4


def test_the_numbers_change_in_place() -> None:
    with serving(lengths, max_batch_size=2) as replica:
        from rayserve_fast.controlplane.spec import DeploymentConfig

        replica.runtime.reconfigure(DeploymentConfig(max_batch_size=4, max_concurrent_batches=3))
        assert replica.link().max_ongoing == 3


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
        link.post_batch(b"", b"")
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
        link.post_batch(b"", b"")
        assert gate.entered.wait(10)
        replica.runtime.drain()
        assert link.frame().kind == DRAIN
        link.post_batch(b"", first=3)
        assert link.frame().kind == BUSY
        gate.release.set()
        assert [link.answer(stream).body for stream in (1, 2)] == [b"one of 2", b"one of 2"]
        assert replica.runtime.wait_idle(10)


def test_a_link_that_is_lost_with_a_batch_frees_its_slot() -> None:
    with serving(blocking, **BATCHES) as replica:
        link, other = replica.link(), replica.link()
        link.request(9, flags=BATCHED)
        link.post_batch(b"", b"")
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


@pytest.mark.parametrize("config", [BATCHES, {}], ids=["lists", "single requests"])
def test_a_slot_that_was_granted_to_a_batch_of_which_nothing_is_left_goes_to_the_next(config: dict[str, Any]) -> None:
    handler = blocking if config else blocking_one
    with serving(handler, max_ongoing_requests=1, **config) as replica:
        first, second, third = replica.link(), replica.link(), replica.link()
        first.post_batch(b"")
        assert gate.entered.wait(10)
        for link in (second, third):
            link.post_batch(b"")
            assert link.frame().kind == BUSY
        gate.release.set()
        first.answer(1)
        assert second.frame().kind == CREDIT
        second.request(2, flags=BATCHED)
        second.send(CANCEL, 2)
        second.batch(2, flags=GRANTED)
        assert second.answer(2).last.aux == CANCELLED
        assert not third.silent(0.7), "unused grants are taken back later"
        assert third.frame().kind == CREDIT
