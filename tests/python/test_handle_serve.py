"""Handles against real replicas on a real Ray: from the driver, from other deployments, from Ray tasks."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray
from deployed import replica_actors, until_running, wait_for
from ray.exceptions import ActorDiedError, RayTaskError

from rayserve_fast import caller, serve
from rayserve_fast.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from rayserve_fast.handle import DeploymentHandle

pytestmark = pytest.mark.usefixtures("serve_instance")


class Broken(ValueError):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code


@serve.deployment(max_ongoing_requests=100)
class Model:
    def __init__(self) -> None:
        self.cancelled = 0

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def sync(self, value: Any) -> Any:
        return value, threading.current_thread().name

    async def double(self, array: Any) -> Any:
        return array * 2

    async def fail(self) -> None:
        raise Broken("on purpose", 42)

    def fail_sync(self) -> None:
        raise KeyError("missing")

    async def hang(self) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def cancellations(self) -> int:
        return self.cancelled

    async def items(self) -> Any:
        yield 1

    async def unpicklable(self) -> Any:
        return threading.Lock()

    async def pid(self) -> int:
        return os.getpid()

    async def sleep(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds


def test_a_driver_calls_functions_classes_and_methods() -> None:
    @serve.deployment
    def add(a: int, b: int = 1) -> int:
        return a + b

    assert serve.run(add.bind(), name="add", route_prefix="/add").remote(1, b=2).result() == 3
    handle = serve.run(Model.bind())
    assert handle.remote(1, x=[2]).result() == ((1,), {"x": [2]})
    value, thread = handle.sync.remote("v").result()
    assert value == "v"
    assert "sync" in thread
    again = serve.get_app_handle("add")
    assert again.remote(5).result() == 6


def test_arrays_and_classes_of_the_driver_go_both_ways() -> None:
    handle = serve.run(Model.bind())
    array = np.arange(1_000_000.0).reshape(1000, 1000)
    doubled = handle.double.remote(array).result()
    np.testing.assert_array_equal(doubled, array * 2)
    doubled[0] = 0  # a copy of one's own

    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

        def __mul__(self, by: int) -> Local:
            return Local(self.x * by)

    assert handle.double.remote(Local(21)).result().x == 42


def test_what_the_user_raises_arrives_with_type_cause_and_traceback() -> None:
    handle = serve.run(Model.bind())
    with pytest.raises(Broken, match="in fail") as raised:
        handle.fail.remote().result()
    assert isinstance(raised.value, RayTaskError)
    assert isinstance(raised.value.cause, Broken)
    assert raised.value.code == 42
    with pytest.raises(KeyError, match="missing"):
        handle.fail_sync.remote().result()
    assert handle.remote().result() == ((), {})


def test_wrong_calls_are_told_what_is_wrong() -> None:
    handle = serve.run(Model.bind())
    with pytest.raises(RayServeException, match=r"Tried to call a method 'nothing' that does not exist.*'double'"):
        handle.nothing.remote().result()
    with pytest.raises(TypeError, match="returned a generator"):
        handle.items.remote().result()
    with pytest.raises(TypeError, match="cannot be sent"):
        handle.unpicklable.remote().result()
    with pytest.raises(TypeError, match=r"unexpected keyword|positional"):
        handle.sync.remote(1, 2, 3).result()


def test_threads_of_the_driver_share_a_handle() -> None:
    handle = serve.run(Model.bind())

    def work(base: int) -> bool:
        return all(handle.remote(base + i).result() == ((base + i,), {}) for i in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(0, 8000, 1000)))


def test_a_driver_awaits_on_its_own_loop() -> None:
    handle = serve.run(Model.bind())

    async def main() -> list[Any]:
        return await asyncio.gather(*(handle.remote(i) for i in range(200)))

    assert asyncio.run(main()) == [((i,), {}) for i in range(200)]


@serve.deployment(max_ongoing_requests=50)
class Front:
    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def __call__(self, value: Any) -> Any:
        return await self.model.double.remote(value)

    def blocking(self, value: Any) -> Any:
        return self.model.double.remote(value).result()

    async def wrong(self) -> Any:
        return self.model.remote().result()

    async def many(self, n: int) -> Any:
        return sum(await asyncio.gather(*(self.model.double.remote(i) for i in range(n))))


def test_replicas_call_each_other_from_async_and_sync_code() -> None:
    handle = serve.run(Front.bind(Model.bind()))
    assert handle.remote(2).result(timeout_s=20) == 4
    assert handle.blocking.remote(3).result(timeout_s=20) == 6
    assert handle.many.remote(100).result(timeout_s=20) == sum(2 * i for i in range(100))
    with pytest.raises(RuntimeError, match="Use `await response` instead"):
        handle.wrong.remote().result(timeout_s=20)
    responses = [handle.remote(i) for i in range(200)] + [handle.blocking.remote(i) for i in range(200)]
    assert [r.result(timeout_s=30) for r in responses] == [2 * i for i in range(200)] * 2


def test_ray_tasks_use_handles_too() -> None:
    handle = serve.run(Model.bind())

    @ray.remote
    def task(given: DeploymentHandle) -> Any:
        return given.double.remote(21).result(timeout_s=20)

    assert ray.get(task.remote(handle), timeout=60) == 42


def test_a_replica_that_dies_fails_its_calls_and_no_others() -> None:
    handle = serve.run(Model.options(num_replicas=2).bind())
    pids: set[int] = set()
    while len(pids) < 2:
        pids |= {handle.pid.remote().result() for _ in range(20)}
    hanging = [handle.hang.remote() for _ in range(10)]
    until_running(10)
    victim = pids.pop()
    os.kill(victim, signal.SIGKILL)
    died, alive = [], []
    for response in hanging:
        try:
            response.result(timeout_s=1)
        except ActorDiedError as error:
            died.append(str(error))
        except TimeoutError:
            alive.append(response)
            response.cancel()
    assert len(died) == len(alive) == 5, "the least loaded of two takes every other call"
    assert all("Model.hang" in text for text in died)
    for i in range(50):
        assert handle.remote(i).result(timeout_s=20) == ((i,), {})


def test_redeploys_lose_no_call() -> None:
    @serve.deployment(name="Versioned", max_ongoing_requests=20)
    class Versioned:
        def __init__(self, version: int) -> None:
            self.version = version

        async def __call__(self) -> int:
            await asyncio.sleep(0.005)
            return self.version

    handle = serve.run(Versioned.bind(0))
    stop = threading.Event()
    seen: list[int] = []

    def load() -> None:
        while not stop.is_set():
            seen.append(handle.remote().result(timeout_s=30))

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        for version in range(1, 4):
            wait_for(lambda: version - 1 in seen)  # noqa: B023 - it waits here
            serve.run(Versioned.bind(version))
        wait_for(lambda: 3 in seen)
        stop.set()
        for each in loads:
            each.result(timeout=60)
    # The loads end with an error if a call is lost, and the test with a timeout if a version never answers.
    assert set(seen) == {0, 1, 2, 3}


def test_cancelling_reaches_the_users_coroutine_and_frees_the_slot() -> None:
    handle = serve.run(Model.options(max_ongoing_requests=2).bind())
    running = [handle.hang.remote() for _ in range(2)]
    queued = handle.remote("next")
    until_running(2)
    for response in running:
        response.cancel()
        with pytest.raises(RequestCancelledError):
            response.result(timeout_s=5)
    assert queued.result(timeout_s=10) == (("next",), {})
    assert handle.cancellations.remote().result(timeout_s=10) == 2


def test_calls_cancelled_at_random_moments_leave_nothing_in_flight() -> None:
    handle = serve.run(Model.options(num_replicas=2, max_ongoing_requests=8).bind())

    def storm(seed: int) -> tuple[int, int]:
        dice, answered, cancelled = random.Random(seed), 0, 0
        for _ in range(1250):
            seconds = dice.random() * 0.003
            response = handle.sleep.remote(seconds)
            if dice.random() < 0.8:
                if dice.random() < 0.5:
                    time.sleep(dice.random() * 0.002)
                response.cancel()
            try:
                assert response.result(timeout_s=30) == seconds
                answered += 1
            except RequestCancelledError:
                cancelled += 1
        return answered, cancelled

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(storm, range(8)))
    assert sum(map(sum, outcomes)) == 10_000
    assert min(min(each) for each in outcomes) > 0, "both happen"
    assert caller.current().client.counters()["outstanding"] == 0
    replicas = replica_actors()
    assert len(replicas) == 2
    for replica in replicas:
        wait_for(lambda: not ray.get(replica.counters.remote())["streams"], 5)  # noqa: B023 - it waits here
        counters = ray.get(replica.counters.remote())
        assert counters["running"] == counters["held"] == counters["streams"] == 0


def test_a_full_queue_is_back_pressure() -> None:
    handle = serve.run(Model.options(max_ongoing_requests=1, max_queued_requests=2).bind())
    handle.remote().result()
    responses = [handle.sleep.remote(seconds) for seconds in (2.0, 0.0, 0.0)]
    with pytest.raises(BackPressureError):
        handle.remote().result(timeout_s=10)
    assert [r.result(timeout_s=10) for r in responses] == [2.0, 0.0, 0.0]


def test_a_deleted_deployment_refuses_calls() -> None:
    handle = serve.run(Model.bind())
    handle.remote().result()
    serve.delete("default")
    with pytest.raises(DeploymentUnavailableError):
        handle.remote().result(timeout_s=20)


def test_the_request_id_travels_with_the_calls() -> None:
    @serve.deployment
    class Back:
        async def __call__(self) -> tuple[str, str]:
            from rayserve_fast.context import _get_serve_request_context

            context = _get_serve_request_context()
            return context.request_id, context.app_name

    @serve.deployment
    class Middle:
        def __init__(self, back: DeploymentHandle) -> None:
            self.back = back

        async def __call__(self) -> tuple[str, str]:
            response = self.back.remote()
            seen = await response
            assert seen[0] == response.request_id
            return seen

    response = serve.run(Middle.bind(Back.bind())).remote()
    assert response.result(timeout_s=20)[0] == response.request_id


def test_large_results_leave_memory_flat() -> None:
    handle = serve.run(Model.bind())
    array = np.zeros(131_072)  # 1 MiB

    def rss() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    for _ in range(100):
        handle.double.remote(array).result()
    before = rss()
    for _ in range(1000):
        handle.double.remote(array).result()
    assert rss() - before < 100 << 20
