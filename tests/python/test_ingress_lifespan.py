"""An application's lifespan is the replica's: it starts with it, fails it, lends its state, stops with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgi_replica import Serve, fetch, replica_of, serving  # noqa: F401 - a fixture
from fastapi import FastAPI, Request

from rayserve_fast.ingress import ingress

events: list[str] = []


def lifespan_app(fail_at: str = "") -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        if fail_at == "start":
            raise ValueError("no database")
        events.append("start")
        yield {"database": "open"}
        events.append("stop")
        if fail_at == "stop":
            raise ValueError("cannot close")

    app = FastAPI(lifespan=lifespan)
    app.get("/")(lambda request: request.state.database)
    app.get("/state")(read_state)
    return app


def read_state(request: Request) -> str:
    return str(request.state.database)


def test_lifespan_starts_lends_its_state_and_stops() -> None:
    async def life() -> None:
        replica = await replica_of(ingress(lifespan_app)())
        assert events == ["start"]
        assert (await fetch(replica, "GET", "/state")).json() == "open"
        await replica.stop()
        assert events == ["start", "stop"]
        await replica.stop()

    events.clear()
    asyncio.run(life())


def test_lifespan_that_fails_to_start_fails_the_replica() -> None:
    with pytest.raises(RuntimeError, match="no database") as raised:
        asyncio.run(replica_of(ingress(lambda: lifespan_app("start"))()))
    assert isinstance(raised.value.__cause__, ValueError)


def test_lifespan_that_fails_after_asking_fails_the_replica() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise KeyError("model")

    with pytest.raises(RuntimeError, match="model"):
        asyncio.run(replica_of(ingress(app)()))


def test_lifespan_that_fails_to_stop_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def life() -> None:
        await (await replica_of(ingress(lambda: lifespan_app("stop"))())).stop()

    caplog.set_level(logging.ERROR, "ray.serve")
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    try:
        asyncio.run(life())
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert "cannot close" in caplog.text
