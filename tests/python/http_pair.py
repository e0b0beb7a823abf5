"""Two servers for one handler: this project's proxy and replica, and uvicorn as it stands inside Ray Serve.

`ours` runs a proxy and a replica in this process, without Ray. `theirs` runs uvicorn around an ASGI application that
does what Ray Serve's proxy and replica do between them: scope the request to the application, name it, convert the
result. Each listens on a port of its own; tests send the same bytes to both and compare what comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from ray import cloudpickle
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from rayserve_fast._core import Proxy
from rayserve_fast.controlplane.options import forwarded_allow_ips
from rayserve_fast.controlplane.spec import Definition, DeploymentConfig, DeploymentSpec, DriverEnv, ReplicaSpec
from rayserve_fast.ingress import asgi_app_of
from rayserve_fast.replica.runtime import ReplicaRuntime

TOKEN = bytes(range(32))
Address = tuple[str, int]


@contextlib.contextmanager
def ours(
    target: Any,
    prefix: str = "/",
    root_path: str = "",
    *args: Any,
    routes: Sequence[dict[str, Any]] = (),
    **config: Any,
) -> Iterator[Address]:
    """The address of a proxy that routes `prefix` to one replica of a function or class, or all of `routes`."""
    options = DeploymentConfig(**config)
    deployment = DeploymentSpec(
        app="default",
        name="D",
        definition=cloudpickle.dumps(Definition(target, args, {})),
        config=options,
        driver=DriverEnv(),
        is_asgi=asgi_app_of(target) is not None,
        docs_path=None,
        code_version="1",
    )
    with tempfile.TemporaryDirectory(prefix="rsf") as directory, contextlib.ExitStack() as stack:
        runtime = ReplicaRuntime(ReplicaSpec("r1", deployment, TOKEN, directory, prefix))
        replica = runtime.start()
        stack.callback(runtime.stop)
        proxy = Proxy(json.dumps(proxy_config(root_path)).encode())
        address = proxy.start()
        stack.callback(proxy.shutdown, 5.0)
        published = snapshot(prefix, options, replica.unix)
        if routes:
            published["routes"] = [{"app": "default", "deployment": "default#D", **route} for route in routes]
        assert proxy.publish(json.dumps(published).encode())
        assert proxy.wait_linked(["r1"], 10.0) == []
        yield address


def proxy_config(root_path: str) -> dict[str, Any]:
    return {
        "host": "127.0.0.1",
        "port": 0,
        "root_path": root_path,
        "request_timeout_s": None,
        "keep_alive_timeout_s": 90.0,
        "max_head_bytes": 65536,
        "max_body_bytes": None,
        "shards": 1,
        "node_id": "n",
        "token": TOKEN.hex(),
        "snapshot_path": None,
        "session_header": "x-session-id",
        "prefer_local_node": True,
        "forwarded_allow_ips": forwarded_allow_ips(),
    }


def batch_of(options: DeploymentConfig) -> dict[str, Any] | None:
    if options.max_batch_size is None:
        return None
    return {
        "max_size": options.max_batch_size,
        "wait_s": options.batch_wait_timeout_s,
        "concurrent": options.max_concurrent_batches,
    }


def snapshot(prefix: str, options: DeploymentConfig, unix: str | None) -> dict[str, Any]:
    return {
        "version": [1, 1],
        "routes": [{"prefix": prefix, "app": "default", "deployment": "default#D"}],
        "deployments": {
            "default#D": {
                "app": "default",
                "name": "D",
                "max_ongoing_requests": options.max_ongoing_requests,
                "max_queued_requests": options.max_queued_requests,
                "backpressure": {"status_code": 503, "retry_after_s": None},
                "retry_idempotent": True,
                "unavailable": None,
                "batch": batch_of(options),
                "replicas": [{"id": "r1", "node_id": "n", "unix": unix, "tcp": None}],
            }
        },
    }


@contextlib.contextmanager
def theirs(handler: Callable[..., Any], prefix: str = "/", root_path: str = "") -> Iterator[Address]:
    """The address of a uvicorn that serves a plain handler, or an ASGI callable, as Ray Serve would."""
    config = uvicorn.Config(
        RayServe(handler, prefix), root_path=root_path, lifespan="off", access_log=False, log_config=None,
        timeout_keep_alive=90, http="httptools", loop="asyncio",
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),), daemon=True)
        thread.start()
        yield listener.getsockname()
        server.should_exit = server.force_exit = True
        thread.join(10)


class RayServe:
    """What stands between uvicorn and a handler in Ray Serve, as an ASGI application."""

    def __init__(self, handler: Callable[..., Any], prefix: str) -> None:
        self.handler = handler
        self.prefix = "" if prefix == "/" else prefix
        self.is_asgi = len(inspect.signature(handler).parameters) == 3

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        names = dict(scope["headers"])
        if b"x-request-id" not in names:
            scope["headers"].append((b"x-request-id", b"made"))
        request_id = names.get(b"x-request-id", b"made")

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        scope["root_path"] += self.prefix
        if self.is_asgi:
            return await self.handler(scope, receive, named)
        try:
            result = self.handler(Request(scope, receive, named))
            if inspect.isawaitable(result):
                result = await result
        except Exception:
            result = Response("Internal Server Error", 500)
        if isinstance(result, str):
            result = PlainTextResponse(result)
        elif isinstance(result, bytes) or result is None:
            result = Response(result, headers={"content-type": "text/plain"})
        elif not isinstance(result, Response):
            result = JSONResponse(result)
        await result(scope, receive, named)
        return None


@dataclass
class Answer:
    """One response as it stood on the wire, its body decoded."""

    version: str
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    complete: bool  # ended as its framing promised

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


def exchange(address: Address, sent: bytes, methods: str = "GET") -> list[Answer]:
    """Send bytes, read until the server closes; `methods` are those of the requests, separated by blanks."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
    return list(parse(received, methods.split()))


def parse(received: bytes, methods: list[str]) -> Iterator[Answer]:
    expected = iter(methods)
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = first.split(" ", 2)
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        answer = Answer(version, int(status), headers, b"", True)
        if answer.status == 100:
            yield answer
            continue
        bodiless = next(expected, "GET") == "HEAD" or answer.status in (204, 304)
        if bodiless:
            pass
        elif "chunked" in answer.all("transfer-encoding"):
            answer.body, answer.complete, received = dechunk(received)
        elif lengths := answer.all("content-length"):
            length = int(lengths[0])
            answer.body, received = received[:length], received[length:]
            answer.complete = len(answer.body) == length
        else:
            answer.body, received = received, b""
        yield answer


def dechunk(received: bytes) -> tuple[bytes, bool, bytes]:
    body = b""
    while True:
        size, found, rest = received.partition(b"\r\n")
        if not found or len(rest) < int(size, 16) + 2:
            return body + rest, False, b""
        length = int(size, 16)
        body, received = body + rest[:length], rest[length + 2 :]
        if length == 0:
            return body, True, received
