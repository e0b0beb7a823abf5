"""Orders about traffic and endpoints at a real controller: in force when they return, kept over its death."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import ray
from deployed import actor_pid, code, get, pid_of, proxy_actor, wait_for

from rayserve_fast import serve
from rayserve_fast.application import RunTarget, build_target
from rayserve_fast.controlplane import client
from rayserve_fast.exceptions import RayServeException


def snapshot() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(client.snapshot())
    return found


@pytest.fixture
def backend(serve_instance: str) -> str:
    """A backend of the older API."""
    spec = build_target(RunTarget(code("v1"), "old", None), {})
    ray.get(client.require().deploy.remote([replace(spec, era="backend", labels={"accepts_batches": False})]))
    return "old"


def test_traffic_outlives_the_controller(serve_instance: str) -> None:
    serve.run_many([serve.RunTarget(code("a"), "a", "/a"), serve.RunTarget(code("b"), "b", None)])
    serve.set_traffic("/a", {"a": 0.9, "b": 0.1}, sticky_header="x-user")
    before = snapshot()
    os.kill(actor_pid("SERVE_CONTROLLER_ACTOR"), 9)
    after = snapshot()
    assert after["version"] > before["version"]
    assert after["splits"] == before["splits"] != {}
    assert after["routes"] == before["routes"]
    with pytest.raises(RayServeException, match="target of the traffic of route /a"):
        serve.delete("b")
    with pytest.raises(RayServeException, match="target of the traffic of route /a"):
        serve.delete("b", _blocking=False)
    serve.delete_traffic("/a")
    serve.delete("b")
    assert snapshot()["splits"] == {}


def test_a_redeploy_of_a_target_keeps_its_traffic(serve_instance: str) -> None:
    serve.run_many([serve.RunTarget(code("a"), "a", "/a"), serve.RunTarget(code("b"), "b", None)])
    serve.set_traffic("/a", {"a": 0.9, "b": 0.1})
    split = snapshot()["splits"]["/a"]
    serve.run(code("b2"), name="b", route_prefix=None)
    assert snapshot()["splits"]["/a"] == split


def test_endpoints_and_backends_live_as_in_the_older_api(serve_instance: str, backend: str) -> None:
    client.ask("create_endpoint", "simple", "/simple", ["get"])
    assert client.ask("endpoints") == {
        "simple": {"route": "/simple", "methods": ["GET"], "traffic": {}, "shadows": {}},
    }
    status, text = get(f"{serve_instance}/simple")
    assert status == 503
    assert "simple" in text
    serve.set_traffic(backend, {"simple": 1.0})
    assert get(f"{serve_instance}/simple")[0] == 200
    assert client.ask("endpoints")["simple"]["traffic"] == {backend: 1.0}
    with pytest.raises(ValueError, match="Backend 'old' is used by endpoint 'simple' and cannot be deleted"):
        serve.delete(backend)
    assert client.ask("applications", "backend") == {"old": {"accepts_batches": False}}
    assert client.ask("applications", "") == {}
    with pytest.raises(RayServeException, match='name "old" is held by a backend'):
        serve.run(code("v2"), name="old", route_prefix=None)
    client.ask("delete_endpoint", "simple")
    serve.delete(backend)
    assert client.ask("applications", "backend") == {}


def test_orders_that_the_death_of_the_controller_interrupts_are_carried_out_once(serve_instance: str) -> None:
    serve.run(code("a"), name="a", route_prefix="/a")
    serve.set_traffic("/a", {"a": 1.0})
    client.ask("create_endpoint", "old", "/old")
    controller, proxy = actor_pid("SERVE_CONTROLLER_ACTOR"), pid_of(proxy_actor())
    before = client.require()
    os.kill(proxy, signal.SIGSTOP)  # so that no order returns
    try:
        orders = [
            before.create_endpoint.remote("new", "/new"),
            before.delete_endpoint.remote("old"),
            before.delete_traffic.remote("/a"),
        ]
        wait_for(lambda: set(client.ask("endpoints")) == {"new"} and not snapshot()["splits"].get("/a"), 1.5)
        os.kill(controller, signal.SIGKILL)
    finally:
        os.kill(proxy, signal.SIGCONT)
    for order in orders:
        client.answer(order, 30)
    assert set(client.ask("endpoints")) == {"new"}
    assert set(serve.get_traffic()) == {"new"}
