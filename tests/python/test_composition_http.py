"""Composed applications behind HTTP: what streams, fails and is cancelled between a client and the last deployment."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray
import requests
from deployed import wait_for
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.requests import Request

from rayserve_fast import serve
from rayserve_fast.handle import DeploymentHandle

api = FastAPI()


@serve.deployment(max_ongoing_requests=100)
class Model:
    def __init__(self) -> None:
        self.running = 0
        self.ended: list[str] = []
        self.gate = asyncio.Event()

    async def tokens(self, n: int) -> AsyncIterator[str]:
        """The first at once, the others when the gate is open."""
        try:
            for i in range(n):
                yield f"token{i} "
                await self.gate.wait()
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise

    async def hang(self) -> None:
        self.running += 1
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        finally:
            self.running -= 1

    def fail(self) -> None:
        raise ZeroDivisionError("the model")

    async def let_through(self, open: bool) -> None:
        (self.gate.set if open else self.gate.clear)()

    async def state(self) -> tuple[int, list[str]]:
        return self.running, self.ended


@serve.deployment(max_ongoing_requests=100)
class Middle:
    """One more hop, so that what happens at one end must pass through somebody to the other."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def tokens(self, n: int) -> AsyncIterator[str]:
        async for token in self.model.options(stream=True).tokens.remote(n):
            yield token

    async def hang(self) -> None:
        await self.model.hang.remote()

    def hang_sync(self) -> None:
        self.model.hang.remote().result()


@serve.deployment(max_ongoing_requests=100)
@serve.ingress(api)
class Api:
    def __init__(self, model: DeploymentHandle, middle: DeploymentHandle) -> None:
        self.model, self.middle = model, middle

    @api.get("/tokens")
    async def tokens(self, n: int) -> StreamingResponse:
        return StreamingResponse(self.middle.options(stream=True).tokens.remote(n), media_type="text/plain")

    @api.get("/events")
    async def events(self, n: int) -> StreamingResponse:
        stream = self.model.options(stream=True).tokens.remote(n)
        return StreamingResponse((f"data: {token}\n\n" async for token in stream), media_type="text/event-stream")

    @api.get("/hang")
    async def hang(self) -> None:
        await self.middle.hang.remote()

    @api.get("/hang_many")
    async def hang_many(self) -> None:
        await asyncio.gather(*(self.middle.hang.remote() for _ in range(8)))

    @api.get("/fail")
    async def fail(self) -> Any:
        return await self.model.fail.remote()

    @api.get("/caught")
    async def caught(self) -> str:
        try:
            return str(await self.model.fail.remote())
        except ZeroDivisionError as error:
            return f"caught {type(error.cause).__name__}"  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def deployed(serve_url: str) -> Iterator[tuple[str, DeploymentHandle]]:
    model = Model.bind()
    serve.run(Api.bind(model, Middle.bind(model)), name="composed", route_prefix="/composed")
    yield f"{serve_url}/composed", serve.get_deployment_handle("Model", "composed")
    serve.delete("composed")


@pytest.fixture
def url(deployed: tuple[str, DeploymentHandle]) -> str:
    return deployed[0]


class Watched:
    """The model, and what has ended there since the test began."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle
        self.before = len(self.state()[1])

    def state(self) -> tuple[int, list[str]]:
        state: tuple[int, list[str]] = self.handle.state.remote().result(timeout_s=20)
        return state

    def running(self) -> int:
        return self.state()[0]

    def ended(self) -> list[str]:
        return self.state()[1][self.before :]

    def let_through(self, open: bool) -> None:
        self.handle.let_through.remote(open).result(timeout_s=20)


@pytest.fixture
def model(deployed: tuple[str, DeploymentHandle]) -> Watched:
    return Watched(deployed[1])


class Client:
    """A connection that asks once, reads when told to, and leaves when told to."""

    def __init__(self, url: str, path: str) -> None:
        host, _, rest = url.removeprefix("http://").partition("/")
        address, _, port = host.partition(":")
        self.socket = socket.create_connection((address, int(port)), timeout=20)
        self.socket.sendall(f"GET /{rest}{path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n".encode())
        self.received = b""

    def read_until(self, text: bytes) -> bytes:
        while text not in self.received:
            piece = self.socket.recv(65536)
            assert piece, f"the answer ended without {text!r}: {self.received!r}"
            self.received += piece
        return self.received

    def leave(self) -> None:
        self.socket.close()


@pytest.mark.parametrize(("path", "last"), [("/tokens?n=3", b"token2"), ("/events?n=3", b"data: token2")])
def test_a_client_has_the_first_item_before_the_next_is_made(url: str, model: Watched, path: str, last: bytes) -> None:
    client = Client(url, path)
    assert b"token1" not in client.read_until(b"token0")
    model.let_through(True)
    client.read_until(last)
    client.leave()
    model.let_through(False)
    assert model.ended() == []


@pytest.mark.parametrize("path", ["/tokens?n=3", "/events?n=3"])
def test_a_client_that_leaves_ends_the_stream_at_its_source(url: str, model: Watched, path: str) -> None:
    clients = [Client(url, path) for _ in range(5)]
    for client in clients:
        client.read_until(b"token0")
        client.leave()
    wait_for(lambda: model.ended() == ["CancelledError"] * 5, 15)


@pytest.mark.parametrize(("path", "calls"), [("/hang", 1), ("/hang_many", 8)])
def test_a_client_that_leaves_cancels_what_its_request_has_called(
    url: str, model: Watched, path: str, calls: int
) -> None:
    client = Client(url, path)
    wait_for(lambda: model.running() == calls, 15)
    client.leave()
    wait_for(lambda: model.running() == 0, 15)
    assert model.ended() == ["CancelledError"] * calls


def test_a_deadline_cancels_what_the_request_has_called(url: str, model: Watched) -> None:
    answer = requests.get(f"{url}/hang", headers={"x-request-timeout-seconds": "0.5"}, timeout=20)
    assert answer.status_code == 408
    wait_for(lambda: model.ended() == ["CancelledError"], 15)


def test_an_error_of_a_called_deployment_is_the_handler_s_to_catch(url: str) -> None:
    assert requests.get(f"{url}/fail", timeout=20).status_code == 500
    assert requests.get(f"{url}/caught", timeout=20).json() == "caught ZeroDivisionError"


def test_a_handler_without_a_framework_streams_what_it_calls(serve_url: str) -> None:
    @serve.deployment
    class Numbers:
        async def count(self, n: int) -> AsyncIterator[str]:
            for i in range(n):
                yield f"{i} "

    @serve.deployment
    class Ingress:
        def __init__(self, numbers: DeploymentHandle) -> None:
            self.numbers = numbers.options(stream=True)

        async def __call__(self, request: Request) -> StreamingResponse:
            return StreamingResponse(self.numbers.count.remote(int(request.query_params["n"])))

    serve.run(Ingress.bind(Numbers.bind()), name="numbers", route_prefix="/numbers")
    answer = requests.get(f"{serve_url}/numbers", params={"n": 1000}, timeout=20)
    serve.delete("numbers")
    assert answer.text == "".join(f"{i} " for i in range(1000))


def test_tasks_and_actors_of_ray_use_handles(serve_url: str) -> None:
    @serve.deployment(max_ongoing_requests=100)
    class Echo:
        async def __call__(self, x: int) -> int:
            return x

        def count(self, n: int) -> Iterator[int]:
            yield from range(n)

    handle = serve.run(Echo.bind(), name="echo", route_prefix=None)

    @ray.remote
    def task(handle: DeploymentHandle) -> tuple[int, list[int]]:
        return handle.remote(1).result(timeout_s=20), list(handle.options(stream=True).count.remote(3))

    @ray.remote
    class AsyncActor:
        async def call(self, handle: DeploymentHandle) -> list[int]:
            answers = await asyncio.gather(*(handle.remote(i) for i in range(20)))
            return [*answers, *[i async for i in handle.options(stream=True).count.remote(3)]]

    @ray.remote(max_concurrency=4)
    class ThreadedActor:
        def call(self) -> int:
            return serve.get_app_handle("echo").remote(7).result(timeout_s=20)

    actor, threaded = AsyncActor.remote(), ThreadedActor.remote()
    assert ray.get(task.remote(handle), timeout=60) == (1, [0, 1, 2])
    assert ray.get(actor.call.remote(handle), timeout=60) == [*range(20), 0, 1, 2]
    assert ray.get([threaded.call.remote() for _ in range(4)], timeout=60) == [7] * 4
    for each in (actor, threaded):
        ray.kill(each)
    serve.delete("echo")
