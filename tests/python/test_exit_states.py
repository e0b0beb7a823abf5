"""The interpreter ends cleanly whatever the native code is doing: no hang, no abort, nothing on stderr."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PRELUDE = """
import asyncio, sys, threading, time
from pathlib import Path
sys.path.insert(0, {here!r})
from scripted_replica import TOKEN, Cluster, ScriptedReplica
from rayserve_fast import caller
from rayserve_fast.handle import DeploymentHandle

server = ScriptedReplica(Path({tmp!r}), "r", {handler})
cluster = Cluster(server)
caller._set(caller.Caller("n", TOKEN, cluster))
handle = DeploymentHandle("D", "app")
"""

ANSWERS = "lambda call: call.reply(1)"
SILENT = "lambda call: None"


def run(script: str, timeout_s: float = 60) -> tuple[int, str, float]:
    """Exit code, stderr, and how long the process lived after it said that it is at its end."""
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-W", "ignore::DeprecationWarning", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    at_end = time.monotonic()
    try:
        _, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"hangs at exit: {process.communicate()[1]}") from None
    return process.returncode, stderr, time.monotonic() - at_end


def ends(body: str, tmp_path: Path, handler: str = SILENT, code: int = 0) -> None:
    prelude = PRELUDE.format(here=str(HERE), tmp=str(tmp_path), handler=handler)
    returned, stderr, took = run(prelude + textwrap.dedent(body))
    assert (returned, stderr) == (code, "")
    assert took < 10


STATES = {
    "a caller that never called": "print('end', flush=True)",
    "after a call": "handle.remote(); server.calls.get(timeout=10); print('end', flush=True)",
    "calls in flight that nobody waits for": """
        for _ in range(100): handle.remote(b"x" * 1000)
        server.calls.get(timeout=10)
        print("end", flush=True)
    """,
    "a daemon thread in result()": """
        def wait():
            try: handle.remote().result()
            except Exception: pass
        for _ in range(4): threading.Thread(target=wait, daemon=True).start()
        for _ in range(4): server.calls.get(timeout=10)
        print("end", flush=True)
    """,
    "the tender in a call of the controller": """
        slow = threading.Event()
        def next(newer_than):
            slow.set()
            time.sleep(60)
        caller.reset()
        cluster.next = next
        caller._set(caller.Caller("n", TOKEN, cluster))
        handle.remote()
        assert slow.wait(10)
        print("end", flush=True)
    """,
    "an asyncio loop that awaits, abandoned": """
        async def main():
            waits = asyncio.ensure_future(_wait())
            await asyncio.to_thread(server.calls.get, timeout=10)
        async def _wait():
            await handle.remote()
        asyncio.run(main())
        print("end", flush=True)
    """,
    "a loop on a daemon thread that awaits": """
        async def wait():
            try: await handle.remote()
            except Exception: pass  # the handles are closed
        threading.Thread(target=lambda: asyncio.run(wait()), daemon=True).start()
        server.calls.get(timeout=10)
        print("end", flush=True)
    """,
    "a large argument that is half sent": """
        stuck = threading.Event()
        server.handler = lambda call: stuck.wait()
        handle.remote()
        server.calls.get(timeout=10)
        handle.remote(b"x" * 20_000_000)
        print("end", flush=True)
    """,
    "a forked child": """
        import os
        handle.remote()
        server.calls.get(timeout=10)
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print("end", flush=True)
    """,
}


@pytest.mark.parametrize("state", STATES)
def test_exit_with_handles(state: str, tmp_path: Path) -> None:
    ends(STATES[state], tmp_path)


def test_exit_while_threads_call_as_fast_as_they_can(tmp_path: Path) -> None:
    body = """
        def flood():
            while True:
                try:
                    handle.remote(1).result()
                except Exception:
                    return  # handles are closed
        for _ in range(3): threading.Thread(target=flood, daemon=True).start()
        for _ in range(300): server.calls.get(timeout=10)
        print("end", flush=True)
    """
    ends(body, tmp_path, ANSWERS)


def test_exit_by_an_exception_while_a_call_runs(tmp_path: Path) -> None:
    body = """
        handle.remote()
        server.calls.get(timeout=10)
        print("end", flush=True)
        sys.exit(3)
    """
    ends(body, tmp_path, code=3)


PROXY = """
import json, socket, sys, threading, time
from rayserve_fast._core import Proxy

proxy = Proxy(json.dumps({{
    "host": "127.0.0.1", "port": 0, "root_path": "", "request_timeout_s": None, "keep_alive_timeout_s": 90,
    "max_head_bytes": 65536, "max_body_bytes": None, "shards": 2, "node_id": "n", "token": "00" * 32,
    "snapshot_path": None, "session_header": "x-session-id", "prefer_local_node": True,
    "forwarded_allow_ips": "",
}}).encode())
address = proxy.start()
deployment = {{"app": "a", "name": "D", "max_ongoing_requests": 5,
               "replicas": [{{"id": "r", "node_id": "n", "unix": {tmp!r} + "/none"}}]}}
proxy.publish(json.dumps({{
    "version": [1, 1], "deployments": {{"a#D": deployment}},
    "routes": [{{"prefix": "/", "app": "a", "deployment": "a#D"}}],
}}).encode())

def client():
    sock = socket.create_connection(address)
    sock.sendall(b"GET /-/healthz HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
    assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    return sock
"""

PROXY_STATES = {
    "idle": "",
    "an open connection": "kept = client()",
    "a request that waits for its replica": """
        waits = client()
        waits.sendall(b"GET /x HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
        while not proxy.counters()["requests_open"]: time.sleep(0.001)
    """,
    "a daemon thread in wait_linked": """
        threading.Thread(target=proxy.wait_linked, args=(["r"], 3600.0), daemon=True).start()
        time.sleep(0.1)
    """,
    "draining": "kept = client(); proxy.drain()",
    "shut down": "proxy.shutdown(1.0)",
    "collected": "del proxy",
}


@pytest.mark.parametrize("state", PROXY_STATES)
def test_exit_with_a_proxy_in_the_process(state: str, tmp_path: Path) -> None:
    body = PROXY.format(tmp=str(tmp_path)) + textwrap.dedent(PROXY_STATES[state])
    code, stderr, took = run(body + "\nprint('end', flush=True)\n")
    assert (code, stderr) == (0, "")
    assert took < 10


REPLICA = """
import asyncio, os, sys, threading, time
sys.path.insert(0, {here!r})
from scripted_replica import Cluster
from worker_replica import TOKEN, ReplicaRuntime, spec_of
from rayserve_fast import caller
from rayserve_fast.handle import DeploymentHandle

began = threading.Event()

def begin():
    import __main__  # the class is pickled, the event is not

    __main__.began.set()

class D:
    async def __call__(self):
        return 1

    def sync(self):
        return 2

    async def hang(self):
        begin()
        await asyncio.sleep(3600)

    def block(self):
        begin()
        threading.Event().wait()

    async def leave(self):
        begin()
        sys.exit(5)

runtime = ReplicaRuntime(spec_of(D, {tmp!r}, max_ongoing_requests=10))
address = runtime.start()
cluster = Cluster(max_ongoing_requests=10)
cluster.replicas = [{{"id": "r1", "node_id": "n", "unix": address.unix, "tcp": None}}]
caller._set(caller.Caller("n", TOKEN, cluster))
handle = DeploymentHandle("D", "app")
"""

REPLICA_STATES = {
    "idle": "",
    "after calls of each kind": """
        assert handle.remote().result() == 1
        assert handle.sync.remote().result() == 2
    """,
    "a coroutine that hangs": "handle.hang.remote(); assert began.wait(10)",
    "a sync handler that blocks": "handle.sync.remote().result(); handle.block.remote(); assert began.wait(10)",
    "a thread of the driver waits for a coroutine that hangs": """
        def wait():
            try: handle.hang.remote().result()
            except Exception: pass
        threading.Thread(target=wait, daemon=True).start()
        assert began.wait(10)
    """,
    "a handler has called sys.exit": """
        import logging  # from 3.12 on asyncio tells of the eager task whose exit nobody was there to retrieve
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        try: handle.leave.remote().result()
        except BaseException as error: assert isinstance(error, SystemExit), error
        assert handle.remote().result() == 1
    """,
    "stopped": "runtime.stop()",
    "a forked child that ends": """
        handle.remote().result()
        pid = os.fork()
        if pid == 0: sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert handle.remote().result(timeout_s=10) == 1
    """,
}


@pytest.mark.parametrize("state", REPLICA_STATES)
def test_exit_with_a_replica_in_the_process(state: str, tmp_path: Path) -> None:
    prelude = REPLICA.format(here=str(HERE), tmp=tempfile.mkdtemp(prefix="rsf", dir=tmp_path))
    body = prelude + textwrap.dedent(REPLICA_STATES[state]) + "\nprint('end', flush=True)\n"
    code, stderr, took = run(body)
    assert (code, stderr) == (0, "")
    assert took < 10
