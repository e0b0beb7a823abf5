"""Streams between deployments, on real replicas and in local testing mode, with the same items."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from composed import Refused, Run
from deployed import wait_for

from rayserve_fast import serve
from rayserve_fast.exceptions import RequestCancelledError
from rayserve_fast.handle import DeploymentHandle


@serve.deployment(max_ongoing_requests=20)
class Stream:
    def __init__(self) -> None:
        self.made = 0
        self.ended: list[str] = []

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    def count_sync(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def fails(self, after: int) -> AsyncIterator[int]:
        for i in range(after):
            yield i
        raise Refused("in the middle", 7)

    async def arrays(self, n: int) -> AsyncIterator[Any]:
        for i in range(n):
            self.made += 1
            yield np.full(64 << 10, i, np.uint8)

    def arrays_sync(self, n: int) -> Iterator[Any]:
        for i in range(n):
            self.made += 1
            yield np.full(64 << 10, i, np.uint8)

    async def for_ever(self) -> AsyncIterator[int]:
        try:
            while True:
                self.made += 1
                yield self.made
                await asyncio.sleep(0.001)
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise

    async def plain(self) -> int:
        return 1

    async def ahead(self, n: int) -> AsyncIterator[int]:
        for self.made in range(n):
            yield self.made
        await asyncio.sleep(60)

    async def how_far(self) -> int:
        return self.made

    async def state(self) -> tuple[int, list[str]]:
        return self.made, self.ended


@serve.deployment(max_ongoing_requests=20)
class Relay:
    """Passes on the items of another deployment's stream."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model.options(stream=True)

    async def count(self, n: int) -> AsyncIterator[int]:
        async for i in self.model.count.remote(n):
            yield 10 * i

    def count_sync(self, n: int) -> Iterator[int]:
        for i in self.model.count_sync.remote(n):
            yield 10 * i

    async def fails(self, after: int) -> AsyncIterator[int]:
        async for i in self.model.fails.remote(after):
            yield i


def collected(generator: Any) -> list[Any]:
    async def main() -> list[Any]:
        return [item async for item in generator]

    return asyncio.run(main())


@pytest.mark.parametrize("method", ["count", "count_sync"])
@pytest.mark.parametrize("taken", [list, collected])
def test_items_stream_through_two_deployments(run: Run, method: str, taken: Any) -> None:
    handle = run(Relay.bind(Stream.bind())).options(stream=True, method_name=method)
    assert taken(handle.remote(500)) == [10 * i for i in range(500)]


def test_an_error_comes_after_the_items_that_were_made(run: Run) -> None:
    items, got = run(Relay.bind(Stream.bind())).options(stream=True).fails.remote(3), []
    with pytest.raises(Refused, match="in the middle"):
        got.extend(items)
    assert got == [0, 1, 2]


def test_streaming_and_plain_calls_are_told_apart(run: Run) -> None:
    handle = run(Stream.bind())
    with pytest.raises(TypeError, match="did not return a generator"):
        next(handle.options(stream=True).plain.remote())
    with pytest.raises(TypeError, match=r"You must use `handle.options\(stream=True\)`"):
        handle.count.remote(1).result(timeout_s=20)
    items = handle.options(stream=True).count.remote(1)
    with pytest.raises(TypeError):
        items.result()
    assert list(items) == [0]


@pytest.mark.parametrize("method", ["arrays", "arrays_sync"])
def test_a_stream_that_is_not_read_does_not_run_ahead(run: Run, method: str) -> None:
    handle = run(Stream.bind())
    items = handle.options(stream=True, method_name=method).remote(100)
    assert next(items)[0] == 0
    time.sleep(0.3)
    assert handle.state.remote().result(timeout_s=20)[0] < 20
    assert [int(item[0]) for item in items] == list(range(1, 100))


def test_cancelling_a_stream_reaches_its_generator(run: Run) -> None:
    handle = run(Stream.bind())
    items = handle.options(stream=True).for_ever.remote()
    assert [next(items), next(items)] == [1, 2]
    items.cancel()
    with pytest.raises(RequestCancelledError):
        list(items)
    wait_for(lambda: handle.state.remote().result(timeout_s=20)[1] == ["CancelledError"], 10)


@pytest.mark.parametrize("taken", [0, 1])
def test_a_cancelled_stream_gives_no_more_items(run: Run, taken: int) -> None:
    handle = run(Stream.bind(), route_prefix=None)

    def ahead() -> Any:
        items = handle.options(stream=True).ahead.remote(10)
        wait_for(lambda: handle.how_far.remote().result(timeout_s=20) == 9)
        for i in range(taken):
            assert next(items) == i
        items.cancel()
        return items

    with pytest.raises(RequestCancelledError):
        next(items := ahead())
    assert list(items) == []
    with pytest.raises(RequestCancelledError):
        asyncio.run(anext(ahead()))
