"""The load: wrk as a subprocess, calls that the application makes itself, a fixed rate (`open_loop.py`), and
single requests to check answers.

wrk runs with one thread in every cell: it can saturate each peer with it, and more would take cores from the servers.
Every load gives the same dictionary.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from bench import open_loop

SCRIPT = Path(__file__).with_name("wrk.lua")
MOST_SORTED = 200_000  # percentiles of more come from every n-th, or their sorting would disturb what runs


def require_wrk() -> str:
    """Path of wrk, or an error that says how to get it."""
    path = shutil.which("wrk")
    if path is None:
        raise SystemExit("the benchmark needs wrk and did not find it: `apt-get install wrk` (or `brew install wrk`)")
    return path


def wrk(url: str, connections: int, seconds: float, body: Path | None = None, content_type: str = "") -> dict:
    """Load `url` for `seconds`; the parsed result with the CPU seconds that wrk itself took.

    wrk takes whole seconds, so a shorter wish is rounded up to one.
    """
    command = [require_wrk(), "--threads", "1", "--connections", str(connections), "--timeout", "10s"]
    command += ["--duration", f"{max(1, round(seconds))}s", "--script", str(SCRIPT), url]
    command += ["--", str(body) if body else "-", content_type]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"wrk failed on {url}: {done.stderr.strip() or done.stdout.strip()}")
    result = parse(done.stdout)
    result["client_cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result


def parse(output: str) -> dict:
    """The RESULT line that `wrk.lua` printed, as a dictionary with seconds and requests per second added."""
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if len(lines) != 1:
        raise ValueError(f"wrk printed {len(lines)} results, expected one: {output[-500:]!r}")
    result = json.loads(lines[0].removeprefix("RESULT "))
    result["seconds"] = result.pop("duration_us") / 1e6
    result["rps"] = result["requests"] / result["seconds"] if result["seconds"] else 0.0
    return result


def inside(url: str, callers: int, seconds: float) -> dict:
    """Let the `Caller` at `url` make calls for `seconds`."""
    before = time.process_time()
    status, body = request(f"{url}&callers={callers}&seconds={seconds}", timeout_s=seconds + 60)
    if status != 200:
        raise RuntimeError(f"{url} answered {status} {body[:200]!r}")
    return from_times(body) | {"client_cpu_s": time.process_time() - before}


def steady(url: str, rate: float, seconds: float, body: bytes, content_type: str) -> dict:
    """Send `rate` requests per second to `url` for `seconds`; who was refused or given up counts as an error."""
    before = time.process_time()
    times, refused, lost = asyncio.run(open_loop.drive(url, rate, seconds, body, content_type))
    result = from_times(times.tobytes()) | {"client_cpu_s": time.process_time() - before}
    return result | {"errors": {"status": refused, "timeout": lost}}


def from_times(times: bytes) -> dict:
    """The result of native doubles: how many seconds all calls together took, then how many each did."""
    took, each = (all_times := memoryview(times).cast("d"))[0], all_times[1:]
    if not each:
        raise ValueError("the application made no call")
    some = sorted(each[:: len(each) // MOST_SORTED + 1])
    shares = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99}
    result: dict = {name: some[int(share * (len(some) - 1))] * 1e6 for name, share in shares.items()}
    result |= {"max_us": max(each) * 1e6, "requests": len(each), "seconds": took, "rps": len(each) / took}
    return result | {"errors": {}}


def request(url: str, body: bytes = b"", content_type: str = "", timeout_s: float = 10.0) -> tuple[int, bytes]:
    """One request on a connection of its own: GET, or POST when there is a body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        headers = {"Content-Type": content_type} if body else {}
        connection.request("POST" if body else "GET", target, body or None, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def wait_for(url: str, expected: bytes, body: bytes = b"", content_type: str = "", timeout_s: float = 60.0) -> None:
    """Wait until `url` answers 200 with `expected` three times in a row; any other 200 is an error at once.

    An empty `expected` accepts every body.
    """
    deadline, good, last = time.monotonic() + timeout_s, 0, "no answer"
    while good < 3:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} did not become ready within {timeout_s:.0f} s: {last}")
        try:
            status, got = request(url, body, content_type)
        except (OSError, http.client.HTTPException) as error:
            status, got, last = 0, b"", repr(error)
        if status == 200 and expected and not same(got, expected):
            raise RuntimeError(f"{url} answered {got[:80]!r}, expected {expected[:80]!r}")
        good = good + 1 if status == 200 else 0
        if status != 200:
            last = f"status {status} {got[:80]!r}" if status else last
            time.sleep(0.1)


def same(got: bytes, expected: bytes) -> bool:
    """Equal bytes, or equal JSON values, or the expected text as a JSON string."""
    if got == expected:
        return True
    with contextlib.suppress(ValueError):
        value = json.loads(got)
        if isinstance(value, str):
            return value.encode() == expected
        return bool(value == json.loads(expected))
    return False


@contextlib.contextmanager
def one_stuck_handler(url: str) -> Iterator[list[int]]:
    """While the block runs, one client keeps one handler of `url` blocked (POST); yields the statuses it saw."""
    statuses: list[int] = []
    stop = threading.Event()

    def keep_stuck() -> None:
        while not stop.is_set():
            try:
                statuses.append(request(url, b"stuck", "text/plain", timeout_s=30.0)[0])
            except (OSError, http.client.HTTPException):
                statuses.append(0)
                stop.wait(0.1)

    client = threading.Thread(target=keep_stuck, name="stuck-client")
    client.start()
    try:
        time.sleep(0.05)
        yield statuses
    finally:
        stop.set()
        client.join()
