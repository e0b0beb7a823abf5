"""The benchmark's load at a fixed rate: it keeps the rate whatever the server does, and counts waiting as time."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import load

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


class Server:
    """Answers request number n of all connections with `answer(n)` after `delay` seconds."""

    def __init__(self, answer: Callable[[int], bytes], delay: float) -> None:
        self.answer, self.delay, self.seen, self.bodies = answer, delay, 0, set[bytes]()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            self.bodies.add(await reader.readexactly(length))
            self.seen += 1
            answer = self.answer(self.seen)
            await asyncio.sleep(self.delay)
            writer.write(answer)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # connections that the client has closed
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def measure(
    loop: asyncio.AbstractEventLoop, server: Server, rate: float, seconds: float
) -> dict[str, float | dict[str, int]]:
    started = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.serve, "127.0.0.1", 0), loop).result()
    port = started.sockets[0].getsockname()[1]
    return load.steady(f"http://127.0.0.1:{port}/", rate, seconds, b"[1]", "application/json")


def test_a_slow_server_gets_the_same_rate_and_the_times_tell(loop: asyncio.AbstractEventLoop) -> None:
    server = Server(lambda n: CHUNKED if n % 2 else LENGTH, 0.2)
    result = measure(loop, server, rate=100, seconds=1)
    assert server.seen == result["requests"]
    assert 60 < server.seen < 140, "Poisson arrivals of a fixed seed"
    assert server.bodies == {b"[1]"}
    assert result["errors"] == {"status": 0, "timeout": 0}
    assert 200_000 <= result["p50_us"] < 2_000_000


def test_refusals_are_counted(loop: asyncio.AbstractEventLoop) -> None:
    result = measure(loop, Server(lambda n: BUSY if n <= 3 else LENGTH, 0.0), rate=100, seconds=0.5)
    assert result["errors"] == {"status": 3, "timeout": 0}
