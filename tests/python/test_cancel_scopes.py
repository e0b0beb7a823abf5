"""Whoever cancels a wait for a call knows its own cancellation again, by its message: anyio's scopes and asyncio's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from composed import Run

from rayserve_fast import serve
from rayserve_fast.handle import DeploymentHandle


@serve.deployment(max_ongoing_requests=20, graceful_shutdown_timeout_s=0.1)
class Slow:
    async def __call__(self) -> None:
        await asyncio.sleep(60)

    async def items(self) -> AsyncIterator[int]:
        yield 0
        await asyncio.sleep(60)

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=60)
    async def batched(self, items: list[int]) -> list[int]:
        return items

    async def scoped_batch(self, way: str) -> Any:
        return await WAYS[way](lambda: self.batched(1))


async def one(handle: DeploymentHandle) -> None:
    await handle.remote()


async def stream(handle: DeploymentHandle) -> None:
    async for item in handle.options(stream=True).items.remote():
        assert item == 0


WAITS: dict[str, Callable[[DeploymentHandle], Awaitable[None]]] = {"one": one, "stream": stream}


async def moved_on(wait: Callable[[], Awaitable[Any]]) -> Any:
    with anyio.move_on_after(0.1) as scope:
        await wait()
    return scope.cancelled_caught


async def failed(wait: Callable[[], Awaitable[Any]]) -> Any:
    with pytest.raises(TimeoutError), anyio.fail_after(0.1):
        await wait()
    return True


async def grouped(wait: Callable[[], Awaitable[Any]]) -> Any:
    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.sleep(0.1)
        group.cancel_scope.cancel()
    return True


async def cancelled(wait: Callable[[], Awaitable[Any]]) -> Any:
    messages: list[Any] = []

    async def waits() -> None:
        try:
            await wait()
        except asyncio.CancelledError as error:
            messages.append(error.args)
            raise

    for message in ((), ("why",)):
        task = asyncio.create_task(waits())
        await asyncio.sleep(0.1)
        task.cancel(*message)
        await asyncio.wait([task])
    return messages == [(), ("why",)]


WAYS: dict[str, Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]] = {
    "move_on_after": moved_on,
    "fail_after": failed,
    "task group": grouped,
    "message": cancelled,
}


@serve.deployment(max_ongoing_requests=20)
class Scoped:
    def __init__(self, slow: DeploymentHandle) -> None:
        self.slow = slow

    async def __call__(self, wait: str, way: str) -> Any:
        return await WAYS[way](lambda: WAITS[wait](self.slow))


@pytest.mark.parametrize("wait", WAITS)
def test_scopes_around_calls(run: Run, wait: str) -> None:
    handle = run(Scoped.bind(Slow.bind()))
    slow = serve.get_deployment_handle("Slow", "default")
    for way, scope in WAYS.items():
        assert asyncio.run(scope(lambda: WAITS[wait](slow))) is True, way  # type: ignore[arg-type]
        assert handle.remote(wait, way).result(timeout_s=20) is True, way


def test_scopes_around_batched_calls(run: Run) -> None:
    handle = run(Slow.bind())
    for way in WAYS:
        assert handle.scoped_batch.remote(way).result(timeout_s=20) is True, way
