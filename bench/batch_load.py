"""A batched model under load at fixed rates: `serve.batch` here and in Ray Serve, one replica each.

    python -m bench.batch_load                                       # both, from the environments of the benchmark
    python -m bench.batch_load --python rayserve-fast=.venv/bin/python   # this one only, from an environment at hand

The model takes 20 ms and 0.5 ms for each item, its batches hold 32 at most and wait 10 ms: the weak case of a batcher
that seals batches while it cannot run them, as small ones cost nearly as much as large ones. Requests come at their
times whether or not the earlier ones are answered (an open loop, evenly spaced), so a queue that grows shows: in the
latency, and in how many requests are open when the last one has been sent.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench import envs, peers

WINDOW_S, BASE_S, ITEM_S, SIZE = 0.01, 0.02, 0.0005, 32  # as in apps.py
FULL_S = BASE_S + ITEM_S * SIZE
CAPACITY = SIZE / FULL_S
#: Requests a second: the weak case, and 80 % of what full batches can do.
RATES = (200.0, 0.8 * CAPACITY)
#: What the latency of 99 % must not exceed at either.
BOUND_S = 2 * (WINDOW_S + 2 * FULL_S)


@dataclass(frozen=True)
class Outcome:
    """Latencies in seconds, sorted; how many requests failed, and were open at the end."""

    latencies: list[float]
    failed: int
    left_open: int

    def line(self) -> str:
        p50, p99 = (self.latencies[int(share * (len(self.latencies) - 1))] * 1e3 for share in (0.5, 0.99))
        verdict = "within" if p99 <= BOUND_S * 1e3 else "beyond"
        return (
            f"p50 {p50:.0f} ms, p99 {p99:.0f} ms ({verdict} {BOUND_S * 1e3:.0f}), "
            f"{self.left_open} open at the end, {self.failed} failed"
        )


class Load:
    """An open loop against one URL; connections are made as they are needed, and used again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        body = b'{"item":1}'
        head = f"POST {parts.path} HTTP/1.1\r\nhost: bench\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}"
        self._request = head.encode() + b"\r\n\r\n" + body
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._latencies: list[float] = []
        self._failed = 0

    async def run(self, rate: float, seconds: float) -> Outcome:
        """Send at that rate for so long, then wait for the answers."""
        tasks, began = [], time.perf_counter()
        for at in range(int(rate * seconds)):
            due = began + at / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self._one(due)))
        left_open = sum(not task.done() for task in tasks)
        await asyncio.wait(tasks, timeout=60)
        for _, writer in self._idle:
            writer.close()
        return Outcome(sorted(self._latencies), self._failed, left_open)

    async def _one(self, due: float) -> None:
        """From when it was due, so that a client that is late counts against nobody but the server it waits for."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b"content-length: " in head.lower():
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        else:
            await reader.readuntil(b"0\r\n\r\n")  # chunked, and no chunk of ours ends so
        self._failed += not head.startswith(b"HTTP/1.1 200")
        self._latencies.append(time.perf_counter() - due)
        self._idle.append((reader, writer))


def measure(name: str, python: Path, seconds: float) -> None:
    """Print a line for each rate."""
    peer = peers.BY_NAME[name]
    peers.FOLDER.mkdir(parents=True, exist_ok=True)
    log = peers.FOLDER / f"batch-load-{name}.log"
    port = peers.free_port()
    with peers.serving(peer, python, ["batch_model"], port, log):
        for rate in RATES:
            outcome = asyncio.run(Load(f"http://127.0.0.1:{port}/batch_model").run(rate, seconds))
            print(f"{peer.title}, {rate:.0f} requests/s: {outcome.line()}", flush=True)


def main() -> None:
    """Measure the peers that were named, else both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="at each rate")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="measure only such peers")
    options = parser.parse_args()
    given = {name: Path(path).absolute() for name, _, path in (entry.partition("=") for entry in options.python)}
    for name in given or ("rayserve-fast", "ray-serve"):
        python = given.get(name) or envs.prepare(peers.BY_NAME[name].environment)
        measure(name, python, options.seconds)


if __name__ == "__main__":
    main()
