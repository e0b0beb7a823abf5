"""Rollouts on real replicas under load: to the end, back, steered, and over the death of the controller."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from deployed import actor_pid, code, wait_for
from load import Load

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException

ROUTE = "/r"
PLAN: dict[str, Any] = {"steps": [0.2, 0.6, 1.0], "step_duration_s": 1.0, "min_requests": 20}


def deploy(name: str, **options: Any) -> None:
    serve.run(code(name, max_ongoing_requests=100, **options), name=name, route_prefix=None)


def deploy_as(name: str, sleep_s: float = 0.0, fails: bool = False) -> None:
    @serve.deployment(name="Bad", max_ongoing_requests=100)
    async def bad(request: Any) -> str:
        await asyncio.sleep(sleep_s)
        if fails:
            raise ValueError("a bad release")
        return "bad 0"

    serve.run(bad.bind(), name=name, route_prefix=None)


@pytest.fixture
def load(serve_instance: str) -> Any:
    """A load of 200 requests/s on the route, which `old` serves alone; `new` waits."""
    deploy("old")
    serve.set_traffic(ROUTE, {"old": 1.0})
    with Load(serve_instance + ROUTE, rate=200) as load:
        yield load


def weights() -> dict[str, float]:
    return {name: t.weight for name, t in serve.get_traffic(ROUTE).targets.items()}


def test_a_good_release_takes_over_step_by_step_and_loses_nothing(load: Load) -> None:
    deploy("new")
    status = serve.rollout(ROUTE, "new", max_p99_ms=10_000, **PLAN).wait(timeout_s=60)
    assert status.state == "COMPLETED"
    assert [(d.action, d.share) for d in status.history if d.action != "hold"] == [
        ("start", 0.2),
        ("advance", 0.6),
        ("advance", 1.0),
        ("complete", 1.0),
    ]
    assert weights() == {"old": 0.0, "new": 1.0}
    assert all(d.window.requests >= 20 for d in status.history[1:] if d.action != "hold" and d.window is not None)
    serve.delete("old")
    assert load.failures == {}
    assert serve.get_traffic(ROUTE).rollout == "COMPLETED"


def test_a_release_that_fails_is_taken_back(load: Load) -> None:
    deploy_as("new", fails=True)
    status = serve.rollout(ROUTE, "new", **{**PLAN, "step_duration_s": 60.0}).wait(timeout_s=60)
    assert status.state == "ROLLED_BACK"
    assert "error rate 100.00% is above 1.00%" in status.reason
    assert weights() == {"old": 1.0, "new": 0.0}
    load.wait(50)  # what was on its way, also to proxies that have not heard of it yet
    failed = sum(load.failures.values())
    load.wait(100)
    assert sum(load.failures.values()) == failed
    serve.delete("new")


@pytest.mark.parametrize("bound", [{"max_p99_ms": 150.0}, {"max_p99_ratio": 3.0}])
def test_a_release_that_is_slow_is_taken_back(load: Load, bound: dict[str, float]) -> None:
    deploy_as("new", sleep_s=1.0)
    status = serve.rollout(ROUTE, "new", **{**PLAN, "step_duration_s": 60.0}, **bound).wait(timeout_s=60)
    assert status.state == "ROLLED_BACK"
    assert "p99" in status.reason
    assert weights() == {"old": 1.0, "new": 0.0}
    assert load.failures == {}


def test_an_operator_pauses_resumes_and_aborts_from_anywhere(load: Load, tmp_path: Path) -> None:
    deploy("new")
    serve.rollout(ROUTE, "new", **{**PLAN, "step_duration_s": 60.0})
    script = tmp_path / "steer.py"
    script.write_text(
        "import sys, ray\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "from rayserve_fast import serve\n"
        f"serve.get_rollout({ROUTE!r}).pause()\n"
    )
    subprocess.run([sys.executable, script, ray.get_runtime_context().gcs_address], check=True, timeout=60)
    rollout = serve.get_rollout(ROUTE)
    assert rollout.status().state == "PAUSED"
    with pytest.raises(TimeoutError, match=r"was not over after 0\.5 s"):
        rollout.wait(timeout_s=0.5)
    assert rollout.status().share == 0.2
    with pytest.raises(RayServeException, match="A rollout of 'new' decides over the weights"):
        serve.set_traffic(ROUTE, {"old": 1.0})
    rollout.resume()
    wait_for(lambda: rollout.status().window is not None)
    rollout.abort()
    assert rollout.wait(timeout_s=10).state == "ABORTED"
    assert weights() == {"old": 1.0, "new": 0.0}
    with pytest.raises(ValueError, match="Cannot resume the rollout of 'new' on '/r': it is ABORTED"):
        rollout.resume()
    assert load.failures == {}
    again = serve.rollout(ROUTE, "new", **PLAN)
    with pytest.raises(RayServeException, match="followed by another one"):
        rollout.status()
    again.abort()


def test_a_rollout_outlives_the_controller(load: Load) -> None:
    deploy("new")
    rollout = serve.rollout(ROUTE, "new", **PLAN)
    wait_for(lambda: rollout.status().step == 2)
    os.kill(actor_pid("SERVE_CONTROLLER_ACTOR"), signal.SIGKILL)
    status = rollout.wait(timeout_s=60)
    assert status.state == "COMPLETED"
    assert [d.action for d in status.history if d.action != "hold"] == ["start", "advance", "advance", "complete"]
    assert weights() == {"old": 0.0, "new": 1.0}
    assert load.failures == {}


def test_without_requests_a_rollout_holds(serve_instance: str) -> None:
    deploy("old")
    deploy("new")
    serve.set_traffic(ROUTE, {"old": 1.0})
    rollout = serve.rollout(ROUTE, "new", steps=[0.5, 1.0], step_duration_s=0.2)
    wait_for(lambda: rollout.status().history[-1].action == "hold")
    assert rollout.status().reason == "0 of the 100 requests that a window must have to be judged"
    assert rollout.status().share == 0.5
