"""What a caller hears of the controller: snapshots, which come by themselves; its death; one that takes its time."""

from __future__ import annotations

import json
import threading
import time
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
    wait_for(lambda: caller.current()._failed, 5)
    cluster.down = None
    with pytest.raises(DeploymentUnavailableError):
        DeploymentHandle("Missing", "app").remote().result(timeout_s=5)
    cluster.publish(second)
    calls_reach(handle, second)


class Slow(Cluster):
    """Nothing is deployed at first, and the answer that tells so may take its time on the way."""

    def __init__(self, server: ScriptedReplica) -> None:
        self.deployed = self.slow = False
        self.taken, self.arrives = threading.Event(), threading.Event()
        super().__init__(server)

    def present(self) -> bytes:
        empty = json.dumps({"version": [1, self.version], "deployments": {}}).encode()
        snapshot = super().present() if self.deployed else empty
        if self.slow:
            self.slow = False
            self.taken.set()
            self.arrives.wait(10)
        return snapshot


def test_a_call_is_not_judged_by_a_snapshot_that_was_taken_before_it_began(replica: Replicas, connect: Any) -> None:
    cluster = Slow(replica())
    handle = connect(cluster)
    wait_for(lambda: cluster._waiting, 5)
    cluster.slow = True
    missing = DeploymentHandle("Missing", "app").remote()
    assert cluster.taken.wait(5)
    cluster.deployed = True
    cluster.push()
    response = handle.remote(1)
    cluster.arrives.set()
    assert response.result(timeout_s=5) == (1,)
    with pytest.raises(DeploymentUnavailableError):
        missing.result(timeout_s=5)


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
