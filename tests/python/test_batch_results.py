"""What `serve.batch` does with what the function returns or raises. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return asyncio.run if request.param == "asyncio" else uvloop.run


async def gather(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("returned", [[1], (1, 2, 3), "abcd"])
def test_a_result_of_the_wrong_length_names_both_lengths(returned: Any) -> None:
    @serve.batch(max_batch_size=2)
    async def function(items: list[int]) -> Any:
        return returned

    for error in asyncio.run(gather(function(1), function(2))):
        assert isinstance(error, RayServeException)
        assert "Batched function doesn't preserve batch size." in str(error)
        assert f"The input list has length 2 but the returned list has length {len(returned)}." in str(error)


@pytest.mark.parametrize("returned", [(1, 2), {3: 0, 4: 0}.keys()])
def test_any_sized_iterable_will_do(returned: Any) -> None:
    @serve.batch(max_batch_size=2)
    async def function(items: list[int]) -> Any:
        return returned

    assert asyncio.run(gather(function(0), function(0))) == list(returned)


@pytest.mark.parametrize("returned", [None, 5])
def test_a_result_without_length_is_a_type_error(returned: Any) -> None:
    @serve.batch(max_batch_size=2)
    async def function(items: list[int]) -> Any:
        return returned

    assert {type(error) for error in asyncio.run(gather(function(1), function(2)))} == {TypeError}


def test_all_callers_get_the_same_exception_and_the_next_batch_runs(run: Any) -> None:
    @serve.batch(max_batch_size=3)
    async def function(items: list[int]) -> list[int]:
        if 0 in items:
            raise KeyError("zero")
        return items

    async def main() -> None:
        errors = await gather(*map(function, range(3)))
        assert {id(error) for error in errors} == {id(errors[0])}
        assert isinstance(errors[0], KeyError)
        depth = len(inspect.getinnerframes(errors[0].__traceback__))
        assert depth <= 3, "each caller has added its own frames to the traceback of the others"
        assert await gather(*map(function, range(1, 4))) == [1, 2, 3]

    run(main())


def test_an_exception_among_the_results_is_a_result() -> None:
    @serve.batch(max_batch_size=2)
    async def function(items: list[int]) -> list[Any]:
        return [ValueError("one"), 2]

    async def main() -> None:
        first, second = await asyncio.gather(function(1), function(2))
        assert (type(first), second) == (ValueError, 2)

    asyncio.run(main())


def test_a_function_that_raises_before_it_suspends_fails_only_its_batch() -> None:
    class Failing:
        def __init__(self) -> None:
            self.batches = 0

        @serve.batch(max_batch_size=1)
        async def call(self, items: list[int]) -> list[int]:
            self.batches += 1
            if self.batches == 1:
                raise ZeroDivisionError
            await asyncio.sleep(0)
            return items

    failing = Failing()
    first, second = asyncio.run(gather(failing.call(1), failing.call(2)))
    assert (type(first), second) == (ZeroDivisionError, 2)


@pytest.mark.parametrize("suspends", [False, True])
def test_a_caller_that_leaves_the_loop_takes_nobody_along(suspends: bool) -> None:
    """`SystemExit` of one caller ends `run_until_complete`, as anywhere; batch, slot and the other callers go on."""
    exits = iter([True])

    @serve.batch(max_batch_size=3)
    async def function(items: list[int]) -> list[int]:
        if suspends:
            await asyncio.sleep(0)
        return items

    async def caller(item: int) -> int:
        result = await function(item)
        if item == 1 and next(exits, False):
            raise SystemExit
        return result

    loop = asyncio.new_event_loop()
    first = [loop.create_task(caller(item)) for item in range(3)]
    with pytest.raises(SystemExit):
        loop.run_until_complete(asyncio.wait(first))
    loop.run_until_complete(asyncio.wait(first))
    assert isinstance(first[1].exception(), SystemExit)
    assert (first[0].result(), first[2].result()) == (0, 2)
    for _ in range(3):  # the slot is free, and there is still only one
        assert loop.run_until_complete(gather(*map(caller, range(3)))) == [0, 1, 2]
    loop.close()


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, KeyboardInterrupt])
def test_whatever_a_batch_raises_its_callers_hear_of_it(error: type[BaseException]) -> None:
    raises = iter([True])

    @serve.batch(max_batch_size=2)
    async def function(items: list[int]) -> list[int]:
        if next(raises, False):
            raise error
        return items

    async def caller(item: int) -> str:
        try:
            return str(await function(item))
        except BaseException as raised:
            return type(raised).__name__

    async def main() -> None:
        assert await gather(caller(1), caller(2)) == [error.__name__] * 2
        assert await gather(caller(1), caller(2)) == ["1", "2"]

    asyncio.run(main())
