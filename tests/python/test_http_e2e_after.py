"""What a handler does after its answer is its own: no client ends it, however that leaves, behind middleware or not."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from http_pair import Address, exchange, ours, theirs
from starlette.requests import Request
from test_http_e2e_disconnect import CLOSE, leave_when

from rayserve_fast.ingress import ingress

#: What has become of the work after the answers.
told: queue.Queue[Any] = queue.Queue()
gate = threading.Event()

REQUESTS = 20


@pytest.fixture(autouse=True)
def fresh() -> None:
    gate.clear()
    told.queue.clear()


async def work() -> None:
    try:
        await asyncio.sleep(0.02)
        told.put("done")
    except BaseException as error:
        told.put(type(error).__name__)
        raise


async def opened() -> AsyncIterator[int]:
    yield 1
    await work()


async def background(tasks: BackgroundTasks) -> str:
    tasks.add_task(work)
    return "background"


async def teardown(_: Annotated[int, Depends(opened)]) -> str:
    return "teardown"


async def hang() -> None:
    told.put("begun")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        told.put("cancelled")
        raise


async def nothing(request: Request, call_next: Any) -> Any:
    return await call_next(request)


async def slow(request: Request, call_next: Any) -> Any:
    response = await call_next(request)
    await asyncio.sleep(0.001)
    return response


@pytest.fixture(scope="module", params=[None, nothing, slow], ids=["bare", "middleware", "slow middleware"])
def address(request: pytest.FixtureRequest) -> Iterator[Address]:
    app = FastAPI()
    for route in (background, teardown, hang):
        app.get(f"/{route.__name__}")(route)
    if request.param is not None:
        app.middleware("http")(request.param)

    class View:
        pass

    with ours(ingress(app)(View)) as address:
        yield address


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "close"])
@pytest.mark.parametrize("path", ["background", "teardown"])
def test_work_after_the_answer_comes_to_its_end(address: Address, path: str, keep: bool) -> None:
    url = f"http://{address[0]}:{address[1]}/{path}"
    headers = {} if keep else {"connection": "close"}
    with httpx.Client() as client:
        for _ in range(REQUESTS):
            assert client.get(url, headers=headers).json() == path
        if not keep:
            client.close()
        assert [told.get(timeout=10) for _ in range(REQUESTS)] == ["done"] * REQUESTS


def test_a_client_that_leaves_before_its_answer_cancels_the_handler(address: Address) -> None:
    leave_when(address, f"GET /hang HTTP/1.1\r\n{CLOSE}\r\n".encode(), lambda: told.get(timeout=10))
    assert told.get(timeout=10) == "cancelled"


async def ends_late(scope: Any, receive: Any, send: Any) -> None:
    """All that it has declared, and its last message much later."""
    assert scope["type"] == "http"
    try:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"hi", "more_body": True})
        await asyncio.to_thread(gate.wait, 10)
        await send({"type": "http.response.body"})
        told.put([(await receive())["type"] for _ in range(2)][-1])
    except BaseException as error:
        told.put(error)
        raise


@pytest.mark.parametrize("server", ["ours", "theirs"])
def test_the_length_that_was_declared_ends_the_answer_and_not_the_handler(server: str) -> None:
    with ours(ingress(ends_late)()) if server == "ours" else theirs(ends_late) as address:
        url = f"http://{address[0]}:{address[1]}/"
        with httpx.Client() as client:
            assert client.get(url).text == "hi"
        time.sleep(0.05)  # nothing tells that the server has seen the client leave
        gate.set()
        assert told.get(timeout=10) == "http.disconnect"


async def answers_within_the_body(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await receive()
    early = asyncio.ensure_future(receive())
    await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})
    told.put([(await early)["type"], (await receive())["type"]])


@pytest.mark.parametrize("server", ["ours", "theirs"])
def test_what_the_answer_has_left_of_the_body_never_comes(server: str) -> None:
    with (
        ours(ingress(answers_within_the_body)()) if server == "ours" else theirs(answers_within_the_body) as address,
        socket.create_connection(address, timeout=10) as connection,
    ):
        connection.sendall(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 200000\r\n\r\n" + b"x" * 100)
        assert told.get(timeout=10) == ["http.disconnect"] * 2


def test_an_endless_answer_beyond_its_length_ends() -> None:
    with ours(ingress(goes_on)()) as address:
        raw = f"GET / HTTP/1.1\r\n{CLOSE}\r\n".encode()
        (answer,) = exchange(address, raw)
        assert (answer.body, answer.complete) == (b"xx", True)
        assert told.get(timeout=10) in ("CancelledError", "OSError")


async def goes_on(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    try:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.001)
    except BaseException as error:
        told.put(type(error).__name__)
        raise
