"""Calls of a split from a driver: shares, sessions, targets that come and go. The replicas' frames are scripted."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections import Counter
from typing import Any

import pytest
from deployed import wait_for
from scripted_replica import (  # noqa: F401 - fixtures
    DRAIN,
    FIN,
    RETURNED,
    Call,
    Cluster,
    Replicas,
    ScriptedReplica,
    connecting,
    replicas,
    silent,
)

from rayserve_fast import caller
from rayserve_fast.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from rayserve_fast.handle import DeploymentHandle


class Shared(Cluster):
    """A controller's part: one split, `e`, whose targets are deployments by name."""

    def __init__(self, weights: dict[str, float], **deployments: list[ScriptedReplica] | None) -> None:
        self.weights, self.deployments = weights, deployments
        super().__init__()

    def change(self, weights: dict[str, float] | None = None, **deployments: list[ScriptedReplica] | None) -> None:
        self.weights = weights or self.weights
        self.deployments |= deployments
        self.push()

    def present(self) -> bytes:
        snapshot = json.loads(super().present())
        targets = [{"name": n, "deployment": f"{n}#D", "weight": w} for n, w in self.weights.items()]
        snapshot["splits"] = {"e": {"targets": targets}}
        snapshot["deployments"] = {
            f"{name}#D": {
                "app": name,
                "name": "D",
                "replicas": [{"id": r.id, "node_id": "n", "unix": r.path, "tcp": None} for r in made],
                **self.config,
            }
            for name, made in self.deployments.items()
            if made is not None
        }
        return json.dumps(snapshot).encode()


@pytest.fixture
def share(connect: Any) -> Any:
    def to(cluster: Shared) -> DeploymentHandle:
        connect(cluster)
        return DeploymentHandle("e", "", _key="split:e")

    return to


def says(name: str) -> Any:
    return lambda call: call.reply(name)


def linked(handle: DeploymentHandle, count: int) -> None:
    """Call until this process has so many links: only calls make it read what links bring."""
    wait_for(lambda: handle.remote().result(timeout_s=5) and caller.current().client.counters()["links"] == count, 10)


def test_calls_are_shared_out_exactly(replica: Replicas, share: Any) -> None:
    cluster = Shared({"a": 0.7, "b": 0.3}, a=[replica(says("a"))], b=[replica(says("b"))])
    handle = share(cluster)
    linked(handle, 2)
    counts = Counter(handle.remote().result() for _ in range(100))
    assert abs(counts["a"] - 70) <= 1


def test_the_key_survives_options_methods_and_pickling(replica: Replicas, share: Any) -> None:
    handle = share(Shared({"a": 1.0}, a=[replica(lambda call: call.reply(call.method))]))
    assert handle.options(method_name="m").remote().result() == "m"
    assert handle.predict.remote().result() == "predict"
    assert pickle.loads(pickle.dumps(handle.predict)).remote().result() == "predict"


def test_a_session_stays_at_its_target_and_a_growing_share_only_takes_new_ones_in(
    replica: Replicas, share: Any
) -> None:
    cluster = Shared({"a": 0.8, "b": 0.2}, a=[replica(says("a"))], b=[replica(says("b"))])
    handle = share(cluster)
    linked(handle, 2)

    def homes() -> list[str]:
        return [handle.options(session_id=f"s{i}").remote().result() for i in range(60)]

    before = homes()
    assert homes() == before
    assert 0 < before.count("b") < 30
    cluster.change({"a": 0.4, "b": 0.6})
    wait_for(lambda: homes().count("b") > before.count("b"), 10)
    assert all(new in (old, "b") for old, new in zip(before, homes(), strict=True))


def test_calls_wait_while_no_target_is_ready_and_go_to_the_first(replica: Replicas, share: Any) -> None:
    cluster = Shared({"a": 0.9, "b": 0.1})  # nothing is deployed
    handle = share(cluster)
    early = handle.remote()
    wait_for(lambda: cluster.asked > 0, 10)
    cluster.change(a=[], b=[])
    late = handle.remote()
    cancelled = handle.remote()
    cancelled.cancel()
    cluster.change(b=[replica(says("b"))])
    assert (early.result(timeout_s=5), late.result(timeout_s=5)) == ("b", "b")
    with pytest.raises(RequestCancelledError):
        cancelled.result()


def test_a_target_whose_replica_dies_gets_no_share_and_what_waits_there_moves(replica: Replicas, share: Any) -> None:
    hung = replica(silent, max_ongoing=1)
    cluster = Shared({"a": 1.0, "b": 0.0}, a=[hung], b=[replica(says("b"))])
    cluster.config["max_ongoing_requests"] = 1
    handle = share(cluster)
    begun = handle.remote()
    hung.calls.get(timeout=5)
    waiting = [handle.remote() for _ in range(3)]
    cluster.change({"a": 0.5, "b": 0.5})
    wait_for(lambda: caller.current().client.version() == (1, cluster.version), 10)
    hung.die()
    assert [response.result(timeout_s=5) for response in waiting] == ["b"] * 3
    with pytest.raises(Exception, match="died"):
        begun.result(timeout_s=5)
    assert [handle.remote().result(timeout_s=5) for _ in range(4)] == ["b"] * 4


def test_a_call_that_comes_back_unbegun_goes_to_a_ready_target(replica: Replicas, share: Any) -> None:
    def leave(call: Call) -> None:
        call.link.send(DRAIN)
        call.send(RETURNED, flags=FIN)

    cluster = Shared({"a": 0.9, "b": 0.1}, a=[replica(leave)], b=[replica(says("b"))])
    handle = share(cluster)
    assert [handle.remote().result(timeout_s=5) for _ in range(3)] == ["b"] * 3


def test_what_waits_at_a_target_that_is_deleted_goes_to_another(replica: Replicas, share: Any) -> None:
    hung = replica(silent, max_ongoing=1)
    cluster = Shared({"a": 1.0, "b": 0.0}, a=[hung], b=[replica(says("b"))])
    cluster.config["max_ongoing_requests"] = 1
    handle = share(cluster)
    handle.remote()
    hung.calls.get(timeout=5)
    waiting = handle.remote()
    cluster.change({"b": 1.0}, a=None)
    assert waiting.result(timeout_s=5) == "b"


def test_limits_of_the_target_hold(replica: Replicas, share: Any) -> None:
    hung = replica(silent, max_ongoing=1)
    cluster = Shared({"a": 1.0}, a=[hung])
    cluster.config |= {"max_ongoing_requests": 1, "max_queued_requests": 1}
    handle = share(cluster)
    handle.remote()
    hung.calls.get(timeout=5)
    waits = handle.remote()
    with pytest.raises(BackPressureError):
        handle.remote().result(timeout_s=5)
    waits.cancel()


def test_a_split_without_weight_and_one_that_does_not_exist_are_errors(replica: Replicas, share: Any) -> None:
    handle = share(Shared({"a": 0.0}, a=[replica()]))
    with pytest.raises(DeploymentUnavailableError, match="'e' has no target"):
        handle.remote().result(timeout_s=5)
    with pytest.raises(RayServeException):
        DeploymentHandle("f", "", _key="split:f").remote().result(timeout_s=5)


def test_replicas_are_chosen_by_the_handle_of_one_deployment_only(replica: Replicas, share: Any) -> None:
    handle = share(Shared({"a": 1.0}, a=[replica()]))

    async def choose() -> None:
        async with handle.choose_replica():
            pass

    with pytest.raises(RayServeException, match="shared by several deployments"):
        asyncio.run(choose())
    with pytest.raises(RayServeException, match="shared by several deployments"):
        handle.broadcast("m")


def test_many_calls_that_wait_and_end_leave_nothing_behind(replica: Replicas, share: Any) -> None:
    cluster = Shared({"a": 0.5, "b": 0.5}, a=[replica(says("a"))], b=[replica(says("b"))])
    handle = share(cluster)
    for _ in range(5):
        responses = [handle.remote() for _ in range(200)]
        assert {response.result(timeout_s=10) for response in responses} <= {"a", "b"}
    assert caller.current().client.counters()["outstanding"] == 0
