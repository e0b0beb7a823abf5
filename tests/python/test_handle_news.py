"""What a caller hears of the controller: snapshots, which come by themselves; its death; one that takes its time."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from concurrent.futures import Future
from typing import Any

import pytest
from deployed import wait_for
from scripted_replica import (  # noqa: F401 - fixtures
    Cluster,
    Replicas,
    ScriptedReplica,
    connecting,
    replicas,
    silent,
)

from rayserve_fast import caller
from rayserve_fast.config import RequestRouterConfig
from rayserve_fast.controlplane import client
from rayserve_fast.exceptions import DeploymentUnavailableError, RayServeException
from rayserve_fast.handle import DeploymentHandle
from rayserve_fast.request_router import RequestRouter


def calls_reach(handle: DeploymentHandle, server: ScriptedReplica) -> None:
    """Returns when a call has reached it."""
    wait_for(lambda: handle.remote().result(timeout_s=5) == () and not server.calls.empty(), 10)


def test_a_controller_that_cannot_be_asked_fails_new_calls_in_the_end(connect: Any) -> None:
    cluster = Cluster()
    cluster.crash(ConnectionError("no controller"))
    with pytest.raises(DeploymentUnavailableError, match="no controller"):
        connect(cluster).remote().result(timeout_s=20)


def test_a_call_outwaits_a_controller_that_restarts(replica: Replicas, connect: Any) -> None:
    cluster = Cluster(replica())
    cluster.crash(ConnectionError("no controller"))
    response = connect(cluster).remote(1)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.5)
    cluster.down = None
    assert response.result(timeout_s=5) == (1,)


def test_known_replicas_are_called_while_the_controller_is_away(replica: Replicas, connect: Any) -> None:
    first, second = replica(), replica()
    cluster = Cluster(first)
    handle = connect(cluster)
    handle.remote().result(timeout_s=5)
    cluster.crash(ConnectionError("no controller"))
    for i in range(100):
        assert handle.remote(i).result(timeout_s=5) == (i,)
    cluster.down = None
    cluster.publish(second)
    calls_reach(handle, second)


def test_news_are_heard_again_also_if_the_first_to_be_answered_asks_for_the_present(
    replica: Replicas, connect: Any
) -> None:
    first, second = replica(), replica()
    cluster = Cluster(first)
    handle = connect(cluster)
    handle.remote().result(timeout_s=5)
    cluster.crash(ConnectionError("no controller"))
    wait_for(lambda: caller.current()._next is None, 5)
    cluster.down = None
    with pytest.raises(DeploymentUnavailableError):
        DeploymentHandle("Missing", "app").remote().result(timeout_s=5)
    cluster.publish(second)
    calls_reach(handle, second)


class Slow(Cluster):
    """What the present snapshot is it tells only when the test says so, but for the first time."""

    def __init__(self, server: ScriptedReplica, **config: Any) -> None:
        self.known = True
        self.taken: queue.Queue[tuple[Future[bytes], bytes]] = queue.Queue()
        super().__init__(server, **config)

    def present(self) -> bytes:
        return super().present() if self.known else json.dumps({"version": [1, self.version]}).encode()

    def next(self, newer_than: tuple[int, int] | None) -> Future[bytes]:
        if newer_than is None and caller.exists() and caller.current().client.version() is not None:
            self.taken.put((late := Future(), self.present()))
            return late
        return super().next(newer_than)


def test_a_call_is_not_judged_by_a_snapshot_that_was_taken_before_it_began(replica: Replicas, connect: Any) -> None:
    cluster = Slow(replica())
    cluster.known = False
    handle = connect(cluster)
    wait_for(lambda: cluster._waiting, 5)
    missing = DeploymentHandle("Missing", "app").remote()
    late, snapshot = cluster.taken.get(timeout=5)
    response = handle.remote(1)
    late.set_result(snapshot)
    with pytest.raises(DeploymentUnavailableError):
        missing.result(timeout_s=5)
    cluster.taken.get(timeout=5)  # it is asked for again
    cluster.known = True
    cluster.push()
    assert response.result(timeout_s=5) == (1,)


def test_calls_go_on_while_the_controller_is_asked_for_another_deployment(replica: Replicas, connect: Any) -> None:
    cluster = Slow(replica(), batch={"max_size": 8, "wait_s": 0.05, "concurrent": 1})
    handle = connect(cluster)

    async def main() -> float:
        assert await handle.remote(0) == (0,)
        missing = DeploymentHandle("Missing", "app").remote()
        late, snapshot = await asyncio.to_thread(cluster.taken.get, timeout=5)
        began = time.monotonic()
        assert await asyncio.wait_for(handle.remote(1), 5) == (1,), "the window of the batch has ended"
        took = time.monotonic() - began
        late.set_result(snapshot)
        with pytest.raises(DeploymentUnavailableError, match="does not exist"):
            await missing
        return took

    assert asyncio.run(main()) < 1


@pytest.mark.parametrize("lonely", [True, False], ids=["nobody waits", "a thread waits"])
def test_a_controller_that_never_answers_fails_new_calls_in_the_end(
    replica: Replicas, connect: Any, lonely: bool
) -> None:
    cluster = Slow(replica())
    connect(cluster).remote().result(timeout_s=5)
    began = time.monotonic()
    missing = DeploymentHandle("Missing", "app").remote()
    if lonely:
        wait_for(missing._call.ready, 15)
    with pytest.raises(DeploymentUnavailableError, match="has not answered within 10 s"):
        missing.result(timeout_s=15)
    assert time.monotonic() - began < 12
    asked_again = DeploymentHandle("Missing", "app").remote()
    cluster.taken.get(timeout=5)
    late, snapshot = cluster.taken.get(timeout=5)
    late.set_result(snapshot)
    with pytest.raises(DeploymentUnavailableError, match="does not exist"):
        asked_again.result(timeout_s=5)


def test_a_controller_that_takes_its_time_is_not_asked_all_the_while(connect: Any) -> None:
    cluster = Cluster()
    handle = connect(cluster)
    waits = handle.remote()
    wait_for(lambda: cluster._waiting, 5)
    cluster.crash(ConnectionError("no controller"))
    cluster.down = None
    wait_for(lambda: cluster._waiting, 5)
    began, busy = time.monotonic(), time.process_time()
    time.sleep(1.0)
    assert time.process_time() - busy < 0.5 * (time.monotonic() - began)
    waits.cancel()


def test_a_cluster_that_is_gone_ends_its_calls(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    cluster = Cluster(server)
    response = connect(cluster).remote()
    server.calls.get(timeout=5)
    cluster.crash(client.NotRunningError("Serve is gone"))
    with pytest.raises(RayServeException, match="shut down"):
        response.result(timeout_s=5)
    assert not caller.exists(), "the next call finds the next cluster"


def test_new_replicas_are_used_without_being_looked_for(replica: Replicas, connect: Any) -> None:
    first, second = replica(), replica()
    cluster = Cluster(first)
    handle = connect(cluster)
    handle.remote().result(timeout_s=5)
    asked = cluster.asked
    cluster.publish(first, second)
    calls_reach(handle, second)
    assert cluster.asked == asked + 1, "one answer, to the question that was waiting"


class Last(RequestRouter):
    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        return [candidate_replicas[-1:]]


def test_calls_that_wait_when_their_deployment_gets_a_router_are_routed_by_it(replica: Replicas, connect: Any) -> None:
    cluster = Cluster()
    response = connect(cluster).remote(1)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.5)
    cluster.config["router"] = RequestRouterConfig(request_router_class=Last).plain()
    cluster.publish(replica(), replica())
    assert response.result(timeout_s=10) == (1,)
