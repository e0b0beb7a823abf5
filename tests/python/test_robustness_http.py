"""What must not break the path: handlers that exit, fork or never yield, and clients that misbehave in crowds.

Everything goes through the real proxy into a real replica, and ends with the same replica process answering and nothing
left open in it or in the proxy.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from deployed import counters_of, pid_of, proxy_actor, replica_actors, until_running, wait_for
from starlette.requests import Request
from starlette.responses import StreamingResponse

from rayserve_fast import serve

HEAD = b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n"


def until_quiet(actor: Any, *gauges: str) -> None:
    """Return when none of these of the actor's counters is above zero."""
    wait_for(lambda: not any(counters_of(actor)[gauge] for gauge in gauges), 10, lambda: counters_of(actor))


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@serve.deployment(max_ongoing_requests=100)
class Hostile:
    """Does to its replica what the path names."""

    def __init__(self) -> None:
        self.cancelled = 0

    async def __call__(self, request: Request) -> Any:
        act = getattr(self, request.url.path.strip("/").replace("-", "_"))
        result = act(request)
        return await result if asyncio.iscoroutine(result) else result

    def ok(self, _: Request) -> int:
        return os.getpid()

    def exits(self, _: Request) -> None:
        sys.exit(3)

    def interrupts(self, _: Request) -> None:
        raise KeyboardInterrupt

    async def exits_later(self, _: Request) -> None:
        await asyncio.sleep(0.01)
        sys.exit(3)

    async def task_exits(self, _: Request) -> str:
        async def leave() -> None:
            sys.exit(3)

        task = asyncio.ensure_future(leave())
        await asyncio.wait([task], timeout=10)
        return f"the task is done: {task.done()}"

    async def hang(self, _: Request) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def cancellations(self, _: Request) -> int:
        return self.cancelled

    def forks(self, _: Request) -> int:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=False)
        child.start()
        assert child.pid is not None
        return child.pid

    async def body(self, request: Request) -> int:
        return len(await request.body())

    def endless(self, _: Request) -> StreamingResponse:
        async def items() -> AsyncIterator[bytes]:
            n = 0
            while True:  # no await that suspends
                n += 1
                yield b"%d\n" % n

        return StreamingResponse(items())

    def endless_sync(self, _: Request) -> StreamingResponse:
        def items() -> Iterator[bytes]:
            while True:
                yield b"x" * 100

        return StreamingResponse(items())


@pytest.fixture
def hostile(serve_instance: str) -> str:
    serve.run(Hostile.bind())
    return serve_instance


def pid_at(url: str) -> int:
    response = requests.get(f"{url}/ok", timeout=20)
    assert response.status_code == 200
    return int(response.text)


@pytest.mark.parametrize("how", ["exits", "interrupts", "exits-later"])
def test_a_handler_that_exits_harms_only_its_own_request(hostile: str, how: str) -> None:
    before = pid_at(hostile)
    for _ in range(5):
        response = requests.get(f"{hostile}/{how}", timeout=20)
        assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert pid_at(hostile) == before


def test_a_task_of_the_user_that_exits_harms_only_itself(hostile: str) -> None:
    before = pid_at(hostile)
    assert requests.get(f"{hostile}/task-exits", timeout=20).text == "the task is done: True"
    assert pid_at(hostile) == before


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_sync_handlers_may_raise_anything(serve_instance: str, error: type[BaseException]) -> None:
    @serve.deployment
    def leave(request: Request) -> int:
        if request.url.path == "/leave":
            raise error
        return os.getpid()

    serve.run(leave.bind())
    before = requests.get(f"{serve_instance}/", timeout=20).text
    for _ in range(5):
        assert requests.get(f"{serve_instance}/leave", timeout=20).status_code == 500
    assert requests.get(f"{serve_instance}/", timeout=20).text == before


def test_a_child_that_outlives_its_replica_does_not_hide_the_death(serve_instance: str) -> None:
    serve.run(Hostile.bind())
    child = int(requests.get(f"{serve_instance}/forks", timeout=20).text)
    with open(f"/proc/{child}/stat") as stat:
        replica = int(stat.read().rpartition(")")[2].split()[1])
    try:
        assert [pid_at(serve_instance) for _ in range(5)] == [replica] * 5, "it goes on serving with its child"
        os.kill(replica, signal.SIGKILL)
        # Ray would see the death only when the child has ended too, for it inherits Ray's sockets.
        assert pid_at(serve_instance) != replica, "the successor answers"
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("path", ["/endless", "/endless-sync"])
def test_a_generator_that_never_suspends_streams_and_starves_nobody(hostile: str, path: str) -> None:
    with connect(hostile) as client:
        client.sendall(HEAD % path.encode())
        received = b""
        while len(received) < 1_000_000:
            received += client.recv(65536)
        for _ in range(20):
            began = time.monotonic()
            pid_at(hostile)
            assert time.monotonic() - began < 2
    (replica,) = replica_actors()
    until_quiet(replica, "running")


def test_a_client_that_goes_away_frees_the_slot(serve_instance: str) -> None:
    serve.run(Hostile.options(max_ongoing_requests=1).bind())
    for _ in range(10):
        with connect(serve_instance) as client:
            client.sendall(HEAD % b"/hang")
            until_running(1)
        until_running(0)
    assert requests.get(f"{serve_instance}/cancellations", timeout=20).text == "10"


def test_a_storm_of_bad_clients_leaves_nothing_open(hostile: str) -> None:
    pid_at(hostile)
    proxy, replica = pid_of(proxy_actor()), pid_at(hostile)
    before = descriptors(proxy), descriptors(replica)
    dice = random.Random(7)
    bad = [
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(200),  # TLS
        lambda: b"GET / HTTP/9.9\r\n\r\n",
        lambda: b"GET /ok HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        lambda: b"POST /body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        lambda: b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + b"x" * dice.randrange(100_000),
        lambda: b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        lambda: b"GET /o",
        lambda: HEAD % b"/hang",
        lambda: HEAD % b"/endless",
        lambda: (HEAD % b"/ok") * 50 + b"GET /hang HT",
        lambda: dice.randbytes(1000),
    ]
    clients = []
    for i in range(440):
        client = connect(hostile)
        client.sendall(bad[i % len(bad)]())
        clients.append(client)
        if len(clients) > 100:
            victim = clients.pop(dice.randrange(len(clients)))
            if dice.random() < 0.5:  # half of them leave with a reset
                victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            elif dice.random() < 0.5:
                victim.shutdown(socket.SHUT_WR)
            victim.close()
        if i % 20 == 0:
            assert pid_at(hostile) == replica, "others are served meanwhile"
    for client in clients:
        client.close()
    (actor,) = replica_actors()
    until_quiet(actor, "running", "streams")
    until_quiet(proxy_actor(), "requests_open", "streams")
    wait_for(lambda: descriptors(proxy) <= before[0] + 5, 10, so_far=lambda: "connections of the proxy")
    assert descriptors(replica) <= before[1] + 5  # Ray opens a few of its own
    assert pid_at(hostile) == replica


def pipeline(url: str, path: bytes, total: int, depth: int = 100) -> None:
    """Sends `total` requests on one connection, `depth` at a time, and counts the answers."""
    batch = (HEAD % path) * depth
    with connect(url) as client:
        for _ in range(total // depth):
            client.sendall(batch)
            answered, rest = 0, b""
            while answered < depth:
                received = client.recv(1 << 16)
                assert received, "the proxy hung up"
                rest += received
                answered += rest.count(b"HTTP/1.1 200")
                rest = rest[-11:]


@pytest.mark.parametrize("total", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_requests_leave_memory_flat(serve_instance: str, total: int) -> None:
    @serve.deployment(max_ongoing_requests=100)
    async def nothing(_: Request) -> bytes:
        return b""

    serve.run(nothing.bind())
    (replica,) = replica_actors()
    pids = pid_of(proxy_actor()), pid_of(replica)
    pipeline(serve_instance, b"/", 20_000)
    before = [rss(pid) for pid in pids]
    pipeline(serve_instance, b"/", total)
    growth = [rss(pid) - start for pid, start in zip(pids, before, strict=True)]
    assert max(growth) < 3_000_000, f"bytes grown in proxy and replica: {growth}"  # 3 bytes a request of the million
