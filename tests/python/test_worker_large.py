"""Large values of calls: they leave room on their link for small ones, and arrive whole, in order and once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import wire_client as wire
from handle_replica import called
from worker_replica import serving

PIECE = 34
MIB = 1 << 20


class Values:
    def __init__(self) -> None:
        self.array = np.arange(16 * MIB, dtype=np.uint8)

    async def large(self, size: int) -> Any:
        return self.array[:size]

    async def small(self) -> str:
        return "small"

    def in_a_thread(self, size: int) -> Any:
        return self.array[:size]

    def items_of_a_thread(self, sizes: list[int], fail: bool) -> Iterator[Any]:
        for size in sizes:
            yield self.array[:size]
        if fail:
            raise KeyError("behind the items")

    async def items(self, sizes: list[int], fail: bool) -> AsyncIterator[Any]:
        for size in sizes:
            yield self.array[:size]
        if fail:
            raise KeyError("behind the items")


@pytest.fixture(scope="module")
def replica() -> Any:
    with serving(Values, max_ongoing_requests=100) as replica:
        yield replica


def test_a_small_result_overtakes_a_large_one(replica: Any) -> None:
    link = replica.link()
    link.call(1, "large", 16 * MIB)
    link.call(2, "small")
    frames = []
    while not frames or not (frames[-1].stream == 1 and frames[-1].fin):
        frames.append(link.frame())
    small = next(at for at, frame in enumerate(frames) if frame.stream == 2)
    ahead = sum(len(frame.payload) for frame in frames[:small])
    assert wire.value(frames[small].payload) == "small"
    assert ahead <= 5 * MIB  # what the kernel had taken before it was asked for, and a piece or two
    large = [frame for frame in frames if frame.stream == 1]
    assert {frame.kind for frame in large[:-1]} == {PIECE}
    payload = b"".join(frame.payload for frame in large)
    assert {frame.aux for frame in large[:-1]} == {len(payload)}
    assert (wire.value(payload) == np.arange(16 * MIB, dtype=np.uint8)).all()


def test_a_small_result_overtakes_those_of_a_mib_that_wait(replica: Any) -> None:
    link = replica.link()
    for stream in range(1, 17):
        link.call(stream, "large", MIB)
    link.call(17, "small")
    kinds = []
    while len(kinds) < 17:
        frame = link.frame()
        kinds.append((frame.kind, frame.stream))
    assert {kind for kind, _ in kinds} == {wire.RESULT}, "a value of a MiB travels whole"
    assert [stream for _, stream in kinds].index(17) <= 8  # not the last, behind what the kernel had taken
    assert sorted(stream for _, stream in kinds) == list(range(1, 18))


@pytest.mark.parametrize("size", [MIB, 2 * MIB - 100, 2 * MIB + 1, 5 * MIB + 7, 16 * MIB])
@pytest.mark.parametrize("method", ["large", "in_a_thread"])
def test_values_of_any_size_arrive_whole_and_writable(size: int, method: str) -> None:
    with called(Values) as (handle, _):
        for _ in range(3):
            value = handle.options(method_name=method).remote(size).result(timeout_s=30)
            assert value.size == size
            assert (value == np.arange(size, dtype=np.uint8)).all()
            value[0] = 1


@pytest.mark.parametrize("method", ["items", "items_of_a_thread"])
@pytest.mark.parametrize("fail", [False, True])
def test_items_keep_their_order_behind_a_large_one(method: str, fail: bool) -> None:
    sizes = [10, 3 * MIB, 10, 100_000, 5 * MIB, 0, 10]
    with called(Values) as (handle, _):
        got = []
        try:
            for item in handle.options(method_name=method, stream=True).remote(sizes, fail):
                got.append(item.size)
        except KeyError:
            assert fail
        else:
            assert not fail
        assert got == sizes


def test_cancelling_in_the_middle_of_large_values_leaves_a_link_that_works() -> None:
    with called(Values, max_ongoing_requests=100) as (handle, replica):

        async def storm() -> None:
            for round_ in range(20):
                responses = [handle.large.remote(8 * MIB) for _ in range(4)]
                stream = handle.options(stream=True).items.remote([3 * MIB] * 10, False)
                await asyncio.sleep(0.001 * (round_ % 5))
                stream.cancel()
                for response in responses:
                    response.cancel()
            assert await handle.small.remote() == "small"
            assert (await handle.large.remote(4 * MIB)).size == 4 * MIB

        asyncio.run(storm())
        assert replica.runtime.counters()["running"] == 0
