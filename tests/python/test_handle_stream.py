"""Streaming calls over real frames: order, errors, windows, cancellation, both kinds of generators on both sides."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from deployed import wait_for
from handle_replica import called
from ray.exceptions import RayTaskError
from worker_replica import Replica

from rayserve_fast import caller
from rayserve_fast.exceptions import RayServeException, RequestCancelledError
from rayserve_fast.handle import DeploymentHandle, DeploymentResponseGenerator


class Streams:
    def __init__(self) -> None:
        self.produced = 0
        self.ended: list[str] = []

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    def count_sync(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def returned(self, n: int) -> Any:
        return self.count(n)

    async def returned_sync(self, n: int) -> Any:
        return self.count_sync(n)

    def returned_by_sync(self, n: int) -> Any:
        return self.count(n)

    async def slowly(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0.01)
            yield i

    async def fails(self, after: int) -> AsyncIterator[int]:
        for i in range(after):
            yield i
        raise KeyError("in the middle")

    def fails_sync(self, after: int) -> Iterator[int]:
        yield from range(after)
        raise KeyError("in the middle")

    async def unpicklable(self) -> AsyncIterator[Any]:
        yield 1
        yield threading.Lock()

    async def large(self, n: int, size: int) -> AsyncIterator[Any]:
        try:
            for i in range(n):
                self.produced = i + 1
                yield np.full(size, i % 256, np.uint8)
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise

    def large_sync(self, n: int, size: int) -> Iterator[Any]:
        try:
            for i in range(n):
                self.produced = i + 1
                yield np.full(size, i % 256, np.uint8)
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise

    async def given(self, items: list[Any]) -> AsyncIterator[Any]:
        for item in items:
            yield item

    def given_sync(self, items: list[Any]) -> Iterator[Any]:
        yield from items

    async def for_ever(self) -> AsyncIterator[int]:
        i = 0
        try:
            while True:
                await asyncio.sleep(0.001)
                yield (i := i + 1)
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise

    def plain(self) -> int:
        return 1

    async def plain_async(self) -> int:
        return 1


LARGE = 64 * 1024  # from here on a payload has its own memory, which what is decoded refers to

Pair = tuple[DeploymentHandle, Replica]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with called(Streams) as pair:
        yield pair


@pytest.fixture
def streams(pair: Pair) -> Iterator[DeploymentHandle]:
    handle, replica = pair
    user(replica).produced = 0
    user(replica).ended.clear()
    yield handle.options(stream=True)
    wait_for(lambda: idle(pair), 10)


def user(replica: Replica) -> Streams:
    assert replica.runtime._user is not None
    return replica.runtime._user.target  # type: ignore[no-any-return]


def idle(pair: Pair) -> bool:
    counters = pair[1].runtime.counters()
    return (
        counters["running"] == counters["held"] == counters["streams"] == 0
        and caller.current().client.counters()["outstanding"] == 0
    )


def in_loop(generator: DeploymentResponseGenerator) -> list[Any]:
    async def collect() -> list[Any]:
        return [item async for item in generator]

    return asyncio.run(collect())


KINDS = ["count", "count_sync", "returned", "returned_sync", "returned_by_sync"]


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("taken", [list, in_loop])
@pytest.mark.parametrize("n", [0, 1, 20_000])
def test_items_come_in_order_whatever_makes_and_whatever_takes_them(
    streams: DeploymentHandle, method: str, taken: Any, n: int
) -> None:
    assert taken(getattr(streams, method).remote(n)) == list(range(n))


@pytest.mark.parametrize("method", ["given", "given_sync"])
@pytest.mark.parametrize("taken", [list, in_loop])
def test_items_of_every_size_and_kind_arrive(streams: DeploymentHandle, method: str, taken: Any) -> None:
    lengths = [0, 1, LARGE - 64, LARGE - 1, LARGE, 3 * LARGE, 3_000_000]
    items = [whole for n in lengths for whole in (b"b" * n, "s" * n, ["x"] * (n // 2), bytearray(n))]
    assert taken(getattr(streams, method).remote(items)) == items


def test_an_item_is_there_before_the_next_is_made(streams: DeploymentHandle) -> None:
    items = streams.for_ever.remote()
    assert [next(items) for _ in range(5)] == [1, 2, 3, 4, 5]
    items.cancel()


@pytest.mark.parametrize("method", ["fails", "fails_sync"])
@pytest.mark.parametrize("after", [0, 3])
def test_an_error_comes_behind_the_items_that_were_made(streams: DeploymentHandle, method: str, after: int) -> None:
    items, got = getattr(streams, method).remote(after), []
    with pytest.raises(KeyError, match="in the middle") as caught:
        got.extend(items)
    assert got == list(range(after))
    assert isinstance(caught.value, RayTaskError)


def test_an_item_that_cannot_be_pickled_ends_the_stream(streams: DeploymentHandle) -> None:
    items = streams.unpicklable.remote()
    assert next(items) == 1
    with pytest.raises(TypeError, match="cannot be sent"):
        next(items)


@pytest.mark.parametrize("method", ["plain", "plain_async"])
def test_a_plain_method_is_refused_with_stream(streams: DeploymentHandle, method: str) -> None:
    with pytest.raises(TypeError, match=f"Called method '{method}' with `handle.options.stream=True.` but it did not"):
        next(getattr(streams, method).remote())


@pytest.mark.parametrize("method", KINDS)
def test_a_generator_is_refused_without_stream(pair: Pair, method: str) -> None:
    with pytest.raises(TypeError, match=r"You must use `handle.options.stream=True.` to call generators"):
        getattr(pair[0], method).remote(1).result()


def test_a_missing_method_says_which_there_are(streams: DeploymentHandle) -> None:
    with pytest.raises(RayServeException, match="Tried to call a method 'nothing' that does not exist"):
        next(streams.nothing.remote())


@pytest.mark.parametrize("method", ["large", "large_sync"])
def test_a_slow_consumer_suspends_the_producer(pair: Pair, streams: DeploymentHandle, method: str) -> None:
    items = getattr(streams, method).remote(200, 16 * 1024)
    assert next(items)[0] == 0
    wait_for(lambda: user(pair[1]).produced > 10, 10)
    time.sleep(0.1)
    # One window on the way, one in the hands of the consumer, and the item that overdraws.
    assert user(pair[1]).produced <= 2 * 256 // 16 + 2
    assert [int(item[0]) for item in items] == [i % 256 for i in range(1, 200)]


@pytest.mark.parametrize("method", ["large", "large_sync"])
@pytest.mark.parametrize("taken", [list, in_loop])
def test_items_larger_than_the_window_travel(streams: DeploymentHandle, method: str, taken: Any) -> None:
    items = taken(getattr(streams, method).remote(5, 1 << 20))
    assert [(len(item), int(item[-1])) for item in items] == [(1 << 20, i) for i in range(5)]


def test_cancel_reaches_a_generator_that_waits(pair: Pair, streams: DeploymentHandle) -> None:
    items = streams.for_ever.remote()
    next(items)
    items.cancel()
    with pytest.raises(RequestCancelledError):
        list(items)
    wait_for(lambda: user(pair[1]).ended, 10)
    assert user(pair[1]).ended == ["CancelledError"]
    assert items.cancelled()


@pytest.mark.parametrize(("method", "error"), [("large", "CancelledError"), ("large_sync", "GeneratorExit")])
def test_cancel_reaches_a_generator_whose_window_is_full(
    pair: Pair, streams: DeploymentHandle, method: str, error: str
) -> None:
    items = getattr(streams, method).remote(1000, 64 * 1024)
    wait_for(lambda: user(pair[1]).produced > 3, 10)
    time.sleep(0.02)
    items.cancel()
    wait_for(lambda: user(pair[1]).ended, 10)
    assert user(pair[1]).ended == [error]


@pytest.mark.parametrize("method", ["large", "large_sync"])
def test_a_dropped_stream_runs_to_its_end(pair: Pair, streams: DeploymentHandle, method: str) -> None:
    items = getattr(streams, method).remote(100, 64 * 1024)
    next(items)
    del items
    gc.collect()
    wait_for(lambda: user(pair[1]).produced == 100, 10)


def test_a_timeout_of_one_item_loses_nothing(streams: DeploymentHandle) -> None:
    async def collect() -> list[int]:
        items, got = streams.slowly.remote(5), []
        while True:
            try:
                got.append(await asyncio.wait_for(items.__anext__(), 0.003))
            except asyncio.TimeoutError:
                continue
            except StopAsyncIteration:
                return got

    assert asyncio.run(collect()) == [0, 1, 2, 3, 4]


def test_many_streams_at_once(streams: DeploymentHandle) -> None:
    async def one(i: int) -> list[int]:
        method = [streams.count, streams.count_sync, streams.slowly][i % 3]
        return [item async for item in method.remote(i)]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(one, range(40)))

    assert asyncio.run(all_of_them()) == [list(range(i)) for i in range(40)]


def test_a_stream_is_no_single_answer(streams: DeploymentHandle) -> None:
    items = streams.count.remote(1)
    with pytest.raises(TypeError):
        items.result()

    async def awaited() -> None:
        await items

    with pytest.raises(TypeError):
        asyncio.run(awaited())
    assert list(items) == [0]


def test_sync_iteration_is_refused_on_a_loops_own_thread(streams: DeploymentHandle) -> None:
    items = streams.count.remote(1)

    async def iterate() -> None:
        with pytest.raises(RuntimeError, match="asyncio"):
            next(items)

    asyncio.run(iterate())
    assert list(items) == [0]
