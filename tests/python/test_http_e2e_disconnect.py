"""A client that leaves is noticed by whatever waits for it, and what is streamed comes piece by piece."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from http_pair import Address, exchange, ours
from starlette.background import BackgroundTask
from starlette.responses import (
    PlainTextResponse,
    StreamingResponse,
)

CLOSE = "host: h\r\nconnection: close\r\n"


def test_stream_arrives_item_by_item() -> None:
    """The second item waits until the client has the first."""
    gate = threading.Event()

    async def items() -> AsyncIterator[bytes]:
        yield b"first"
        yield b"second" if await asyncio.to_thread(gate.wait, 10) else b"never let go"

    async def handler() -> StreamingResponse:
        return StreamingResponse(items())

    with ours(by_reference(handler)) as address, socket.create_connection(address, timeout=10) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\n{CLOSE}\r\n".encode())
        received = b""
        while b"first" not in received:
            received += connection.recv(65536)
        assert b"second" not in received
        gate.set()
        while piece := connection.recv(65536):
            received += piece
        assert b"second" in received


HANDLERS: dict[str, Callable[..., Any]] = {}


def by_reference(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that is pickled as a name of this module, so that it shares the test's events and queues."""
    name = handler.__qualname__
    HANDLERS[name] = handler

    async def call(request: Any) -> Any:
        from test_http_e2e_disconnect import HANDLERS

        shared = HANDLERS[name]
        return await (shared(request) if shared.__code__.co_argcount else shared())

    return call


def leave_when(address: Address, sent: bytes, ready: Callable[[], Any], half: bool = False) -> None:
    """Connect, send, and disconnect as soon as `ready` returns."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent)
        ready()
        if half:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1000) == b""


@pytest.mark.parametrize("half", [False, True])
def test_client_that_leaves_cancels_the_handler(half: bool) -> None:
    told: queue.Queue[str] = queue.Queue()

    async def wait() -> None:
        told.put("begun")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.put("cancelled")
            raise

    with ours(by_reference(wait)) as address:
        leave_when(address, f"GET / HTTP/1.1\r\n{CLOSE}\r\n".encode(), lambda: told.get(timeout=10), half)
        assert told.get(timeout=10) == "cancelled"


def test_client_that_leaves_ends_a_stream() -> None:
    told: queue.Queue[str] = queue.Queue()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
                told.put("sent")
                await asyncio.sleep(0.001)
        finally:
            told.put("closed")

    async def stream() -> StreamingResponse:
        return StreamingResponse(endless())

    with ours(by_reference(stream)) as address:
        leave_when(address, f"GET / HTTP/1.1\r\n{CLOSE}\r\n".encode(), lambda: told.get(timeout=10))
        deadline = time.monotonic() + 10
        while told.get(timeout=10) != "closed":
            assert time.monotonic() < deadline


def test_receive_tells_the_disconnect_that_follows_the_body() -> None:
    told: queue.Queue[Any] = queue.Queue()

    async def listen(request: Any) -> None:
        told.put((await request.body(), await request.is_disconnected()))
        try:
            told.put((await request.receive())["type"])
        except asyncio.CancelledError:
            told.put((await request.is_disconnected(), (await request.receive())["type"]))
            raise

    with ours(by_reference(listen)) as address:
        leave_when(
            address,
            f"POST / HTTP/1.1\r\n{CLOSE}content-length: 2\r\n\r\nhi".encode(),
            lambda: told.put(told.get(timeout=10)),
        )
        assert told.get(timeout=10) == (b"hi", False)
        assert told.get(timeout=10) in ("http.disconnect", (True, "http.disconnect"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_handler_that_is_not_to_be_cancelled_is_told_when_its_client_leaves(streaming: bool) -> None:
    told: queue.Queue[Any] = queue.Queue()

    async def poll(request: Any) -> Any:
        told.put(await request.is_disconnected())
        until = time.monotonic() + 10
        while not await request.is_disconnected() and time.monotonic() < until:
            await asyncio.sleep(0.001)
        told.put((await request.is_disconnected(), await request.body(), (await request.receive())["type"]))

    async def handler(request: Any) -> Any:
        async def items() -> AsyncIterator[bytes]:
            yield b"first"
            await poll(request)
            yield b"second"
            told.put("end")

        if streaming:
            return StreamingResponse(items())
        await poll(request)
        told.put("end")
        return None

    with ours(by_reference(handler)) as address:
        head = f"POST / HTTP/1.1\r\n{CLOSE}x-request-disconnect-disabled: ?1\r\ncontent-length: 2\r\n\r\n"
        leave_when(address, f"{head}hi".encode(), lambda: told.put(told.get(timeout=10)))
        assert told.get(timeout=10) is False
        assert told.get(timeout=10) == (True, b"hi", "http.disconnect")
        assert told.get(timeout=10) == "end"


def test_client_that_leaves_in_the_middle_of_its_body_is_noticed() -> None:
    told: queue.Queue[Any] = queue.Queue()

    async def read(request: Any) -> None:
        told.put("begun")
        try:
            await request.body()
        except BaseException as error:
            told.put(type(error).__name__)
            raise

    with ours(by_reference(read)) as address:
        raw = f"POST / HTTP/1.1\r\n{CLOSE}content-length: 200000\r\n\r\n".encode() + b"x" * 100_000
        leave_when(address, raw, lambda: told.get(timeout=10))
        assert told.get(timeout=10) in ("ClientDisconnect", "CancelledError")


def test_background_task_runs_after_the_answer() -> None:
    told: queue.Queue[str] = queue.Queue()
    gate = threading.Event()

    async def later() -> None:
        told.put("ran" if await asyncio.to_thread(gate.wait, 10) else "never let go")

    async def begin() -> PlainTextResponse:
        return PlainTextResponse("now", background=BackgroundTask(later))

    with ours(by_reference(begin)) as address:
        (answer,) = exchange(address, f"GET / HTTP/1.1\r\n{CLOSE}\r\n".encode())
        assert (answer.body, told.empty()) == (b"now", True)
        gate.set()
        assert told.get(timeout=10) == "ran"
