"""`serve.batch` around an async generator: each caller has a stream of its own. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


async def gather(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


@serve.batch(max_batch_size=3, batch_wait_timeout_s=0.01)
async def count(numbers: list[int]) -> AsyncGenerator[list[Any], None]:
    for at in range(max(numbers)):
        await asyncio.sleep(0)
        yield [at if at < number else StopIteration for number in numbers]


@pytest.mark.parametrize("numbers", [(3, 3, 3), (1, 4, 2), (0, 2), (5,)])
def test_each_caller_gets_its_own_items_until_its_end(numbers: tuple[int, ...]) -> None:
    async def main() -> list[Any]:
        return await gather(*(collect(count(number)) for number in numbers))

    assert asyncio.run(main()) == [list(range(number)) for number in numbers]


def test_methods_and_bare_decorators_stream_too() -> None:
    class Speaker:
        @serve.batch
        async def speak(self, words: list[str]) -> AsyncGenerator[list[Any], None]:
            yield words
            yield (StopAsyncIteration, *(word + "!" for word in words[1:]))
            yield words

    async def main() -> list[Any]:
        speaker = Speaker()
        return await gather(*(collect(speaker.speak(word)) for word in "abc"))

    assert asyncio.run(main()) == [["a"], ["b", "b!", "b"], ["c", "c!", "c"]]


def test_calls_are_queued_when_they_are_made_not_when_they_are_read() -> None:
    async def main() -> None:
        streams = [count(2), count(2), count(2)]
        for stream in streams:
            assert await asyncio.wait_for(collect(stream), 5) == [0, 1]

    asyncio.run(main())


def test_an_error_comes_after_the_items_and_to_all_who_still_take_part() -> None:
    @serve.batch(max_batch_size=3)
    async def failing(items: list[int]) -> AsyncGenerator[list[Any], None]:
        yield [StopIteration, *items[1:]]
        raise KeyError("broken")

    async def read(stream: Any) -> list[Any]:
        seen: list[Any] = []
        try:
            async for item in stream:
                seen.append(item)
                await asyncio.sleep(0.01)  # the error is there already
        except KeyError as error:
            seen.append(error)
        return seen

    async def main() -> None:
        first, second, third = await gather(*(read(failing(item)) for item in range(3)))
        assert (first, second[0], third[0]) == ([], 1, 2)
        assert second[1] is third[1]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("yielded", "error"), [([1], RayServeException), ([1, 2, 3], RayServeException), (7, TypeError)]
)
def test_a_yield_of_the_wrong_length_ends_the_generator(yielded: Any, error: type[Exception]) -> None:
    closed: list[bool] = []

    @serve.batch(max_batch_size=2)
    async def wrong(items: list[int]) -> AsyncGenerator[Any, None]:
        try:
            yield items
            yield yielded
        finally:
            closed.append(True)

    async def main() -> None:
        streams = wrong(1), wrong(2)
        assert [await anext(stream) for stream in streams] == [1, 2]
        for outcome in await gather(*map(anext, streams)):
            assert type(outcome) is error
        assert closed == [True]

    asyncio.run(main())


def test_who_leaves_gets_nothing_more_and_the_others_everything() -> None:
    async def main() -> None:
        leaving, staying = count(3), count(3)
        assert await anext(leaving) == 0
        await leaving.aclose()
        assert await collect(staying) == [0, 1, 2]

    asyncio.run(main())


def test_a_stream_that_nobody_reads_keeps_no_items() -> None:
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    go_on = asyncio.Event()

    @serve.batch(max_batch_size=2)
    async def endless(items: list[int]) -> AsyncGenerator[list[Any], None]:
        for _ in range(100):
            yield [Item() for _ in items]
        await go_on.wait()

    async def main() -> None:
        begun, unread = endless(1), endless(2)
        await anext(begun)
        assert Item.alive > 100
        await begun.aclose()
        del unread
        gc.collect()
        assert Item.alive <= 2, "the last ones may be on their way"
        go_on.set()

    asyncio.run(main())


def test_a_cancelled_reader_leaves_the_queue() -> None:
    async def main() -> None:
        batches: list[list[int]] = []

        @serve.batch(max_batch_size=2, batch_wait_timeout_s=60)
        async def stream(items: list[int]) -> AsyncGenerator[list[int], None]:
            batches.append(items)
            yield items

        reader = asyncio.ensure_future(collect(stream(1)))
        await asyncio.sleep(0)
        assert stream._get_metrics()["serve_batch_queue_length"] == 1
        reader.cancel()
        assert await gather(collect(stream(2)), collect(stream(3))) == [[2], [3]]
        assert batches == [[2, 3]]

    asyncio.run(main())


def test_items_are_any_objects() -> None:
    """Ray Serve compares them with the sentinels, which arrays do not like."""
    import numpy

    @serve.batch(max_batch_size=2)
    async def arrays(items: list[int]) -> AsyncGenerator[list[Any], None]:
        yield [numpy.arange(item) for item in items]

    async def main() -> list[Any]:
        return await gather(collect(arrays(2)), collect(arrays(3)))

    assert [[list(array) for array in stream] for stream in asyncio.run(main())] == [[[0, 1]], [[0, 1, 2]]]
