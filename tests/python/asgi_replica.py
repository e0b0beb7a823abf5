"""A replica's ASGI application in this process, driven through httpx: the fixture `serve`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from ray import cloudpickle

from rayserve_fast.definition import dump_code
from rayserve_fast.ingress import asgi_app_of
from rayserve_fast.replica.asgi import AsgiApp


async def replica_of(cls: type, *args: Any) -> AsgiApp:
    """What a replica does with a class: unpickle, construct, start."""
    cls = cloudpickle.loads(dump_code(cls, None, "a class"))
    asgi = asgi_app_of(cls)
    assert asgi is not None
    instance = cls.__new__(cls)
    done = instance.__init__(*args)
    if inspect.isawaitable(done):
        await done
    app = AsgiApp(asgi, instance)
    await app.start()
    return app


async def fetch(app: Any, method: str, target: str, root_path: str = "", **options: Any) -> httpx.Response:
    """A request as it comes through the proxy: the path whole, the route prefix in root_path."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
        return await client.request(method, target, **options)


Serve = Callable[..., Callable[..., httpx.Response]]


@pytest.fixture(name="serve")
def serving() -> Iterator[Serve]:
    """`serve(cls, *arguments)` starts a replica and returns what sends requests to it; all live in one loop."""
    loop = asyncio.new_event_loop()
    replicas = []

    def start(cls: type, *args: Any) -> Callable[..., httpx.Response]:
        app = loop.run_until_complete(replica_of(cls, *args))
        replicas.append(app)
        return lambda method, target, **options: loop.run_until_complete(fetch(app, method, target, **options))

    yield start
    for app in replicas:
        loop.run_until_complete(app.stop())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
