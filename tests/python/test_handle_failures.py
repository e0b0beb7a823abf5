"""Handle calls when something is in the way: deaths, refusals, queues, cancels, a controller that is away."""

from __future__ import annotations

import asyncio
import gc
import pickle
import queue
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed import wait_for
from ray.exceptions import ActorDiedError
from scripted_replica import (  # noqa: F401 - fixtures
    BUSY,
    CANCEL,
    CREDIT,
    DRAIN,
    GRANTED,
    PING,
    PONG,
    RETURNED,
    TOKEN,
    UNUSED,
    Call,
    Cluster,
    Replicas,
    connecting,
    replicas,
    silent,
)
from worker_replica import TOKEN as WORKER_TOKEN, serving

from rayserve_fast import caller
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.spec import DeploymentID
from rayserve_fast.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
)
from rayserve_fast.handle import DeploymentHandle


def test_a_begun_call_whose_replica_dies_raises_and_the_next_goes_elsewhere(replica: Replicas, connect: Any) -> None:
    dying, spare = replica(silent), replica()
    cluster = Cluster(dying)
    handle = connect(cluster)
    response = handle.remote()
    dying.calls.get(timeout=5)
    cluster.publish(spare)
    dying.die()
    with pytest.raises(ActorDiedError, match="r0"):
        response.result(timeout_s=5)
    assert handle.remote("next").result(timeout_s=5) == ("next",)


def test_a_death_right_behind_an_answer_is_noticed(replica: Replicas, connect: Any) -> None:
    dying, spare = replica(silent), replica()
    cluster = Cluster(dying)
    handle = connect(cluster)
    first = handle.remote("warm")
    dying.calls.get(timeout=5).reply("up")
    assert first.result(timeout_s=5) == "up"
    answered, lost = handle.remote(1), handle.remote(2)
    cluster.publish(spare)
    calls = [dying.calls.get(timeout=5) for _ in range(2)]
    calls[0].reply("last word")
    dying.die()  # before anybody has read it
    with pytest.raises(ActorDiedError):
        lost.result(timeout_s=5)
    assert answered.result(timeout_s=5) == "last word"


def test_queued_calls_move_to_another_replica_when_theirs_dies(replica: Replicas, connect: Any) -> None:
    dying, spare = replica(silent, max_ongoing=1), replica()
    cluster = Cluster(dying, max_ongoing_requests=1)
    handle = connect(cluster)
    begun = handle.remote(0)
    dying.calls.get(timeout=5)
    queued = [handle.remote(i) for i in range(1, 5)]
    cluster.publish(spare)
    dying.die()
    assert [r.result(timeout_s=5) for r in queued] == [(i,) for i in range(1, 5)]
    with pytest.raises(ActorDiedError):
        begun.result(timeout_s=5)


def test_a_call_that_was_not_wholly_sent_is_not_begun(replica: Replicas, connect: Any, tmp_path: Path) -> None:
    stuck = threading.Event()

    def block(call: Call) -> None:
        stuck.wait(10)  # the link's thread reads no further

    dying, spare = replica(block), replica()
    cluster = Cluster(dying)
    handle = connect(cluster)
    begun = handle.remote()
    dying.calls.get(timeout=5)
    large = handle.remote(b"x" * 50_000_000)
    cluster.publish(spare)
    dying.die()
    stuck.set()
    assert len(large.result(timeout_s=20)[0]) == 50_000_000
    with pytest.raises(ActorDiedError):
        begun.result(timeout_s=5)


def test_a_draining_replica_gives_back_what_it_held_and_gets_nothing_more(replica: Replicas, connect: Any) -> None:
    leaving, spare = replica(silent), replica()
    cluster = Cluster(leaving)
    handle = connect(cluster)
    running, held = handle.remote("running"), handle.remote("held")
    first, second = leaving.calls.get(timeout=5), leaving.calls.get(timeout=5)
    cluster.publish(leaving, spare)  # the snapshot still lists it; DRAIN outranks that
    first.link.send(DRAIN)
    second.send(RETURNED, flags=1)
    assert held.result(timeout_s=5) == ("held",)
    for i in range(5):
        assert handle.remote(i).result(timeout_s=5) == (i,)
    assert leaving.calls.empty()
    first.reply("finished")
    assert running.result(timeout_s=5) == "finished"


def test_a_refused_call_uses_the_credit_it_is_given(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    response = handle.remote("x")
    server.calls.get(timeout=5).send(BUSY, flags=1)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.1)
    assert server.calls.empty(), "nothing is sent before the credit"
    server.links[0].send(CREDIT, aux=2)
    again = server.calls.get(timeout=5)
    assert again.flags & GRANTED
    assert server.frames.get(timeout=5) == (UNUSED, 0, 1)
    again.reply("served")
    assert response.result(timeout_s=5) == "served"


def test_a_refused_call_goes_to_a_replica_with_room(replica: Replicas, connect: Any) -> None:
    full = replica(lambda call: call.send(BUSY, flags=1, load=5))
    spare = replica()
    cluster = Cluster(full)
    handle = connect(cluster)
    response = handle.remote("x")
    full.calls.get(timeout=5)
    cluster.publish(full, spare)
    full.links[0].send(DRAIN)
    assert response.result(timeout_s=5) == ("x",)


def test_pings_are_answered_while_somebody_waits(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    response = connect(Cluster(server)).remote()
    call = server.calls.get(timeout=5)
    call.link.send(PING, aux=77)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.2)
    assert server.frames.get(timeout=5) == (PONG, 0, 77)


def test_max_queued_requests_refuses_with_back_pressure(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    backpressure = {"status_code": 429, "retry_after_s": 2.0}
    handle = connect(Cluster(server, max_ongoing_requests=1, max_queued_requests=2, backpressure=backpressure))
    handle.remote()
    server.calls.get(timeout=5)
    waiting = [handle.remote() for _ in range(2)]
    with pytest.raises(BackPressureError, match="max_queued_requests=2") as raised:
        handle.remote().result(timeout_s=5)
    assert (raised.value.status_code, raised.value.retry_after_s) == (429, 2.0)
    for response in waiting:
        response.cancel()
    handle.remote()  # there is room again


def test_cancel_ends_a_queued_call_before_it_starts(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))
    handle.remote("first")
    first = server.calls.get(timeout=5)
    response = handle.remote("never")
    response.cancel()
    with pytest.raises(RequestCancelledError, match=response.request_id):
        response.result(timeout_s=5)
    assert response.cancelled()
    handle.remote("third")
    first.reply(None)
    assert server.calls.get(timeout=5).args == ("third",)


def test_cancel_tells_the_replica_and_the_slot_comes_back_with_its_last_frame(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))
    response = handle.remote("running")
    running = server.calls.get(timeout=5)
    response.cancel()
    with pytest.raises(RequestCancelledError):
        response.result(timeout_s=5)
    assert server.frames.get(timeout=5) == (CANCEL, running.stream, 0)
    waiting = handle.remote("next")
    with pytest.raises(queue.Empty):
        server.calls.get(timeout=0.05)
    running.fail(4, b"")
    server.calls.get(timeout=5).reply("served")
    assert waiting.result(timeout_s=5) == "served"


@pytest.mark.parametrize("waiters", [1, 3])
def test_cancel_wakes_whoever_waits(replica: Replicas, connect: Any, waiters: int) -> None:
    handle = connect(Cluster(replica(silent)))
    with ThreadPoolExecutor(waiters) as pool:  # threads that get no signals, and so sleep as long as they may
        responses = [handle.remote() for _ in range(waiters)]
        waits = [pool.submit(response.result) for response in responses]
        time.sleep(0.2)  # no event tells that a thread sleeps
        for response, wait in zip(responses, waits, strict=True):
            response.cancel()
            with pytest.raises(RequestCancelledError):
                wait.result(timeout=5)


def test_a_call_to_an_unknown_deployment_is_sorted_out_while_the_tender_attends_another(
    replica: Replicas, connect: Any
) -> None:
    server = replica(silent)
    cluster = Cluster(server)
    handle = connect(cluster)
    handle.remote("nobody waits for this one")
    server.calls.get(timeout=5)
    time.sleep(0.2)  # the tender has the turn by now
    asked = cluster.asked
    dropped = DeploymentHandle("Missing", "app").remote()
    wait_for(lambda: cluster.asked > asked, 5)
    with pytest.raises(DeploymentUnavailableError):
        dropped.result(timeout_s=5)


def test_a_deployment_that_does_not_exist_says_so(replica: Replicas, connect: Any) -> None:
    connect(Cluster(replica()))
    with pytest.raises(DeploymentUnavailableError, match=r"Missing.*does not exist"):
        DeploymentHandle("Missing", "app").remote().result(timeout_s=5)


def test_why_a_deployment_is_unavailable_survives_pickling() -> None:
    error = DeploymentUnavailableError._because(DeploymentID("D", "app"), "it was deleted")
    assert str(pickle.loads(pickle.dumps(error))) == "it was deleted"
    assert "failed to deploy" in str(DeploymentUnavailableError(DeploymentID("D", "app")))


def test_a_deployment_that_failed_to_deploy_says_so(connect: Any) -> None:
    handle = connect(Cluster(unavailable="Deployment D is unavailable because it failed to deploy."))
    with pytest.raises(DeploymentUnavailableError, match="failed to deploy"):
        handle.remote().result(timeout_s=5)


def test_a_call_waits_for_the_first_replica(replica: Replicas, connect: Any) -> None:
    cluster = Cluster()
    response = connect(cluster).remote("early")
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.1)
    cluster.publish(replica())
    assert response.result(timeout_s=10) == ("early",)


def test_a_replica_with_another_token_is_not_trusted(replica: Replicas, connect: Any) -> None:
    server = replica()
    caller._set(caller.Caller("n", b"another token", Cluster(server)))
    response = DeploymentHandle("D", "app").remote()
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.3)
    assert server.calls.empty()


@pytest.mark.parametrize(
    ("node_id", "unix"),
    [("elsewhere", "real"), ("n", "/nowhere/r.sock"), ("n", None)],
    ids=["other node", "gone", "none"],
)
def test_a_replica_that_has_no_path_is_reached_by_its_address(connect: Any, node_id: str, unix: str | None) -> None:
    async def double(value: Any) -> Any:
        return value * 2

    with serving(double) as server:
        path = server.address.unix if unix == "real" else unix
        cluster = Cluster()
        cluster.replicas = [{"id": "r1", "node_id": node_id, "unix": path, "tcp": server.address.tcp}]
        caller._set(caller.Caller("n", WORKER_TOKEN, cluster))
        handle = DeploymentHandle("D", "app")
        assert handle.remote(21).result(timeout_s=10) == 42
        large = np.ones(3_000_000)
        np.testing.assert_array_equal(handle.remote(large).result(timeout_s=20), large * 2)


def test_the_first_call_of_a_replica_asks_ray_nothing_on_its_loop(
    replica: Replicas, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(replica())
    asking: list[str] = []

    def next_snapshot(newer_than: Any, token: bytes) -> Any:
        asking.append(threading.current_thread().name)
        return cluster.next(newer_than)

    monkeypatch.setattr(client, "next_snapshot", next_snapshot)
    monkeypatch.setattr(client, "cluster_token", lambda: 1 / 0)
    monkeypatch.setattr(caller, "_identity", None)
    caller.introduce("n", TOKEN)

    async def main() -> Any:
        return await DeploymentHandle("D", "app").remote(1)

    assert asyncio.run(main()) == (1,)
    assert set(asking) == {"rayserve-fast-calls"}


def test_a_failed_call_is_freed_with_its_last_reference(replica: Replicas, connect: Any) -> None:
    """Not by a collection: what a server that has turned it off would keep for ever."""
    handle = connect(Cluster(replica(lambda call: call.fail(4, b""))))

    async def awaited() -> weakref.ref[Any]:
        try:
            await (response := handle.remote())
        except RequestCancelledError:
            freed = weakref.ref(response)
            del response
            return freed
        raise AssertionError("no error")

    def waited() -> weakref.ref[Any]:
        try:
            (response := handle.remote()).result(timeout_s=5)
        except RequestCancelledError:
            freed = weakref.ref(response)
            del response
            return freed
        raise AssertionError("no error")

    gc.disable()
    try:
        assert waited()() is None
        assert asyncio.run(awaited())() is None
    finally:
        gc.enable()
