"""One local Ray and one Serve instance for the whole test session.

Fixtures, from the cheapest to the dearest; a test that needs none of them must not ask for one:

- `free_port`: a TCP port of 127.0.0.1 that nobody listens on right now.
- `ray_session`: the driver is connected to a local Ray with 8 declared CPUs, no dashboard, in a directory of its own.
- `serve_instance`: Serve runs in that Ray on a free port. Yields the base URL, such as `http://127.0.0.1:40123`.
  All traffic, endpoints and applications are deleted after each test: it deploys with `serve.run(app)` and leaves it.
- `run`: `serve.run`, once in that Serve and once in local testing mode; the test must hold in both.

A test that needs a Ray of its own (another port, a dying controller, a second driver) runs a script with `run_script`,
or its own processes in the environment `own_ray`. Nothing in this process may call `serve.shutdown()`: the instance
belongs to all tests.

When the session ends, Ray is shut down and every process that it started must be gone: whatever still holds a file
in its directory fails the session. Invariant: tests never touch port 8000 and never another Ray of the machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

# A shell that starts the suite in the background has it ignore Ctrl-C, and all that the suite starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXIT_DEADLINE_S = 15.0  # Ray's own agents take about a second to follow their raylet


@pytest.fixture(autouse=True, scope="session")
def ray_directory() -> Iterator[Path]:
    """The directory of this session's Ray."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    os.environ.pop("RAY_ADDRESS", None)
    with directory_left_by_all() as directory:
        os.environ["RAY_TMPDIR"] = str(directory)
        yield directory


@pytest.fixture(scope="session")
def ray_session(ray_directory: Path) -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=256 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def serve_url(ray_session: None) -> Iterator[str]:
    """The running Serve without the clean-up of `serve_instance`, for fixtures that deploy once for a module."""
    from rayserve_fast import serve
    from rayserve_fast.controlplane import client

    serve.start(http_options={"host": "127.0.0.1", "port": 0})
    _, (host, port) = client.ready(client.require())
    yield f"http://{host}:{port}"
    serve.shutdown()


@pytest.fixture
def serve_instance(serve_url: str) -> Iterator[str]:
    from rayserve_fast import serve
    from rayserve_fast.controlplane import client

    yield serve_url
    for name, traffic in serve.get_traffic().items():  # an application in use cannot be deleted
        if traffic.rollout in ("RUNNING", "PAUSED"):
            serve.get_rollout(name).abort()
        client.ask("delete_traffic" if name.startswith("/") else "delete_endpoint", name)
    for name in list(serve.status().applications):
        serve.delete(name)


@pytest.fixture(params=["cluster", "local"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    from rayserve_fast import serve

    if request.param == "cluster":
        request.getfixturevalue("serve_instance")
        yield serve.run
        return
    from rayserve_fast.local import applications

    yield partial(serve.run, _local_testing_mode=True)
    applications.shutdown()


@pytest.fixture
def free_port() -> int:
    return unused_port()


RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def own_ray() -> Iterator[dict[str, str]]:
    """The environment for processes that start a Ray of their own; after the test none of it may be alive."""
    with directory_left_by_all() as directory:
        yield {**os.environ, "RAY_TMPDIR": str(directory)}


@pytest.fixture
def run_script(own_ray: dict[str, str], tmp_path: Path) -> RunScript:
    """`run_script(source, *args, timeout=90)`: run Python source in a fresh process; its outcome and text."""

    def run(source: str, *args: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(source)
        return subprocess.run(
            [sys.executable, str(script), *args],
            env=own_ray,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def unused_port() -> int:
    """A port that nobody is given before the test takes it: those from 32768 on are the kernel's to give to any socket,
    of which Ray opens dozens meanwhile, and those from 10002 to 19999 are for Ray's workers."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def directory_left_by_all() -> Iterator[Path]:
    """A directory for one Ray, in /tmp because socket names are short; at the end no process may hold a file in it."""
    directory = Path(tempfile.mkdtemp(prefix="rsf", dir="/tmp"))
    yield directory
    deadline = time.monotonic() + EXIT_DEADLINE_S
    while (left := holders(directory)) and time.monotonic() < deadline:
        time.sleep(0.1)  # no event to wait for: these are not our children
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)
    assert not left, f"processes outlived their Ray: {left}"


def holders(directory: Path) -> dict[int, str]:
    """Processes with an open file under `directory`: every Ray process keeps its log and its sockets there.

    The environment would be the obvious mark, but Ray's process titles overwrite it.
    """
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            links = [os.readlink(entry) for entry in (process / "fd").iterdir()]
            if any(link.startswith(str(directory)) for link in links):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
        except OSError:  # gone, or not ours
            continue
    return found
