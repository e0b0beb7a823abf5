"""Requests at a fixed rate, whether or not the earlier ones have been answered: what a queue does under a steady load.

Arrivals are a Poisson process with a fixed seed, the same for every peer. A request's time runs from when it was due,
so one that found all connections taken counts its wait too.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from urllib.parse import urlsplit

SEED = 20_260
CONNECTIONS = 512  # open at once; who is beyond waits for one
GIVE_UP_S = 10.0


class Client:
    """Keep-alive connections to one URL."""

    def __init__(self, url: str, body: bytes, content_type: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        self.request = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.free = asyncio.Semaphore(CONNECTIONS)

    async def send(self) -> int:
        """The status of one request."""
        async with self.free:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(self.request)
                status = await self.answer(reader)
            except BaseException:
                writer.close()
                raise
            self.idle.append((reader, writer))
            return status

    async def answer(self, reader: asyncio.StreamReader) -> int:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"transfer-encoding: chunked" in head:
            while (size := int((await reader.readline()).split(b";")[0], 16)) > 0:
                await reader.readexactly(size + 2)
            await reader.readline()
        else:
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        return int(head.split(b" ", 2)[1])

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


async def drive(url: str, rate: float, seconds: float, body: bytes, content_type: str) -> tuple[array, int, int]:
    """How long all took and then each (seconds), how many had another status than 200, and how many were given up."""
    client, arrivals = Client(url, body, content_type), random.Random(SEED)
    clock = time.perf_counter
    times, refused, lost = array("d", [0.0]), 0, 0

    async def one(due: float) -> None:
        nonlocal refused, lost
        try:
            status = await asyncio.wait_for(client.send(), GIVE_UP_S)
            refused += status != 200
        except (OSError, EOFError, ValueError, asyncio.TimeoutError):
            lost += 1
        times.append(clock() - due)

    began, running = clock(), set()
    due = began
    while due < began + seconds:
        await asyncio.sleep(max(0.0, due - clock()))
        running.add(task := asyncio.ensure_future(one(due)))
        task.add_done_callback(running.discard)
        due += arrivals.expovariate(rate)
    await asyncio.gather(*running)
    times[0] = clock() - began
    client.close()
    return times, refused, lost
