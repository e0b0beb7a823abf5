"""Calls that wait when the time of their request is over: refused then, not when somebody would have sent them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import wire_client as wire
from scripted_replica import TOKEN, Cluster, Replicas, replicas, silent  # noqa: F401 - fixtures
from worker_replica import serving

from rayserve_fast import caller
from rayserve_fast.handle import DeploymentHandle

DEADLINE = 5  # the wire's number
TIME_S = 0.3
#: Of a box that does other things too; what waits without a timer waits for seconds, or for ever.
PATIENCE_S = 0.25


class Asks:
    """Makes calls on behalf of a request, and tells after how many seconds they failed, and with what."""

    async def __call__(self, count: int) -> tuple[float, list[str]]:
        began, handle = time.monotonic(), DeploymentHandle("D", "app")
        responses = [handle.remote(i) for i in range(count)]
        failures = [await self.failure(response) for response in responses[1:]]
        return time.monotonic() - began, failures

    async def needing(self) -> tuple[float, list[str]]:
        began, handle = time.monotonic(), DeploymentHandle("D", "app")
        response = handle.remote(handle.remote())
        failures = [await self.failure(response)]
        return time.monotonic() - began, failures

    def thread(self) -> tuple[float, list[str]]:
        began, handle = time.monotonic(), DeploymentHandle("D", "app")
        responses = [handle.remote(i) for i in range(2)]
        try:
            responses[1].result(timeout_s=10)
        except Exception as error:
            return time.monotonic() - began, [f"{type(error).__name__}: {error}"]
        return 0.0, []

    async def failure(self, response: Any) -> str:
        try:
            await response
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "none"


def ask(link: wire.Link, method: str, *args: Any, time_s: float) -> Any:
    payload = wire.call_payload(method, args, {})
    link.send(wire.CALL, 1, flags=wire.FIN, aux=int(time_s * 1000), payload=payload)
    last = link.answer(1).last
    assert last.kind == wire.RESULT, last
    return wire.value(last.payload)


@pytest.mark.parametrize(("method", "args"), [("__call__", (2,)), ("__call__", (20,)), ("needing", ()), ("thread", ())])
def test_a_call_that_waits_is_refused_when_its_time_is_over(
    replica: Replicas, method: str, args: tuple[Any, ...]
) -> None:
    server = replica(silent, max_ongoing=1)
    with serving(Asks) as asking:
        caller._set(caller.Caller("n", TOKEN, Cluster(server, max_ongoing_requests=1)))
        try:
            took, failures = ask(asking.link(), method, *args, time_s=TIME_S)
        finally:
            caller.reset()
    assert failures
    for failure in failures:
        assert failure.startswith("TimeoutError: the time of the request was over"), failure
    assert TIME_S - 0.01 <= took < TIME_S + PATIENCE_S


class Blocks:
    def __init__(self) -> None:
        self.ran = False

    def job(self) -> None:
        self.ran = True

    async def block(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self.ran


def test_a_job_that_no_thread_has_taken_in_time_never_runs() -> None:
    """The loop blocks before it has woken a thread for the job."""
    with serving(Blocks) as replica:
        link = replica.link()
        job = wire.frame(wire.CALL, 1, flags=wire.FIN, aux=50, payload=wire.call_payload("job", (), {}))
        block = wire.frame(wire.CALL, 2, flags=wire.FIN, payload=wire.call_payload("block", (0.2,), {}))
        link.sock.sendall(job + block)
        last = link.answer(1).last
        assert (last.kind, last.aux) == (wire.ERROR, DEADLINE)
        link.answer(2)
        link.call(3, "block", 0.0)
        assert wire.value(link.answer(3).last.payload) is False
