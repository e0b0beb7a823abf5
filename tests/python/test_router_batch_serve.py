"""Deployments with `max_batch_size` as they are deployed: options, HTTP, handles, other nodes of an application."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import requests
from deployed import proxy_actor, proxy_counters, wait_for
from fastapi import FastAPI

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.local import applications
from rayserve_fast.multiplex import get_multiplexed_model_id

app = FastAPI()


@serve.deployment(max_batch_size=4, batch_wait_timeout_s=0.3)
class Model:
    async def __call__(self, xs: list[Any]) -> list[Any]:
        from rayserve_fast.context import _batch_size  # here, as a context variable does not travel

        assert _batch_size.get() == len(xs)
        return [(x, len(xs)) for x in xs]

    def sync(self, xs: list[int], *, plus: list[int]) -> list[int]:
        return [x + p for x, p in zip(xs, plus, strict=True)]

    def model(self, xs: list[int]) -> list[tuple[str, int]]:
        return [(get_multiplexed_model_id(), len(xs)) for _ in xs]

    async def bad(self, xs: list[int]) -> list[Any]:
        return [KeyError(x) if x == 1 else x for x in xs]

    async def broken(self, xs: list[int]) -> list[Any]:
        raise KeyError("all")

    async def short(self, xs: list[int]) -> list[int]:
        return xs[1:]


@serve.deployment(max_batch_size=8, batch_wait_timeout_s=0.2)
async def web(requests: list[Any]) -> list[Any]:
    return [{"n": await request.json(), "of": len(requests)} for request in requests]


@serve.deployment
class Caller:
    def __init__(self, model: Any) -> None:
        self.model = model

    async def __call__(self, count: int) -> list[Any]:
        return list(await asyncio.gather(*(self.model.remote(n) for n in range(count))))


def test_calls_are_put_together_and_answered_one_by_one(run: Any) -> None:
    handle = run(Model.bind())
    assert [call.result(timeout_s=20) for call in [handle.remote(n) for n in range(4)]] == [(n, 4) for n in range(4)]
    began = time.monotonic()
    assert handle.remote("alone").result(timeout_s=20) == ("alone", 1)
    assert time.monotonic() - began >= 0.25


def test_each_parameter_is_a_list_and_sync_methods_run_too(run: Any) -> None:
    handle = run(Model.bind())
    calls = [handle.sync.remote(n, plus=10 * n) for n in range(4)]
    assert [call.result(timeout_s=20) for call in calls] == [0, 11, 22, 33]


def test_calls_of_different_models_are_different_calls(run: Any) -> None:
    handle = run(Model.bind())
    calls = [handle.options(multiplexed_model_id=model).model.remote(1) for model in ("a", "b", "a")]
    assert [call.result(timeout_s=20) for call in calls] == [("a", 2), ("b", 1), ("a", 2)]


def test_errors_reach_those_whom_they_concern(run: Any) -> None:
    handle = run(Model.bind())
    good, bad = handle.bad.remote(0), handle.bad.remote(1)
    assert good.result(timeout_s=20) == 0
    with pytest.raises(KeyError):
        bad.result(timeout_s=20)
    for call in [handle.broken.remote(n) for n in range(2)]:
        with pytest.raises(KeyError, match="all"):
            call.result(timeout_s=20)
    for call in [handle.short.remote(n) for n in range(2)]:
        with pytest.raises(RayServeException, match="length 2 but the returned list has length 1"):
            call.result(timeout_s=20)


def test_calls_of_one_turn_of_a_loop_go_together(run: Any) -> None:
    handle = run(Caller.bind(Model.options(batch_wait_timeout_s=30.0).bind()))
    assert handle.remote(4).result(timeout_s=20) == [(n, 4) for n in range(4)]


def test_a_call_that_is_cancelled_while_it_waits_is_left_out(run: Any) -> None:
    handle = run(Model.bind())
    calls = [handle.remote(n) for n in range(3)]
    calls[1].cancel()
    assert [calls[at].result(timeout_s=20) for at in (0, 2)] == [(0, 2), (2, 2)]


def test_object_refs_among_the_arguments_are_their_values(serve_instance: str) -> None:
    handle = serve.run(Model.bind(), route_prefix=None)
    calls = [handle.remote(ray.put(n)) for n in range(4)]
    assert [call.result(timeout_s=20) for call in calls] == [(n, 4) for n in range(4)]


def test_http_requests_are_put_together(serve_instance: str) -> None:
    serve.run(web.bind())
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: requests.post(serve_instance, json=n, timeout=20).json(), range(8)))
    assert [answer["n"] for answer in answers] == list(range(8))
    assert max(answer["of"] for answer in answers) > 1
    tally = ray.get(proxy_actor().batches.remote())["default#web"]
    assert tally["requests"] == 8
    assert tally["batches"] == sum(tally["released"].values())
    assert proxy_counters()["streams"] == 0


def test_no_request_is_lost_when_a_deployment_begins_and_ends_to_batch(serve_instance: str) -> None:
    @serve.deployment(name="Changing")
    class Single:
        async def __call__(self, request: Any) -> str:
            return "single"

    @serve.deployment(name="Changing", max_batch_size=4)
    class Lists:
        async def __call__(self, requests: list[Any]) -> list[str]:
            return ["list"] * len(requests)

    serve.run(Single.bind())
    stop, seen, failed = threading.Event(), set(), []

    def load() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                response = session.get(serve_instance, timeout=20)
                seen.add(response.text)
                if response.status_code != 200:
                    failed.append(response.text)

    with ThreadPoolExecutor(4) as threads:
        loads = [threads.submit(load) for _ in range(4)]
        try:
            serve.run(Lists.bind())
            serve.run(Single.bind())
        finally:
            stop.set()
        for each in loads:
            each.result()
    assert failed == []
    assert seen == {"single", "list"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_size": 16385}, "max_batch_size"),
        ({"max_batch_size": "many"}, "max_batch_size"),
        ({"max_batch_size": 2, "batch_wait_timeout_s": -1}, "batch_wait_timeout_s"),
        ({"max_batch_size": 2, "batch_wait_timeout_s": float("inf")}, "batch_wait_timeout_s"),
        ({"max_batch_size": 2, "max_concurrent_batches": 0}, "max_concurrent_batches"),
        ({"batch_wait_timeout_s": 1.0}, "batch_wait_timeout_s has no meaning without max_batch_size"),
        ({"max_concurrent_batches": 2}, "max_concurrent_batches has no meaning without max_batch_size"),
    ],
)
def test_options_that_are_wrong_are_refused_by_their_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        serve.deployment(**options)(lambda _: None)


def test_batching_can_be_switched_off_again() -> None:
    plain = Model.options(max_batch_size=None)._options.plain()
    assert (plain.max_batch_size, plain.batch_wait_timeout_s, plain.slots) == (None, 0.0, 5)
    changed = Model.options(max_concurrent_batches=3)._options.plain()
    assert (changed.max_batch_size, changed.batch_wait_timeout_s, changed.slots) == (4, 0.3, 3)


@serve.deployment(max_batch_size=2)
@serve.ingress(app)
class Ingress:
    pass


@serve.deployment(max_batch_size=2)
async def generator(requests: list[Any]) -> Any:
    yield requests


@serve.deployment(max_batch_size=2)
class Generator:
    def __call__(self, requests: list[Any]) -> Any:
        yield requests


@pytest.mark.parametrize(
    ("deployment", "why"), [(Ingress, "FastAPI"), (generator, "generator"), (Generator, "generator")]
)
def test_what_cannot_be_called_with_lists_is_refused_when_it_is_deployed(deployment: Any, why: str) -> None:
    with pytest.raises(RayServeException, match=f"cannot set max_batch_size: .*{why}"):
        serve.run(deployment.bind(), _local_testing_mode=True)


def test_a_batch_that_only_itself_keeps_alive_is_not_collected() -> None:
    """What an event loop knows of a task is weak, and so is what is known of the future that this one awaits."""
    begun: list[Any] = []

    @serve.deployment(max_batch_size=2, batch_wait_timeout_s=30)
    async def waiting(items: list[int]) -> list[int]:
        future = asyncio.get_running_loop().create_future()
        begun.append((asyncio.get_running_loop(), weakref.ref(future)))
        await future
        return items

    handle = serve.run(waiting.bind(), _local_testing_mode=True)
    try:
        calls = [handle.remote(n) for n in range(2)]
        wait_for(lambda: bool(begun))
        ((loop, future),) = begun
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)  # by now it awaits
        gc.collect()
        assert future() is not None
        loop.call_soon_threadsafe(lambda: future().set_result(None))
        assert [call.result(timeout_s=20) for call in calls] == [0, 1]
    finally:
        applications.shutdown()
