"""Cancellation from end to end on a real Ray: by `cancel()`, by a client that leaves, by a deadline; down the chain."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from deployed import wait_for

from rayserve_fast import caller, serve
from rayserve_fast.exceptions import RequestCancelledError
from rayserve_fast.handle import DeploymentHandle

pytestmark = pytest.mark.usefixtures("serve_instance")


def counters() -> dict[str, int]:
    """What this replica has in flight, as callee and as caller."""
    assert caller._home is not None
    mine = caller._home.worker.counters()
    called = caller.current().client.counters() if caller.exists() else {"outstanding": 0}
    return {name: mine[name] for name in ("running", "held", "streams")} | {"calls": called["outstanding"]}


#: While the counters are asked for, that call is the only one.
QUIET = {"running": 1, "held": 0, "streams": 1, "calls": 0}


@serve.deployment(max_ongoing_requests=50)
class Back:
    def __init__(self) -> None:
        self.log: list[str] = []

    async def slow(self, name: str, seconds: float = 30) -> str:
        try:
            self.log.append(f"{name} began")
            await asyncio.sleep(seconds)
            self.log.append(f"{name} ended")
        except asyncio.CancelledError:
            self.log.append(f"{name} cancelled")
            raise
        return name

    def blocking(self, seconds: float) -> None:
        time.sleep(seconds)

    async def items(self, name: str, seconds: float) -> AsyncIterator[bytes]:
        try:
            self.log.append(f"{name} began")
            while True:
                await asyncio.sleep(seconds)
                yield bytes(1000)
        except asyncio.CancelledError:
            self.log.append(f"{name} cancelled")
            raise

    async def entries(self) -> list[str]:
        return list(self.log)

    async def counters(self) -> dict[str, int]:
        return counters()


@serve.deployment(max_ongoing_requests=50)
class Front:
    def __init__(self, back: DeploymentHandle) -> None:
        self.back = back
        self.saw: list[str] = []

    async def __call__(self, request: Any) -> str:
        return str(await self.back.slow.remote("of HTTP"))

    async def awaited(self) -> None:
        await self.back.slow.remote("awaited")

    async def unawaited(self) -> None:
        self.back.slow.remote("unawaited")
        await asyncio.sleep(30)

    async def spawned(self) -> None:
        async def child() -> None:
            try:
                await self.back.slow.remote("spawned")
            except BaseException as error:
                self.saw.append(type(error).__name__)

        task = asyncio.create_task(child())
        await asyncio.sleep(30)
        await task

    async def streamed(self) -> None:
        async for _ in self.back.options(stream=True).items.remote("streamed", 0.01):
            pass

    async def relayed(self) -> AsyncIterator[bytes]:
        async for item in self.back.options(stream=True).items.remote("relayed", 0.01):
            yield item

    def in_thread(self) -> None:
        self.back.slow.remote("in thread").result()

    async def leaves(self) -> None:
        self.back.slow.remote("left behind", 0.1)

    async def patient(self) -> Any:
        response = self.back.slow.remote("patient", 0.3)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(response, 0.05)
        return await response

    async def work(self, kind: int, seconds: float) -> Any:
        if kind == 0:
            return await self.back.slow.remote("storm", seconds)
        if kind == 1:
            return await self.back.blocking.remote(seconds / 10)
        if kind == 2:
            return await asyncio.gather(*(self.back.slow.remote("storm", seconds) for _ in range(3)))
        async for _ in self.back.options(stream=True).items.remote("storm", seconds / 10):
            pass
        return None

    async def heard(self) -> list[str]:
        return list(self.saw)

    async def counters(self) -> dict[str, int]:
        return counters()


@pytest.fixture
def front() -> Iterator[DeploymentHandle]:
    yield serve.run(Front.bind(Back.bind()), route_prefix="/front")
    wait_for(lambda: caller.current().client.counters()["outstanding"] == 0)


@pytest.fixture
def back(front: DeploymentHandle) -> DeploymentHandle:
    return serve.get_deployment_handle("Back", "default")


def log(back: DeploymentHandle) -> list[str]:
    return back.entries.remote().result(timeout_s=20)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["awaited", "unawaited", "spawned"])
def test_the_calls_of_a_cancelled_call_are_cancelled(
    front: DeploymentHandle, back: DeploymentHandle, method: str
) -> None:
    response = front.options(method_name=method).remote()
    wait_for(lambda: f"{method} began" in log(back))
    response.cancel()
    with pytest.raises(RequestCancelledError):
        response.result(timeout_s=20)
    wait_for(lambda: f"{method} cancelled" in log(back))
    wait_for(lambda: front.counters.remote().result() == back.counters.remote().result() == QUIET)
    if method == "spawned":
        wait_for(lambda: front.heard.remote().result() == ["CancelledError"])


@pytest.mark.parametrize("method", ["streamed", "relayed"])
def test_the_streams_of_a_cancelled_call_are_cancelled(
    front: DeploymentHandle, back: DeploymentHandle, method: str
) -> None:
    response = front.options(method_name=method, stream=method == "relayed").remote()
    wait_for(lambda: f"{method} began" in log(back))
    response.cancel()
    wait_for(lambda: f"{method} cancelled" in log(back))
    wait_for(lambda: front.counters.remote().result() == back.counters.remote().result() == QUIET)


def test_a_sync_method_that_waits_hears_of_it(front: DeploymentHandle, back: DeploymentHandle) -> None:
    response = front.in_thread.remote()
    wait_for(lambda: "in thread began" in log(back))
    response.cancel()
    wait_for(lambda: "in thread cancelled" in log(back))
    wait_for(lambda: front.counters.remote().result() == QUIET)


def test_a_call_that_ends_leaves_its_calls_alone(front: DeploymentHandle, back: DeploymentHandle) -> None:
    front.leaves.remote().result(timeout_s=20)
    wait_for(lambda: "left behind ended" in log(back))


def test_a_wait_that_is_cancelled_leaves_the_call_alone(front: DeploymentHandle, back: DeploymentHandle) -> None:
    assert front.patient.remote().result(timeout_s=20) == "patient"
    assert log(back) == ["patient began", "patient ended"]


def test_a_client_that_leaves_cancels_down_the_chain(
    front: DeploymentHandle, back: DeploymentHandle, serve_instance: str
) -> None:
    address = urlsplit(serve_instance)
    with socket.create_connection((address.hostname or "", address.port or 0)) as client:
        client.sendall(b"GET /front HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: "of HTTP began" in log(back))
    wait_for(lambda: "of HTTP cancelled" in log(back))
    wait_for(lambda: front.counters.remote().result() == back.counters.remote().result() == QUIET)


def test_a_deadline_ends_the_calls_of_a_request(
    front: DeploymentHandle, back: DeploymentHandle, serve_instance: str
) -> None:
    answer = httpx.get(f"{serve_instance}/front", headers={"x-request-timeout-seconds": "0.3"}, timeout=20)
    assert answer.status_code == 408
    wait_for(lambda: "of HTTP cancelled" in log(back))
    wait_for(lambda: front.counters.remote().result() == back.counters.remote().result() == QUIET)


def test_a_storm_of_cancellations_leaves_nothing(front: DeploymentHandle, back: DeploymentHandle) -> None:
    """10,000 calls, most of them with calls of their own, cancelled at random moments: queued, running, ended."""
    chance = random.Random(4)
    ended = {"cancelled": 0, "answered": 0}

    async def one() -> None:
        response = front.work.remote(chance.randrange(4), chance.random() * 0.02)
        await asyncio.sleep(chance.random() * chance.choice([0, 0.002, 0.03]))
        response.cancel()
        try:
            await response
            ended["answered"] += 1
        except RequestCancelledError:
            ended["cancelled"] += 1

    async def storm() -> None:
        for _ in range(50):
            await asyncio.gather(*(one() for _ in range(200)))

    asyncio.run(storm())
    assert sum(ended.values()) == 10_000
    assert min(ended.values()) > 100, ended
    wait_for(lambda: caller.current().client.counters()["outstanding"] == 0)
    wait_for(lambda: front.counters.remote().result() == QUIET)
    wait_for(lambda: back.counters.remote().result() == QUIET)
