"""FastAPI ingresses on a replica: routes, lifespan, disconnect, errors, background tasks and handle calls."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from contextlib import asynccontextmanager
from typing import Any

import pytest
import wire_client as wire
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from worker_replica import serving

from rayserve_fast import ingress
from rayserve_fast.controlplane.spec import DeploymentConfig

LOG: list[str] = []


class Item(BaseModel):
    name: str
    size: int = 1


@asynccontextmanager
async def lifespan(app: FastAPI) -> Any:
    LOG.append("up")
    yield {"shared": "state"}
    LOG.append("down")


app = FastAPI(lifespan=lifespan)


def suffix() -> str:
    return "!"


class Shop:
    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    @app.get("/hello/{name}")
    async def hello(self, name: str, end: str = Depends(suffix)) -> str:
        return f"{self.greeting} {name}{end}"

    @app.get("/sync")
    def sync(self) -> str:
        return self.greeting

    @app.post("/items")
    async def items(self, item: Item) -> Item:
        return Item(name=item.name.upper(), size=item.size + 1)

    @app.get("/missing")
    async def missing(self) -> None:
        raise HTTPException(404, "not here")

    @app.get("/fails")
    async def fails(self) -> None:
        raise ValueError("of the user")

    @app.get("/background")
    async def background(self, tasks: BackgroundTasks) -> str:
        tasks.add_task(LOG.append, "background")
        return "first"

    @app.get("/stream")
    async def stream(self) -> StreamingResponse:
        async def items() -> Any:
            try:
                while True:
                    yield b"item"
                    await asyncio.sleep(0.005)
            finally:
                LOG.append("stream ended")

        return StreamingResponse(items())

    async def by_handle(self, number: int) -> int:
        return number + 1


@pytest.fixture
def shop() -> Any:
    LOG.clear()
    with serving(ingress(app)(Shop), "hello", is_asgi=True) as replica:
        yield replica


def test_routes_dependencies_and_models_work(shop: Any) -> None:
    link = shop.link()
    assert link.get(1, path="/hello/you").body == b'"hello you!"'
    assert link.get(2, path="/p/hello/you", root_path="/p").body == b'"hello you!"'
    assert link.get(3, path="/sync").body == b'"hello"'
    headers = [("content-type", "application/json")]
    answer = link.get(4, b'{"name":"a"}', method="POST", path="/items", headers=headers)
    assert json.loads(answer.body) == {"name": "A", "size": 2}
    assert link.get(5, b"{}", method="POST", path="/items", headers=headers).status == 422
    assert link.get(6, path="/missing").status == 404
    failed = link.get(7, path="/fails")
    assert (failed.status, failed.body) == (500, b"Internal Server Error")
    assert link.get(8, path="/openapi.json").status == 200
    counters = shop.runtime.counters()
    assert (counters["running"], counters["streams"]) == (0, 0)


def test_lifespan_background_tasks_and_handles_work(shop: Any) -> None:
    link = shop.link()
    assert LOG == ["up"]
    assert link.get(1, path="/background").body == b'"first"'
    link.call(2, "by_handle", 4)
    assert wire.value(link.answer(2).last.payload) == 5
    shop.runtime.drain()
    assert shop.runtime.wait_idle(5)
    assert LOG == ["up", "background"]
    shop.runtime.stop()
    assert LOG == ["up", "background", "down"]


def test_the_log_of_a_failing_route_leaves_out_who_called_the_app(shop: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray").propagate = True
    with caplog.at_level(logging.ERROR, "ray.serve"):
        assert shop.link().get(1, path="/fails").status == 500
    assert "test_worker_ingress.py" in caplog.text
    assert "ValueError: of the user" in caplog.text
    assert "replica/asgi.py" not in caplog.text


def test_a_disconnect_ends_a_stream(shop: Any) -> None:
    link = shop.link()
    link.request(1, path="/stream")
    assert link.frame().aux == 200
    link.send(wire.CANCEL, 1)
    assert link.answer(1).last.aux == wire.CANCELLED
    shop.runtime.drain()
    assert shop.runtime.wait_idle(5)
    assert LOG == ["up", "stream ended"]


def test_as_many_sync_routes_run_at_once_as_requests_may() -> None:
    """More than the 40 threads that anyio takes by itself, and as many as a later limit says."""
    api = FastAPI()

    class Meeting:
        def __init__(self) -> None:
            self.barriers = {number: threading.Barrier(number) for number in (45, 50)}

        @api.get("/{number}")
        def meet(self, number: int) -> int:
            self.barriers[number].wait(5)
            return number

    with serving(ingress(api)(Meeting), is_asgi=True, max_ongoing_requests=45) as replica:
        link = replica.link()
        for number in (45, 50):
            replica.runtime.reconfigure(DeploymentConfig(max_ongoing_requests=number))
            for stream in range(number):
                link.request(100 * number + stream, path=f"/{number}")
            assert [link.frame().aux for _ in range(number)] == [200] * number
