"""Compositions under many clients at once: chains, fan-outs, recursion, from async and from sync code."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import pytest
import ray

from rayserve_fast import serve
from rayserve_fast.handle import DeploymentHandle

pytestmark = pytest.mark.usefixtures("serve_instance")

CLIENTS, CALLS = 64, 5


@serve.deployment(max_ongoing_requests=CLIENTS, ray_actor_options={"num_cpus": 0.1})
class Stage:
    def __init__(self, name: str, following: DeploymentHandle | None = None) -> None:
        self.name, self.following = name, following

    async def walk(self, path: list[str]) -> list[str]:
        path = [*path, self.name]
        if self.following is None:
            return path
        walked: list[str] = await self.following.walk.remote(path)
        return walked

    def walk_sync(self, path: list[str]) -> list[str]:
        path = [*path, self.name]
        if self.following is None:
            return path
        walked: list[str] = self.following.walk_sync.remote(path).result()
        return walked

    async def stream(self, n: int) -> Any:
        if self.following is None:
            for i in range(n):
                yield i
        else:
            async for item in self.following.options(stream=True).stream.remote(n):
                yield item

    async def fan(self, n: int) -> int:
        assert self.following is not None
        return sum(await asyncio.gather(*(self.following.size.remote(["x"] * i) for i in range(n))))

    async def size(self, items: list[str]) -> int:
        return len(items)

    async def __call__(self, request: Any) -> list[str]:
        return await self.walk([])


@serve.deployment(max_ongoing_requests=2000)
class Factorial:
    async def __call__(self, n: int) -> int:
        if n <= 1:
            return 1
        myself = serve.get_deployment_handle("Factorial")
        return n * int(await myself.remote(n - 1))


@pytest.fixture
def five() -> DeploymentHandle:
    application = Stage.options(name="stage4").bind("4")
    for i in range(3, -1, -1):
        application = Stage.options(name=f"stage{i}").bind(str(i), application)
    return serve.run(application, name="chain", route_prefix="/chain")


def from_a_loop(call: Callable[[], Awaitable[Any]]) -> list[Any]:
    async def client() -> list[Any]:
        return [await call() for _ in range(CALLS)]

    async def clients() -> list[Any]:
        return list(chain.from_iterable(await asyncio.gather(*(client() for _ in range(CLIENTS)))))

    return asyncio.run(clients())


def from_threads(call: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(lambda: [call().result(timeout_s=60) for _ in range(CALLS)]) for _ in range(CLIENTS)]
        return list(chain.from_iterable(client.result() for client in clients))


@pytest.mark.parametrize("clients", [from_a_loop, from_threads])
@pytest.mark.parametrize("method", ["walk", "walk_sync"])
def test_a_chain_of_five(five: DeploymentHandle, clients: Any, method: str) -> None:
    answers = clients(lambda: five.options(method_name=method).remote([]))
    assert answers == [["0", "1", "2", "3", "4"]] * (CLIENTS * CALLS)


def test_a_stream_through_five(five: DeploymentHandle) -> None:
    async def client(i: int) -> list[int]:
        return [item async for item in five.options(stream=True).stream.remote(i)]

    async def clients() -> list[list[int]]:
        return await asyncio.gather(*map(client, range(CLIENTS)))

    assert asyncio.run(clients()) == [list(range(i)) for i in range(CLIENTS)]


def test_a_fan_out_of_32(five: DeploymentHandle) -> None:
    assert from_a_loop(lambda: five.fan.remote(32)) == [31 * 32 // 2] * (CLIENTS * CALLS)


def test_recursion() -> None:
    factorial = serve.run(Factorial.bind(), name="factorial", route_prefix="/factorial")
    assert from_a_loop(lambda: factorial.remote(10)) == [math.factorial(10)] * (CLIENTS * CALLS)


def test_an_actor_of_rays_calls_too(five: DeploymentHandle) -> None:
    @ray.remote(num_cpus=0)
    class Client:
        def __init__(self, handle: DeploymentHandle) -> None:
            self.handle = handle

        def sync(self) -> Any:
            return self.handle.walk.remote([]).result(timeout_s=30)

    @ray.remote(num_cpus=0)
    class AsyncClient:
        async def ask(self, handle: DeploymentHandle) -> Any:
            return await handle.walk.remote([])

    sync, asynchronous = Client.remote(five), AsyncClient.remote()
    assert ray.get([sync.sync.remote(), asynchronous.ask.remote(five)]) == [["0", "1", "2", "3", "4"]] * 2


def test_a_notebook_awaits_on_the_loop_that_runs_its_cells(five: DeploymentHandle) -> None:
    """Cells run one after the other on a loop that is there before and after, in the main thread or not."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def cell() -> Any:
        response = five.walk.remote([])
        with pytest.raises(RuntimeError, match="Use `await response` instead"):
            response.result()
        return await response

    try:
        for _ in range(3):
            assert asyncio.run_coroutine_threadsafe(cell(), loop).result(30) == ["0", "1", "2", "3", "4"]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_ray_client_is_refused_with_the_reason(run_script: Any) -> None:
    pytest.importorskip("grpc", reason="Ray Client needs grpcio")
    done = run_script(
        """
from ray.util.client.ray_client_helpers import ray_start_client_server
from rayserve_fast.handle import DeploymentHandle

with ray_start_client_server(ray_init_kwargs={"num_cpus": 1, "include_dashboard": False}):
    try:
        DeploymentHandle("D", "app").remote()
    except Exception as error:
        print(type(error).__name__, error)
"""
    )
    assert "RayServeException Handles do not work over Ray Client" in done.stdout, done.stdout + done.stderr


def test_threads_and_the_loop_of_a_replica_call_at_once(five: DeploymentHandle) -> None:
    """Both read answers for each other, and neither may wait for one that the other has left lying."""

    async def client(i: int) -> None:
        for _ in range(100):
            method = "walk" if i % 2 else "walk_sync"
            response = five.options(method_name=method).remote([])
            assert await asyncio.wait_for(response, 20) == ["0", "1", "2", "3", "4"]

    async def clients() -> None:
        await asyncio.gather(*map(client, range(16)))

    asyncio.run(clients())
