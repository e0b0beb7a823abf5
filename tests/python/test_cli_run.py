"""`rayserve-fast run`, `status` and `shutdown` as a user types them: real processes, a real Ray, real signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import yaml

COMMAND = [sys.executable, "-c", "from rayserve_fast.cli import main; main()"]
APP = """
import asyncio
from rayserve_fast import serve
from starlette.responses import StreamingResponse

@serve.deployment
class Echo:
    def __init__(self, word="hello"):
        self.word = word
    async def __call__(self, request):
        return StreamingResponse(self.slowly()) if "slow" in request.query_params else self.word
    async def slowly(self):
        yield "begun "
        await asyncio.sleep(1)
        yield "done"

app = Echo.bind()

def build(args):
    return Echo.bind(args["word"])

routed = Echo.options(route_prefix="/routed").bind()  # as code of 1.3 to 2.8 says it
inner = Echo.options(route_prefix=None).bind()

@serve.deployment
class Broken:
    def __init__(self):
        raise LookupError("no such model")

broken = Broken.options(max_constructor_retry_count=1).bind()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(own_ray: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """`start("run", "main:app", ...)`: the command in a process group of its own, as a shell starts it."""
    (tmp_path / "main.py").write_text(APP)
    running = []

    def call(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env={**own_ray, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield call
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=60)


def url_of(process: subprocess.Popen[str]) -> str:
    """Reads until the line that says where the application answers."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"is ready at (http://\S+)", line):
            return found[1]
    raise AssertionError(process.communicate(timeout=10))


def test_run_serves_until_ctrl_c_and_finishes_what_is_in_flight(start: Start) -> None:
    process = start("run", "main:build", "word=bonjour", "--port", "0", "--name", "greeter", "--route-prefix", "/hi")
    url = url_of(process)
    assert url.endswith("/hi")
    assert requests.get(url, timeout=10).text == "bonjour"
    with requests.get(f"{url}?slow", stream=True, timeout=10) as answer:
        chunks = answer.iter_content(None)
        assert next(chunks) == b"begun "
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process in the foreground
        assert b"".join(chunks) == b"done"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Stopping." in out
    assert "Traceback" not in err, err


def test_a_route_of_the_deployment_counts_if_the_command_gives_none(start: Start) -> None:
    process = start("run", "main:routed", "--port", "0")
    url = url_of(process)
    assert url.endswith("/routed")
    assert requests.get(url, timeout=10).text == "hello"
    assert requests.get(url.removesuffix("/routed"), timeout=10).status_code == 404


def test_an_application_without_a_route_is_said_to_have_none(start: Start) -> None:
    process = start("run", "main:inner", "--port", "0")
    assert process.stdout is not None
    assert next(process.stdout).strip() == "'default' is ready; it has no route."


def test_sigterm_stops_like_ctrl_c(start: Start) -> None:
    process = start("run", "main:app", "--port", "0")
    url_of(process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Stopping." in out


def test_taken_port_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("run", "main:app", "--port", str(port))
        _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in last_message(err)


def test_failing_constructor_shows_the_user_s_traceback(start: Start) -> None:
    process = start("run", "main:broken", "--port", "0")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    message = last_message(err)
    assert 'raise LookupError("no such model")' in message
    assert "LookupError: no such model" in message


def test_replicas_look_into_the_working_dir_and_then_into_the_app_dir(start: Start, tmp_path: Path) -> None:
    code, data = tmp_path / "code", tmp_path / "data"
    code.mkdir()
    data.mkdir()
    (code / "beside.py").write_text("WHERE = 'beside the module'")
    (code / "both.py").write_text("WHERE = 'beside the module'")
    (data / "both.py").write_text("WHERE = 'in the working directory'")
    (data / "greeting.txt").write_text("hello from a file")
    (code / "told.py").write_text(
        """
import beside
from rayserve_fast import serve

@serve.deployment
def tell(request):
    import both
    return [beside.WHERE, both.WHERE, open("greeting.txt").read()]

app = tell.bind()
"""
    )
    process = start("run", "told:app", "--app-dir", "code", "--working-dir", "data", "--port", "0")
    assert requests.get(url_of(process), timeout=10).json() == [
        "beside the module",
        "in the working directory",
        "hello from a file",
    ]


def test_status_and_shutdown_of_a_cluster(start: Start, cluster: str) -> None:
    deployed = start("run", "main:app", "--address", cluster, "--port", "0", "--non-blocking")
    url = url_of(deployed)
    assert deployed.wait(timeout=60) == 0
    assert requests.get(url, timeout=10).text == "hello"  # it outlives the command

    out, err = start("status", "--address", cluster).communicate(timeout=60)
    found = yaml.safe_load(out)
    assert found["applications"]["default"]["status"] == "RUNNING", err
    assert found["applications"]["default"]["deployments"]["Echo"]["replica_states"] == {"RUNNING": 1}
    assert list(found["proxies"].values()) == ["HEALTHY"]

    out, err = start("status", "--address", cluster, "--name", "nobody").communicate(timeout=60)
    assert last_message(err) == "there is no application 'nobody'; running: default"

    asked = start("shutdown", "--address", cluster)
    asked.communicate(timeout=60)
    assert asked.returncode == 1  # there was no answer to its question
    assert requests.get(url, timeout=10).status_code == 200

    out, err = start("shutdown", "--address", cluster, "--yes").communicate(timeout=60)
    assert out == "Serve is shut down.\n", err
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=10)
    out, _ = start("shutdown", "--address", cluster).communicate(timeout=60)
    assert out == "Serve is not running.\n"


@pytest.mark.parametrize("command", ["status", "shutdown"])
def test_no_cluster_at_the_address(start: Start, command: str, free_port: int) -> None:
    process = start(command, "--address", f"127.0.0.1:{free_port}")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert last_message(err).startswith(f"no Ray cluster is running at 127.0.0.1:{free_port}")


@pytest.fixture
def cluster(own_ray: dict[str, str]) -> Iterator[str]:
    """A Ray that lives apart from any driver that the test starts; its address."""
    own_ray["RAY_AUTH_MODE"] = "token"  # for the commands: with an explicit address Ray asks for this
    source = """
import sys, ray
context = ray.init(address="local", num_cpus=8, include_dashboard=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        env=own_ray,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.communicate(timeout=30)


def last_message(err: str) -> str:
    assert "\nError: " in f"\n{err}", err
    return f"\n{err}".rpartition("\nError: ")[2].rstrip()
