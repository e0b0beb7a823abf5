"""Batches end to end, without Ray: what proxy and handles put together for a real replica."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from deployed import wait_for
from handle_replica import called
from http_pair import Address, ours
from worker_gate import fresh_gate, gate  # noqa: F401 - a fixture

from rayserve_fast import caller
from rayserve_fast.exceptions import BackPressureError, RequestCancelledError

pytestmark = pytest.mark.usefixtures("fresh_gate")


class Sizes:
    """Answers with the size of each request's batch, in order; its first call waits for the gate."""

    def __init__(self) -> None:
        self.order: list[Any] = []

    def __call__(self, items: list[Any]) -> list[Any]:
        if not gate.entered.is_set():
            gate.entered.set()
            gate.release.wait(10)
        self.order += items
        return [len(items)] * len(items)

    async def seen(self, _: list[Any]) -> list[Any]:
        return [self.order] * len(_)

    async def double(self, xs: list[int], plus: list[int] | None = None) -> list[int]:
        return [2 * x + (plus[i] if plus else 0) for i, x in enumerate(xs)]

    async def some_bad(self, xs: list[int]) -> list[Any]:
        return [ValueError(f"bad {x}") if x % 2 else x for x in xs]

    def short(self, xs: list[int]) -> list[int]:
        return xs[1:]

    async def items(self, xs: list[int]) -> Any:
        yield xs


async def echo(requests: list[Any]) -> list[Any]:
    await asyncio.sleep(0.01)
    return [{"n": await request.json(), "of": len(requests)} for request in requests]


def url(address: Address, path: str = "/") -> str:
    return f"http://{address[0]}:{address[1]}{path}"


def together(count: int, call: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(call, range(count)))


def test_http_requests_of_many_clients_are_one_call_and_each_gets_its_own_answer() -> None:
    with ours(echo, max_batch_size=16, batch_wait_timeout_s=0.005) as address:
        answers = together(48, lambda n: requests.post(url(address), json=n, timeout=10).json())
        assert [answer["n"] for answer in answers] == list(range(48))
        assert max(answer["of"] for answer in answers) > 1
        assert max(answer["of"] for answer in answers) <= 16


def test_large_bodies_travel_in_batches_too() -> None:
    with ours(echo, max_batch_size=4, batch_wait_timeout_s=30.0) as address:
        answers = together(4, lambda n: requests.post(url(address), json=["x" * 300_000, n], timeout=10).json())
        assert [answer["n"][1] for answer in answers] == [0, 1, 2, 3]
        assert {len(answer["n"][0]) for answer in answers} == {300_000}
        assert {answer["of"] for answer in answers} == {4}


def test_calls_that_wait_for_a_slot_go_together_in_order() -> None:
    with called(Sizes, max_batch_size=8) as (handle, replica):
        first = handle.remote("first")
        assert gate.entered.wait(10)
        waiting = [handle.remote(n) for n in range(11)]
        gate.release.set()
        assert first.result(timeout_s=10) == 1
        assert [response.result(timeout_s=10) for response in waiting] == [8] * 8 + [3] * 3
        assert handle.seen.remote(None).result(timeout_s=10) == ["first", *range(11)]
        assert replica.runtime.counters()["running"] == 0
        tally = json.loads(caller.current().client.batches())["app#D"]
        assert (tally["batches"], tally["requests"]) == (4, 13)
        assert tally["released"] == {"full": 1, "waited": 3}


def test_a_window_ends_by_itself_whoever_waits() -> None:
    with called(Sizes, max_batch_size=8, batch_wait_timeout_s=0.3) as (handle, _):
        gate.entered.set()

        async def gather() -> list[Any]:
            return await asyncio.gather(*(handle.remote(n) for n in range(3)))

        def thread() -> Any:
            return [response.result(timeout_s=10) for response in [handle.remote(n) for n in range(3)]]

        for wait in (lambda: asyncio.run(gather()), thread):
            began = time.monotonic()
            assert wait() == [3, 3, 3]
            assert 0.3 <= time.monotonic() - began < 5
        forgotten = [handle.remote(n) for n in range(3)]  # nobody waits for these
        wait_for(lambda: all(response._call.ready() for response in forgotten), 10)


def test_each_parameter_is_a_list_of_its_own() -> None:
    with called(Sizes, max_batch_size=8, batch_wait_timeout_s=0.05) as (handle, _):
        plain = [handle.double.remote(n) for n in range(3)]
        more = [handle.double.remote(n, plus=n) for n in range(3)]
        assert [response.result(timeout_s=10) for response in plain] == [0, 2, 4]
        assert [response.result(timeout_s=10) for response in more] == [0, 3, 6]


def test_one_bad_item_fails_alone() -> None:
    with called(Sizes, max_batch_size=4, batch_wait_timeout_s=0.05) as (handle, _):
        good, bad = handle.some_bad.remote(0), handle.some_bad.remote(1)
        assert good.result(timeout_s=10) == 0
        with pytest.raises(ValueError, match="bad 1"):
            bad.result(timeout_s=10)


def test_a_wrong_length_names_both() -> None:
    with called(Sizes, max_batch_size=2, batch_wait_timeout_s=30.0) as (handle, _):
        for response in [handle.short.remote(n) for n in range(2)]:
            with pytest.raises(Exception, match="input list has length 2 but the returned list has length 1"):
                response.result(timeout_s=10)


def test_generators_cannot_be_called_in_batches() -> None:
    with called(Sizes, max_batch_size=2) as (handle, _):
        with pytest.raises(TypeError, match="max_batch_size"):
            list(handle.options(stream=True).items.remote(1))
        with pytest.raises(TypeError, match="generator"):
            handle.items.remote(1).result(timeout_s=10)


def test_a_call_that_is_cancelled_while_it_waits_is_left_out() -> None:
    with called(Sizes, max_batch_size=8) as (handle, _):
        first = handle.remote("first")
        assert gate.entered.wait(10)
        waiting = [handle.remote(n) for n in range(3)]
        waiting[1].cancel()
        gate.release.set()
        assert first.result(timeout_s=10) == 1
        assert [waiting[at].result(timeout_s=10) for at in (0, 2)] == [2, 2]
        with pytest.raises(RequestCancelledError):
            waiting[1].result(timeout_s=10)
        assert handle.seen.remote(None).result(timeout_s=10) == ["first", 0, 2]


def test_max_queued_requests_does_not_count_those_that_a_free_slot_will_take() -> None:
    options = {"max_batch_size": 2, "batch_wait_timeout_s": 30.0, "max_queued_requests": 1}
    with called(Sizes, **options) as (handle, _):
        filling = [handle.remote(0)]
        wait_for(lambda: caller.current().client.counters()["links"], 10)
        filling.append(handle.remote(1))
        assert gate.entered.wait(10)
        waits = handle.remote(2)
        with pytest.raises(BackPressureError, match="num_queued_requests=1, max_queued_requests=1"):
            handle.remote(3).result(timeout_s=10)
        gate.release.set()
        assert [response.result(timeout_s=10) for response in filling] == [2, 2]
        waits.cancel()


def test_answers_of_a_batch_may_be_arguments_of_other_calls() -> None:
    with called(Sizes, max_batch_size=8, batch_wait_timeout_s=0.02) as (handle, _):
        doubled = [handle.double.remote(n) for n in range(4)]
        again = [handle.double.remote(response) for response in doubled]
        assert [response.result(timeout_s=10) for response in again] == [0, 4, 8, 12]


def test_many_threads_and_a_loop_lose_no_call() -> None:
    with called(Sizes, max_batch_size=7, batch_wait_timeout_s=0.001, max_concurrent_batches=2) as (handle, replica):
        gate.entered.set()

        async def gather(base: int) -> list[int]:
            return await asyncio.gather(*(handle.double.remote(base + n) for n in range(200)))

        def work(base: int) -> list[int]:
            if base % 2:
                return asyncio.run(gather(base))
            return [handle.double.remote(base + n).result(timeout_s=20) for n in range(200)]

        answers = together(6, work)
        assert answers == [[2 * (base + n) for n in range(200)] for base in range(6)]
        assert replica.runtime.counters()["running"] == 0
