"""What becomes of calls when the process that made them ends: a driver that exits, a replica that is replaced."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from deployed import wait_for
from scripted_replica import Call, Cluster, Replicas, connecting, replicas, silent  # noqa: F401 - fixtures
from worker_replica import serving

from rayserve_fast import caller, serve
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.handle import DeploymentHandle


def test_an_exit_waits_until_a_large_call_has_left_and_cancels_nothing(
    replica: Replicas, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_on, large = threading.Event(), bytes(32 << 20)
    server = replica(lambda call: None if call.args else read_on.wait(10) and None)
    handle = connect(Cluster(server))
    handle.remote()
    server.calls.get(timeout=5)  # the link's thread reads no further
    handle.remote(large)
    monkeypatch.setattr(caller, "_exiting", False)
    monkeypatch.setattr(caller, "EXIT_TIMEOUT_S", 10)
    leaving = threading.Thread(target=caller._at_exit)
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive()
    read_on.set()
    leaving.join(10)
    assert server.calls.get(timeout=5).args == (large,)
    assert server.frames.empty()


def test_an_exit_does_not_wait_for_a_call_without_a_slot(
    replica: Replicas, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))
    responses = [handle.remote(n) for n in range(2)]
    server.calls.get(timeout=5)
    monkeypatch.setattr(caller, "_exiting", False)
    monkeypatch.setattr(caller, "EXIT_TIMEOUT_S", 60)
    caller._at_exit()
    for response in responses:
        with pytest.raises(RayServeException):
            response.result(timeout_s=5)


def test_a_replica_that_drains_lets_its_calls_leave(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))

    class Notifies:
        def __init__(self, callee: DeploymentHandle) -> None:
            self.callee = callee

        async def __call__(self) -> None:
            for n in range(2):
                self.callee.remote(n)

    with serving(Notifies, handle) as front:
        link = front.link()
        link.call(1)
        assert link.answer(1).frames
        first = server.calls.get(timeout=5)
        front.runtime.drain()
        assert not front.runtime.wait_idle(0.2), "one call has no slot yet"
        first.reply(None)
        assert front.runtime.wait_idle(10), "nobody answers the second, which has left"
        assert server.calls.get(timeout=5).args == (1,)


@serve.deployment(max_ongoing_requests=4)
class Notes:
    """Takes its time, and writes down how each call ends."""

    async def __call__(self, path: str, tag: str) -> None:
        def note(word: str) -> None:
            with open(path, "a") as notes:
                notes.write(f"{word} {tag}\n")

        note("began")
        try:
            await asyncio.sleep(1.5)
        except asyncio.CancelledError:
            note("cancelled")
            raise
        note("ended")


@serve.deployment
class Leaves:
    """Answers before what it has called is done."""

    async def __call__(self, path: str) -> None:
        serve.get_deployment_handle("Notes", "notes").remote(path, "a")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes"
    path.touch()
    return path


def until(notes: Path, *lines: str) -> None:
    wait_for(lambda: sorted(notes.read_text().splitlines()) == sorted(lines), 20, so_far=notes.read_text)


@pytest.mark.parametrize(
    "replace",
    [lambda: serve.delete("leaves"), lambda: serve.run(Leaves.bind(), name="leaves", route_prefix=None)],
    ids=["delete", "redeploy"],
)
@pytest.mark.usefixtures("serve_instance")
def test_a_call_outlives_the_replica_that_made_it(replace: Callable[[], Any], notes: Path) -> None:
    serve.run(Notes.bind(), name="notes", route_prefix=None)
    serve.run(Leaves.bind(), name="leaves", route_prefix=None).remote(str(notes)).result(timeout_s=20)
    until(notes, "began a")
    replace()
    until(notes, "began a", "ended a")


DRIVER = """
import sys

import ray

from rayserve_fast import serve

ray.init(address=sys.argv[1], log_to_driver=False)
handle = serve.get_deployment_handle("Notes", "notes")
handle.remote(sys.argv[2], "first").result(timeout_s=20)
for tag in "abcd":
    handle.remote(sys.argv[2], tag)
"""


@pytest.mark.usefixtures("serve_instance")
def test_a_call_outlives_the_driver_that_made_it(notes: Path) -> None:
    serve.run(Notes.bind(), name="notes", route_prefix=None)
    address = ray.get_runtime_context().gcs_address
    subprocess.run([sys.executable, "-c", DRIVER, address, str(notes)], check=True, timeout=90)
    until(notes, *(f"{word} {tag}" for word in ("began", "ended") for tag in ("first", *"abcd")))
