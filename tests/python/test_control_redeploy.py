"""Redeploys on a real Ray, under load: what is lost, what waits, which version answers."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from deployed import code, get, proxy_counters, until_running, wait_for
from load import Load

from rayserve_fast import serve


def test_five_redeploys_under_500_requests_a_second_lose_none(serve_instance: str) -> None:
    strict = {"max_ongoing_requests": 100, "retry_idempotent": False}  # no retry may hide a lost request
    serve.run(code("v0", **strict))
    with Load(serve_instance, rate=500) as load:
        for n in range(1, 6):
            serve.run(code(f"v{n}", **strict))
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {f"v{n}" for n in range(6)}


def test_redeploys_that_rename_the_ingress_lose_none_of_500_requests_a_second(serve_instance: str) -> None:
    strict = {"max_ongoing_requests": 1, "retry_idempotent": False}  # most requests queue at the proxy
    serve.run(code("v0", "Code0", **strict))
    with Load(serve_instance, rate=500) as load:
        for n in range(1, 6):
            serve.run(code(f"v{n}", f"Code{n}", **strict))
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {f"v{n}" for n in range(6)}
    assert list(serve.status().applications["default"].deployments) == ["Code5"]


def test_what_queues_behind_a_long_request_of_a_renamed_ingress_does_not_wait_for_it(
    serve_instance: str, tmp_path: Path
) -> None:
    signal = tmp_path / "go"

    @serve.deployment(name="Old", max_ongoing_requests=1)
    async def old(request: Any) -> str:
        while not signal.exists():
            await asyncio.sleep(0.02)
        return "old"

    serve.run(old.bind())
    order: list[str] = []
    with ThreadPoolExecutor() as pool:
        for _ in range(3):
            pool.submit(lambda: order.append(get(serve_instance)[1].split()[0]))
        wait_for(lambda: proxy_counters()["requests_open"] == 3)
        pool.submit(lambda: (wait_for(lambda: len(order) == 2), signal.touch()))
        serve.run(code("new", "New"))  # returns when the old one has gone
    assert order == ["new", "new", "old"]


def test_a_failed_redeploy_that_renames_the_ingress_leaves_the_old_one_serving(serve_instance: str) -> None:
    @serve.deployment(name="New", max_constructor_retry_count=1)
    class Broken:
        def __init__(self) -> None:
            raise ValueError("broken")

    serve.run(code("old", "Old"))
    with Load(serve_instance, rate=100) as load:
        with pytest.raises(RuntimeError, match="broken"):
            serve.run(Broken.bind())
        serve.run(code("third", "Third"))
        load.wait(20)
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {"old", "third"}


def test_a_request_in_flight_finishes_on_the_old_code(serve_instance: str) -> None:
    @serve.deployment(name="Slow")
    async def slow(request: Any) -> str:
        await asyncio.sleep(3)
        return "old"

    serve.run(slow.bind())
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(get(serve_instance)))
    thread.start()
    wait_for(lambda: proxy_counters()["streams"] == 1)
    serve.run(code("new"))
    thread.join()
    assert answers == [(200, "old")]
    assert get(serve_instance)[1].startswith("new ")


@pytest.mark.parametrize(("old_s", "new_s", "answer"), [(0.5, 20.0, 500), (20.0, 0.5, 200)])
def test_an_old_replica_finishes_in_its_own_time(serve_instance: str, old_s: float, new_s: float, answer: int) -> None:
    @serve.deployment(name="Code", graceful_shutdown_timeout_s=old_s, retry_idempotent=False)
    async def slow(request: Any) -> str:
        await asyncio.sleep(3 if answer == 200 else 60)
        return "old"

    serve.run(slow.bind())
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(get, serve_instance)
        until_running(1)
        serve.run(code("new", graceful_shutdown_timeout_s=new_s))
        assert asked.result()[0] == answer


def test_a_replica_that_fits_only_once_is_replaced_without_a_failed_request(serve_instance: str) -> None:
    options = {"ray_actor_options": {"num_cpus": int(ray.cluster_resources()["CPU"])}, "retry_idempotent": False}
    serve.run(code("v1", **options))
    with Load(serve_instance, rate=50) as load:
        serve.run(code("v2", **options))
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {"v1", "v2"}


def test_a_failed_redeploy_leaves_the_survivors_of_the_old_version_serving(serve_instance: str) -> None:
    @serve.deployment(name="Code", num_replicas=2)
    class Bad:
        def __init__(self) -> None:
            raise ValueError("broken release")

        async def __call__(self, request: Any) -> str:
            return "never"

    serve.run(code("v1", num_replicas=2))
    with Load(serve_instance, rate=100) as load, pytest.raises(RuntimeError, match="broken release"):
        serve.run(Bad.bind())
    assert load.failures == {}
    assert serve.status().applications["default"].status == "DEPLOY_FAILED"
    assert get(serve_instance)[1].startswith("v1 ")
