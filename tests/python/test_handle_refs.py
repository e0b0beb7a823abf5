"""Ray's ObjectRefs as arguments of handle calls, and responses as ObjectRefs."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from deployed import failing, plus_one, wait_for
from ray.exceptions import ActorDiedError, RayError, RayTaskError, TaskCancelledError

from rayserve_fast import promises, serve
from rayserve_fast.exceptions import RayServeException, RequestCancelledError
from rayserve_fast.replica.lingering import Lingering


class Echo:
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def same(self, value: Any) -> Any:
        return value

    async def slow(self, seconds: float, value: Any) -> Any:
        await asyncio.sleep(seconds)
        return value

    async def inside(self, box: list[Any]) -> Any:
        return await box[0]

    def put(self, value: Any) -> Any:
        return [ray.put(value)]

    def fail(self) -> None:
        raise KeyError("lost")

    def count(self, n: int) -> Any:
        yield from range(n)

    async def count_for_ever(self) -> Any:
        for i in range(1_000_000):
            yield i
            await asyncio.sleep(0.01)

    def leave(self) -> None:
        raise SystemExit(3)

    def pid(self) -> int:
        return os.getpid()


class Middle:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def through(self, value: Any) -> Any:
        response = self.handle.same.remote(value)
        return await (await response._to_object_ref())


@pytest.fixture(scope="module")
def echo(serve_url: str) -> Any:
    app = serve.deployment(Middle).bind(serve.deployment(Echo).bind())
    serve.run(app, name="refs", route_prefix="/refs")
    yield serve.get_deployment_handle("Echo", "refs")
    serve.delete("refs")


def test_top_level_references_arrive_as_values(echo: Any) -> None:
    ref, task = ray.put(np.arange(200_000)), plus_one.remote(1)
    args, kwargs = echo.remote(ref, 1, key=task).result(timeout_s=30)
    np.testing.assert_array_equal(args[0], np.arange(200_000))
    assert (args[1], kwargs) == (1, {"key": 2})
    assert echo.same.remote(ray.put("sync")).result(timeout_s=30) == "sync"


def test_a_failed_reference_fails_the_call(echo: Any) -> None:
    for method in (echo.same, echo):
        with pytest.raises(ValueError, match="in the task"):
            method.remote(failing.remote()).result(timeout_s=30)


def test_nested_references_stay_references_and_usable(echo: Any) -> None:
    ref = ray.put(41)
    args, _ = echo.remote([ref]).result(timeout_s=30)
    assert type(args[0][0]) is ray.ObjectRef
    assert args[0][0] == ref
    assert echo.inside.remote([ray.put(42)]).result(timeout_s=30) == 42  # nobody else keeps it


def test_references_in_results_are_usable(echo: Any) -> None:
    (ref,) = echo.put.remote("mine").result(timeout_s=30)
    assert ray.get(ref, timeout=30) == "mine"
    assert ray.get(plus_one.remote(echo.put.remote(1).result(timeout_s=30)[0]), timeout=60) == 2


def test_what_lingers_goes_when_its_time_is_over() -> None:
    lingering = Lingering(linger_s=0.05)
    for i in range(3):
        lingering.keep(i)
    assert len(lingering) == 3
    wait_for(lambda: not len(lingering), 10)  # a thread's own time


def test_references_are_given_up_when_the_call_has_ended(echo: Any) -> None:
    def owned() -> int:
        gc.collect()
        worker = ray._private.worker.global_worker.core_worker
        return len(worker.get_all_reference_counts())

    echo.inside.remote([ray.put(0)]).result(timeout_s=30)
    before = owned()
    for i in range(50):
        assert echo.inside.remote([ray.put(i)]).result(timeout_s=30) == i
        assert echo.same.remote(ray.put(i)).result(timeout_s=30) == i
    wait_for(lambda: owned() <= before + 5, 10)  # Ray counts in its own time


def test_a_response_becomes_a_reference_before_it_has_its_answer(echo: Any) -> None:
    response = echo.slow.remote(1.5, 5)
    ref = response._to_object_ref_sync()
    assert not response._call.ready()
    assert type(ref) is ray.ObjectRef
    assert response._to_object_ref_sync() is ref
    assert ray.get(plus_one.remote(ref), timeout=60) == 6
    assert response.result(timeout_s=5) == 5


def test_the_reference_of_a_failing_call_fails(echo: Any) -> None:
    ref = echo.fail.remote()._to_object_ref_sync()
    with pytest.raises(KeyError) as caught:
        ray.get(ref, timeout=60)
    assert isinstance(caught.value, RayTaskError)


def test_the_reference_of_a_cancelled_call_fails_and_so_does_the_task_that_waits_for_it(echo: Any) -> None:
    response = echo.slow.remote(60, 0)
    ref = response._to_object_ref_sync()
    task = plus_one.remote(ref)
    response.cancel()
    with pytest.raises(RequestCancelledError):
        _kept(ref)
    with pytest.raises(TaskCancelledError):
        _kept(task)
    assert response._to_object_ref_sync() is ref


def test_a_cancelled_call_becomes_no_reference(echo: Any) -> None:
    response, stream = echo.slow.remote(60, 0), echo.count_for_ever.options(stream=True).remote()
    response.cancel()
    stream.cancel()
    for make in (response._to_object_ref_sync, stream._to_object_ref_gen_sync):
        with pytest.raises(RequestCancelledError):
            make()
    for made in (response._to_object_ref, stream._to_object_ref_gen):
        with pytest.raises(RequestCancelledError):
            asyncio.run(made())


def test_the_references_of_a_cancelled_stream_end_with_an_error(echo: Any) -> None:
    stream = echo.count_for_ever.options(stream=True).remote()
    refs = stream._to_object_ref_gen_sync()
    assert ray.get(next(refs), timeout=60) == 0
    stream.cancel()
    with pytest.raises(RequestCancelledError):
        _read(refs)


def test_the_reference_of_a_call_whose_replica_dies_fails(serve_url: str) -> None:
    handle = serve.run(serve.deployment(Echo).bind(), name="dies", route_prefix=None)
    pid = handle.pid.remote().result(timeout_s=30)
    ref = handle.slow.remote(60, 0)._to_object_ref_sync()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDiedError):
        _kept(ref)
    serve.delete("dies")


def _kept(ref: Any) -> Any:
    """The value; a promise that is never kept is no error of it."""
    assert ray.wait([ref], timeout=30)[0], "never kept"
    return ray.get(ref)


def _read(refs: Any) -> None:
    for ref in refs:
        _kept(ref)


class _Unloadable:
    """What can be pickled, and unpickled by nobody."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise KeyError("not here")


class _OddError(Exception):
    """Pickles, and cannot be made again of its `args`."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ActorDiedError(), ActorDiedError),
        (RequestCancelledError("id"), RequestCancelledError),
        (RayTaskError("f", "text", KeyError("k")).as_instanceof_cause(), KeyError),
        (TimeoutError("late"), TimeoutError),
        (ValueError(threading.Lock()), RayError),
        (_OddError(1, 2), RayError),
        (SystemExit(3), RayServeException),
        (StopIteration(), RuntimeError),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else each.__name__,
)
def test_whatever_is_raised_breaks_its_promise_and_no_other(
    ray_session: None, error: BaseException, raised: type[BaseException]
) -> None:
    def fail(*items: int) -> Iterator[int]:
        yield from items
        raise error

    go_on = threading.Event()
    bystander = promises.of_value(go_on.wait)
    with pytest.raises(raised):
        _kept(promises.of_value(lambda: next(fail())))
    with pytest.raises(raised):
        _read(promises.of_items(lambda: fail(1)))

    async def of_awaitable() -> Any:
        async def answer() -> None:
            raise error

        return await asyncio.to_thread(_kept, promises.of_awaitable(answer()))

    if isinstance(error, Exception) and not isinstance(error, StopIteration):  # which no coroutine raises
        with pytest.raises(raised):
            asyncio.run(of_awaitable())
    go_on.set()
    assert _kept(bystander)


@pytest.mark.parametrize("value", [threading.Lock(), _Unloadable()], ids=["unpicklable", "unloadable"])
def test_a_value_that_cannot_travel_breaks_its_promise(ray_session: None, value: Any) -> None:
    async def of_awaitable() -> Any:
        return await asyncio.to_thread(_kept, promises.of_awaitable(asyncio.sleep(0, value)))

    with pytest.raises((TypeError, RayError)):
        _kept(promises.of_value(lambda: value))
    with pytest.raises((TypeError, RayError)):
        _kept(next(promises.of_items(lambda: [value])))
    with pytest.raises((TypeError, RayError)):
        asyncio.run(of_awaitable())


def test_a_reference_as_a_value_stays_one(ray_session: None) -> None:
    failed = failing.remote()
    ref = _kept(promises.of_value(lambda: failed))
    with pytest.raises(ValueError, match="in the task"):
        _kept(ref)


def test_a_method_that_exits_fails_its_reference(echo: Any) -> None:
    with pytest.raises(RayServeException, match="SystemExit"):
        _kept(echo.leave.remote()._to_object_ref_sync())


def test_items_become_references(echo: Any) -> None:
    refs = echo.count.options(stream=True).remote(3)._to_object_ref_gen_sync()
    assert type(refs) is ray.ObjectRefGenerator
    assert [ray.get(ref, timeout=60) for ref in refs] == [0, 1, 2]


def test_references_are_made_in_loops_and_replicas_too(echo: Any) -> None:
    async def in_loop() -> Any:
        response = echo.same.remote(3)
        with pytest.raises(RuntimeError, match="await response"):
            response._to_object_ref_sync()
        return await (await response._to_object_ref())

    assert asyncio.run(in_loop()) == 3
    assert serve.get_app_handle("refs").through.remote("x").result(timeout_s=60) == "x"
