"""What a proxy's threads tell an operator, on the error output of their process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from deployed import wait_for
from http_pair import proxy_config, snapshot
from worker_replica import TOKEN, Replica, serving

from rayserve_fast._core import Proxy
from rayserve_fast.controlplane.spec import DeploymentConfig


async def handler() -> str:
    return "done"


@contextmanager
def proxy_of(replica: Replica, **changes: Any) -> Iterator[Proxy]:
    """A proxy of two threads that knows the replica."""
    proxy = Proxy(json.dumps({**proxy_config(""), "shards": 2, "token": TOKEN.hex(), **changes}).encode())
    proxy.start()
    assert proxy.publish(json.dumps(snapshot("/", DeploymentConfig(), replica.address.unix)).encode())
    yield proxy
    proxy.shutdown(1.0)


def test_a_replica_with_another_token_is_named_once(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(handler) as replica, proxy_of(replica, token="ff" * 32) as proxy:
        assert proxy.wait_linked(["r1"], 1.0) == ["r1"], "many attempts of both threads"
    told = [line for line in capfd.readouterr().err.splitlines() if "r1" in line]
    assert len(told) == 1, told
    assert "WARN cannot link to a replica" in told[0]
    assert "peer does not know the cluster token" in told[0]


def test_a_lost_replica_is_named_once_and_one_that_left_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(handler) as replica, proxy_of(replica) as proxy:
        assert proxy.wait_linked(["r1"], 5.0) == []
        left = snapshot("/", DeploymentConfig(), replica.address.unix)
        left["version"], left["deployments"]["default#D"]["replicas"] = [1, 2], []
        assert proxy.publish(json.dumps(left).encode())
        gone(proxy)
    assert "r1" not in capfd.readouterr().err
    with serving(handler) as replica, proxy_of(replica) as proxy:
        assert proxy.wait_linked(["r1"], 5.0) == []
        replica.runtime.stop()
        gone(proxy)
    told = [line for line in capfd.readouterr().err.splitlines() if "r1" in line]
    assert len(told) == 1, told
    assert "WARN lost the last link to a replica" in told[0]


def gone(proxy: Proxy) -> None:
    wait_for(lambda: not proxy.counters()["links"], 5)
