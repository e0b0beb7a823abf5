"""Processes killed on a real Ray, under load: replicas, the controller, the proxy."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from deployed import actor_pid, code, crash_proxy, get, pid_of, proxy_actor, replica_actors, replica_states, wait_for
from load import Load

from rayserve_fast import serve
from rayserve_fast.controlplane import client


def test_a_killed_replica_costs_no_get_request_and_is_replaced(serve_instance: str) -> None:
    serve.run(code("v1", num_replicas=2, max_ongoing_requests=100))
    with Load(serve_instance, rate=300) as load:
        load.wait(300)
        victim = int(next(iter(load.answers))[1].split()[1])
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: replica_states() == {"RUNNING": 1, "STARTING": 1}, 1, lambda: "no replacement starts")
        wait_for(lambda: replica_states() == {"RUNNING": 2})
        load.wait(300)
    assert load.failures == {}
    assert len({body for _, body in load.answers}) == 3
    assert serve.status().applications["default"].status == "RUNNING"


def test_a_replica_that_dies_before_it_is_linked_is_replaced_at_once(serve_instance: str) -> None:
    proxy = pid_of(proxy_actor())
    os.kill(proxy, signal.SIGSTOP)  # which makes no link
    try:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(serve.run, code("v1"))
            wait_for(lambda: any(ray.get(r.address.remote()) for r in replica_actors()))
            (dead,) = replica_actors()
            os.kill(pid_of(dead), signal.SIGKILL)
            wait_for(lambda: {r._actor_id for r in replica_actors()} - {dead._actor_id}, 3)
            os.kill(proxy, signal.SIGCONT)
            running.result()
    finally:
        os.kill(proxy, signal.SIGCONT)
    assert get(serve_instance)[0] == 200


def test_a_crashed_controller_finds_its_replicas_again(serve_instance: str) -> None:
    serve.run(code("v1", num_replicas=2))
    epoch = client.snapshot()
    with Load(serve_instance, rate=100) as load:
        os.kill(actor_pid("SERVE_CONTROLLER_ACTOR"), signal.SIGKILL)
        load.wait(100)
        states = replica_states()
        assert sum(states.values()) == 2
        assert states.keys() <= {"RECOVERING", "RUNNING"}
        assert client.snapshot() != epoch
        serve.run(code("v2", num_replicas=2))
    assert load.failures == {}
    pids = {body for _, body in load.answers if body.startswith("v1")}
    assert len(pids) == 2, "the old replicas were kept, not replaced"


def test_a_caller_of_another_cluster_is_told_that_its_own_is_gone(serve_instance: str) -> None:
    client.next_snapshot(None, client.cluster_token()).result(timeout=10)
    with pytest.raises(client.NotRunningError, match="another one is there"):
        client.next_snapshot(None, b"another's").result(timeout=10)


def test_a_replica_that_dies_while_the_controller_is_down_is_replaced(serve_instance: str) -> None:
    serve.run(code("v1", num_replicas=2))
    with Load(serve_instance, rate=100) as load:
        wait_for(lambda: len(load.answers) == 2)
        dead, kept = (body for _, body in list(load.answers))
        os.kill(actor_pid("SERVE_CONTROLLER_ACTOR"), signal.SIGKILL)
        os.kill(int(dead.split()[1]), signal.SIGKILL)
        wait_for(lambda: replica_states() == {"RUNNING": 2})
        before = load.answers.copy()
        load.wait(100)
        assert {body for _, body in load.answers - before} > {kept}
    assert load.failures == {}


def test_a_crashed_proxy_comes_back_on_its_port(serve_instance: str) -> None:
    serve.run(code("v1"))
    crash_proxy(serve_instance)
