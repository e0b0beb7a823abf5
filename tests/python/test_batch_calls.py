"""`serve.batch` as a decorator: what it accepts, how it is called, what callers get. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import weakref
from collections.abc import Callable, Coroutine
from functools import partial, wraps
from typing import Any

import pytest
import uvloop
from ray import cloudpickle

from rayserve_fast import serve


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return asyncio.run if request.param == "asyncio" else uvloop.run


@serve.batch
async def upper(texts: list[str]) -> list[str]:
    return [f"{text.upper()}{len(texts)}" for text in texts]


@serve.batch(max_batch_size=3, batch_wait_timeout_s=5)
async def add(left: list[int], right: list[int], *, scale: list[int]) -> list[int]:
    assert {type(column) for column in (left, right, scale)} == {list}
    return [(a + b) * c for a, b, c in zip(left, right, scale, strict=True)]


async def gather(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def test_calls_run_together_and_each_gets_its_own_result(run: Any) -> None:
    assert run(gather(upper("a"), upper("b"), upper("c"))) == ["A3", "B3", "C3"]


def test_each_parameter_is_a_list_of_its_own(run: Any) -> None:
    calls = add(1, 2, scale=3), add(left=1, right=2, scale=4), add(1, right=5, scale=6)
    assert run(gather(*calls)) == [9, 12, 36]


def test_calls_that_give_other_parameters_cannot_share_a_batch(run: Any) -> None:
    @serve.batch(max_batch_size=2)
    async def function(items: list[int], flag: list[bool] | None = None) -> list[int]:
        return items

    errors = run(gather(function(1), function(2, True)))
    assert [type(error) for error in errors] == [TypeError] * 2
    assert "function" in str(errors[0])
    assert "same parameters" in str(errors[0])
    assert run(gather(function(1), function(2))) == [1, 2]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: upper(), "missing"),
        (lambda: upper("a", "b"), "too many"),
        (lambda: upper("a", other=1), "unexpected keyword"),
        (lambda: add(1, 2), "missing"),
    ],
)
def test_arguments_that_the_function_does_not_take_fail_their_call_alone(call: Any, text: str) -> None:
    bad, good = asyncio.run(gather(call(), upper("x")))
    assert isinstance(bad, TypeError)
    assert text in str(bad)
    assert good == "X1"


class Model:
    def __init__(self, bias: int = 0) -> None:
        self.bias = bias
        self.seen: list[list[int]] = []

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.01)
    async def predict(self, items: list[int]) -> list[int]:
        self.seen.append(items)
        return [item + self.bias for item in items]

    @staticmethod
    @serve.batch
    async def static(items: list[Any]) -> list[Any]:
        return [(item, len(items)) for item in items]

    @classmethod
    @serve.batch
    async def of_class(cls, items: list[Any]) -> list[Any]:
        return [(cls.__name__, item) for item in items]

    @serve.batch
    async def __call__(self, items: list[int]) -> list[int]:
        return [item * 10 + self.bias for item in items]


class Derived(Model):
    async def predict(self, item: int) -> int:  # type: ignore[override]
        return 100 + await super().predict(item)


def test_methods_are_called_on_their_object(run: Any) -> None:
    model = Model(bias=1)

    async def main() -> None:
        assert await gather(*map(model.predict, range(4))) == [1, 2, 3, 4]
        assert model.seen == [[0, 1, 2, 3]]
        assert await gather(Model.static(1), model.static(2), model.static(model)) == [(1, 3), (2, 3), (model, 3)]
        assert await gather(Model.of_class(1), model.of_class(2)) == [("Model", 1), ("Model", 2)]
        assert await gather(model(1), model(2)) == [11, 21]
        assert await model.predict(items=4) == 5

    run(main())


def test_a_method_that_overrides_may_call_the_one_below() -> None:
    assert asyncio.run(gather(Derived(7).predict(1), Derived(7).predict(2))) == [108, 109]


def test_instances_share_the_queue() -> None:
    first, second = Model(1), Model(2)
    assert asyncio.run(gather(first.predict(1), second.predict(1))) == [2, 2]
    assert (first.seen, second.seen) == ([[1, 1]], [])


def test_a_decorator_around_it_hides_nothing() -> None:
    def logged(function: Any) -> Any:
        @wraps(function)
        async def call(*args: Any) -> Any:
            return await function(*args)

        return call

    class Logged:
        @logged
        @serve.batch
        async def double(self, items: list[int]) -> list[int]:
            assert isinstance(self, Logged)
            return [2 * item for item in items]

    assert asyncio.run(gather(Logged().double(1), Logged().double(2))) == [2, 4]


def test_the_decorated_function_looks_like_the_one_it_is_made_of() -> None:
    assert inspect.iscoroutinefunction(upper)
    assert upper.__name__ == "upper"
    assert list(inspect.signature(upper).parameters) == ["texts"]


def test_a_decorator_below_it_may_hide_that_the_function_is_async() -> None:
    def timed(function: Any) -> Any:  # as `torch.no_grad()` does
        @wraps(function)
        def call(*args: Any) -> Any:
            return function(*args)

        return call

    def spawned(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any) -> Any:
            return asyncio.ensure_future(function(*args))

        return call

    class Timed:
        @serve.batch(max_batch_size=2)
        @timed
        async def double(self, items: list[int]) -> list[int]:
            return [2 * item + len(items) for item in items]

        @serve.batch(max_batch_size=2)
        @spawned
        async def length(self, items: list[int]) -> list[int]:
            return [len(items)] * len(items)

    async def main() -> None:
        assert await gather(Timed().double(1), Timed().double(2)) == [4, 6]
        assert await gather(Timed().length(1), Timed().length(2)) == [2, 2]

    asyncio.run(main())
    with pytest.raises(TypeError, match="async def"):
        serve.batch(timed(upper.__wrapped__))  # as there


@pytest.mark.parametrize("decorate", [serve.batch, serve.batch(max_batch_size=2)])
@pytest.mark.parametrize("function", [lambda items: items, print, 3])
def test_only_async_functions_can_be_decorated(decorate: Any, function: Any) -> None:
    with pytest.raises(TypeError, match=r"@serve\.batch"):
        decorate(function)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_batch_size": "4"}, TypeError),
        ({"max_batch_size": 1.5}, TypeError),
        ({"max_batch_size": 0}, ValueError),
        ({"max_batch_size": -2.0}, ValueError),
        ({"batch_wait_timeout_s": "1"}, TypeError),
        ({"batch_wait_timeout_s": -0.1}, ValueError),
        ({"batch_wait_timeout_s": float("nan")}, ValueError),
        ({"max_concurrent_batches": 0}, TypeError),
        ({"max_concurrent_batches": 1.0}, TypeError),
        ({"max_batch_size": True}, TypeError),
        ({"batch_wait_timeout_s": False}, TypeError),
        ({"max_concurrent_batches": True}, TypeError),
        ({"batch_size_fn": 3}, TypeError),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=name):
        serve.batch(**options)


def test_a_whole_number_may_be_a_float() -> None:
    decorated: Any = serve.batch(max_batch_size=4.0)(upper.__wrapped__)  # type: ignore[arg-type, attr-defined]
    assert decorated._get_max_batch_size() == 4
    assert decorated._get_batch_wait_timeout_s() == 0.01


def test_it_travels_with_the_class_that_uses_it() -> None:
    class Local:
        @serve.batch(max_batch_size=7)
        async def call(self, items: list[int]) -> list[str]:
            return [f"{item} of {len(items)}" for item in items]

    assert asyncio.run(gather(Local().call(0))) == ["0 of 1"]
    Local.call.set_max_batch_size(2)  # type: ignore[attr-defined]
    receiver = (  # cloudpickle gives this process the class that it has
        "import asyncio, pickle, sys\n"
        "Local = pickle.load(sys.stdin.buffer)\n"
        "async def main(): return await asyncio.gather(*map(Local().call, range(3)))\n"
        "print(Local.call._get_max_batch_size(), asyncio.run(main()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", receiver], input=cloudpickle.dumps(Local), stdout=subprocess.PIPE, check=True
    )
    assert told.stdout.decode().strip() == "2 ['0 of 2', '1 of 2', '2 of 1']"


def test_each_loop_has_a_queue_and_a_closed_one_is_forgotten() -> None:
    async def main() -> weakref.ref[Any]:
        assert await upper("x") == "X1"
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(main()) for _ in range(5)]
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1


def test_loops_of_two_threads_do_not_meet() -> None:
    async def ask(name: str) -> list[Any]:
        return await gather(*(upper(name) for _ in range(10)))

    async def main() -> None:
        both = [asyncio.to_thread(asyncio.run, ask(name)) for name in "ab"]
        assert await gather(*both) == [["A10"] * 10, ["B10"] * 10]

    asyncio.run(main())


def test_a_function_that_nobody_holds_is_collected() -> None:
    async def main() -> weakref.ref[Any]:
        @serve.batch
        async def function(items: list[int]) -> list[int]:
            return items

        assert await function(1) == 1
        return weakref.ref(function)

    async def outer() -> None:
        found = await main()
        await asyncio.sleep(0.03)  # the timer of the queue holds it for its window
        gc.collect()
        assert found() is None

    asyncio.run(outer())


def test_it_runs_in_a_task_of_its_own(run: Any) -> None:
    tasks: list[Any] = []

    @serve.batch(max_batch_size=2)
    async def function(items: list[int]) -> list[int]:
        tasks.append(asyncio.current_task())
        async with asyncio.timeout(5) if hasattr(asyncio, "timeout") else _Nothing():
            await asyncio.sleep(0)
        tasks.append(asyncio.current_task())
        return items

    async def caller(item: int) -> Any:
        before = asyncio.current_task()
        await function(item)
        assert asyncio.current_task() is before
        return before

    callers = run(gather(caller(1), caller(2)))
    assert tasks[0] is tasks[1]
    assert tasks[0] not in callers


class _Nothing:
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *error: object) -> None: ...


def test_a_partial_is_a_function() -> None:
    async def scaled(factor: int, items: list[int]) -> list[int]:
        return [factor * item for item in items]

    assert asyncio.run(gather(*map(serve.batch(partial(scaled, 3)), (1, 2)))) == [3, 6]


class Incomparable:
    """A callback that fails whoever compares it."""

    def __call__(self, ticket: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    def __hash__(self) -> int:
        return 0


def test_who_waits_is_answered_though_callbacks_cannot_be_compared(run: Any) -> None:
    async def main() -> None:
        caller = asyncio.ensure_future(upper("a"))
        await asyncio.sleep(0)
        ticket: Any = caller._fut_waiter  # type: ignore[attr-defined]
        ticket.add_done_callback(Incomparable())
        with pytest.raises(ZeroDivisionError):
            ticket.remove_done_callback(print)
        assert await asyncio.wait_for(caller, 5) == "A1"

    run(main())


def test_callbacks_that_are_equal_are_removed(run: Any) -> None:
    async def main() -> None:
        caller = asyncio.ensure_future(upper("a"))
        await asyncio.sleep(0)
        ticket: Any = caller._fut_waiter  # type: ignore[attr-defined]
        told: list[Any] = []
        for _ in range(2):
            ticket.add_done_callback(told.append)
        assert ticket.remove_done_callback(told.append) == 2
        assert ticket.remove_done_callback(told.append) == 0
        assert (await asyncio.wait_for(caller, 5), told) == ("A1", [])

    run(main())


def test_a_shorter_window_holds_for_what_comes_though_the_timer_of_a_longer_one_is_set(run: Any) -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=60)
    async def size(items: list[int]) -> list[int]:
        return [len(items)] * len(items)

    async def main() -> None:
        first = asyncio.ensure_future(size(1))
        await asyncio.sleep(0.01)  # it waits by a timer
        assert await gather(first, size(2)) == [2, 2]
        size.set_batch_wait_timeout_s(0.01)
        await asyncio.sleep(0.01)  # and that is known
        assert await asyncio.wait_for(size(3), 20) == 1

    run(main())
