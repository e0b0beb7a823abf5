"""The decisions of the control plane, without Ray: a small simulator executes what `decide` returns."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from rayserve_fast.controlplane import reconcile, snapshot, transitions
from rayserve_fast.controlplane.reconcile import Reconfigure, Start, Stop
from rayserve_fast.controlplane.spec import (
    ApplicationSpec,
    DeploymentConfig,
    DeploymentSpec,
    DriverEnv,
    ReplicaAddress,
)
from rayserve_fast.controlplane.state import Application, Replica
from rayserve_fast.controlplane.traffic import Traffic


def spec(code: str = "v1", name: str = "D", **options: Any) -> DeploymentSpec:
    return DeploymentSpec("app", name, b"", DeploymentConfig(**options), DriverEnv(), False, None, code)


class World:
    """One deployment and a cluster in which everything that is decided happens."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.app = Application(ApplicationSpec("app", "/", "D", ()), 0.0)
        self.now = 1000.0
        self.born = 0
        self.deploy("v1")

    def deploy(self, code: str, **options: Any) -> None:
        self.d = reconcile.deployed(self.app, spec(code, **{**self.options, **options}))
        self.app.deployments["D"] = self.d

    def act(self) -> list[reconcile.Action]:
        actions = reconcile.decide(self.d, self.now)
        for a in actions:
            if isinstance(a, Start):
                self.born += 1
                reconcile.born(self.d, f"r{self.born}", a.rank)
            elif isinstance(a, Stop):
                self.d.replicas[a.replica_id].state = "STOPPING"
            else:
                r = self.d.replicas[a.replica_id]
                r.state, r.config = "UPDATING", self.d.config
        reconcile.settle(self.d)
        return actions

    def ready(self, *replicas: Replica) -> None:
        for r in replicas or self.d.among("STARTING", "UPDATING"):
            r.address = ReplicaAddress(r.id, "n", "/s", None)
            reconcile.ready(self.d, r, self.now)
            self.now += 1

    def gone(self, *replicas: Replica) -> None:
        for r in replicas or self.d.among("STOPPING"):
            reconcile.died(self.d, r, self.now)

    def run(self) -> None:
        for _ in range(100):
            if not self.act() and not self.d.among("STARTING", "UPDATING", "STOPPING"):
                return
            self.ready()
            self.gone()
        pytest.fail("does not settle")

    def fail_start(self, error: str = "boom") -> None:
        reconcile.start_failed(self.d, self.d.among("STARTING")[0], error, self.now)

    def versions(self) -> list[str]:
        return sorted(r.version for r in self.d.among("RUNNING"))


def test_a_new_deployment_starts_all_replicas_at_once_with_contiguous_ranks() -> None:
    w = World(num_replicas=3)
    assert w.act() == [Start(0), Start(1), Start(2)]
    assert w.act() == []
    assert (w.d.status, w.d.trigger) == ("UPDATING", "CONFIG_UPDATE_STARTED")
    w.ready()
    w.act()
    assert (w.d.status, w.d.trigger) == ("HEALTHY", "CONFIG_UPDATE_COMPLETED")


def test_a_dead_replica_is_replaced_at_once_and_its_rank_is_taken_over() -> None:
    w = World(num_replicas=3)
    w.run()
    dead = w.d.replicas["r2"]
    w.now += 100
    w.gone(dead)
    assert w.d.status == "UNHEALTHY"
    assert w.act() == [Start(dead.rank)]
    w.run()
    assert (w.d.status, w.d.trigger) == ("HEALTHY", "UNSPECIFIED")


def test_one_replica_is_stopped_before_its_successor_starts_and_both_in_one_step() -> None:
    w = World()
    w.run()
    w.deploy("v2")
    assert w.act() == [Stop("r1"), Start(0)]
    w.ready()
    assert w.d.status == "UPDATING", "the old one is still draining"
    w.gone()
    w.act()
    assert w.d.status == "HEALTHY"


@pytest.mark.parametrize(("target", "percentage", "expected"), [(10, 0.2, 2), (10, 1.0, 10), (4, 0.2, 1), (5, 0.5, 2)])
def test_a_rolling_update_never_has_more_than_its_share_in_transition(
    target: int, percentage: float, expected: int
) -> None:
    w = World(num_replicas=target, rolling_update_percentage=percentage)
    w.run()
    w.deploy("v2")
    most = 0
    rng = random.Random(target)
    while True:
        actions = w.act()
        missing = target - len(w.d.among("RUNNING", "UPDATING"))
        most = max(most, missing)
        moving = w.d.among("STARTING", "STOPPING")
        if not actions and not moving:
            break
        r = rng.choice(moving)
        w.ready(r) if r.state == "STARTING" else w.gone(r)
    assert most == expected
    assert w.versions() == [w.d.version] * target
    assert w.d.status == "HEALTHY"


def test_a_changed_user_config_with_the_same_code_restarts_nothing() -> None:
    w = World(num_replicas=2)
    w.run()
    w.deploy("v1", user_config={"a": 1})
    assert w.act() == [Reconfigure("r1"), Reconfigure("r2")]
    assert w.act() == []
    w.run()
    assert w.d.status == "HEALTHY"
    assert w.born == 2


def test_a_replica_leaves_in_the_time_that_its_own_version_was_given() -> None:
    w = World(graceful_shutdown_timeout_s=1.0)
    w.run()
    w.deploy("v1", graceful_shutdown_timeout_s=5.0)
    assert w.act() == []
    assert w.d.replicas["r1"].grace_s == 5.0, "the same code takes the new time"
    w.deploy("v2", graceful_shutdown_timeout_s=30.0)
    assert Stop("r1") in w.act()
    assert {r.id: r.grace_s for r in w.d.replicas.values()} == {"r1": 5.0, "r2": 30.0}


def test_only_the_number_of_replicas_changed_scales_and_says_so() -> None:
    w = World(num_replicas=1)
    w.run()
    w.deploy("v1", num_replicas=3)
    assert w.d.status == "UPSCALING"
    assert w.act() == [Start(1), Start(2)]
    w.run()
    assert (w.d.status, w.d.trigger) == ("HEALTHY", "UPSCALE_COMPLETED")
    w.deploy("v1", num_replicas=1)
    assert w.d.status == "DOWNSCALING"
    w.run()
    assert (w.d.status, w.d.trigger) == ("HEALTHY", "DOWNSCALE_COMPLETED")
    assert [r.rank for r in w.d.replicas.values()] == [0], "the oldest stays"


def test_the_numbers_of_batches_change_in_place_but_to_begin_or_end_batching_takes_new_replicas() -> None:
    w = World(max_batch_size=4)
    w.run()
    version = w.d.version
    w.deploy("v1", max_batch_size=8, batch_wait_timeout_s=0.01, max_concurrent_batches=2)
    assert w.act() == [Reconfigure("r1")]
    w.run()
    assert w.d.version == version
    built = json.loads(snapshot.build((1, 1), {"app": w.app}, Traffic()))
    assert built["deployments"]["app#D"]["batch"] == {"max_size": 8, "wait_s": 0.01, "concurrent": 2}
    w.deploy("v1", max_batch_size=None)
    assert w.d.version != version
    assert Stop("r1") in w.act()
    assert json.loads(snapshot.build((1, 2), {"app": w.app}, Traffic()))["deployments"]["app#D"]["batch"] is None


def test_a_deploy_during_a_rollout_drops_the_replicas_that_never_served() -> None:
    w = World(num_replicas=2, rolling_update_percentage=1.0)
    w.run()
    w.deploy("v2")
    w.act()
    w.gone()
    unborn = w.d.among("STARTING")
    w.deploy("v3")
    assert [a for a in w.act() if isinstance(a, Stop)] == [Stop(r.id, graceful=False) for r in unborn]
    w.run()
    assert w.versions() == [w.d.version] * 2


def test_callers_leave_before_the_deployments_that_they_call() -> None:
    app = Application(ApplicationSpec("app", "/", "C", ()), 0.0, deleting=True)
    for name in "ABC":  # A is called by B, B by C
        d = app.deployments[name] = reconcile.deployed(None, spec(name=name))
        reconcile.born(d, "r", 0).state = "RUNNING"
        reconcile.delete(d)
    assert [d.spec.name for d in reconcile.active(app)] == ["C"]
    app.deployments["C"].replicas["r"].idle = True
    assert [d.spec.name for d in reconcile.active(app)] == ["C", "B"]
    app.deployments["B"].replicas.clear()
    assert [d.spec.name for d in reconcile.active(app)] == ["C", "B", "A"]


def test_a_deployment_that_a_redeploy_drops_stops_after_its_callers_were_replaced() -> None:
    w = World()
    w.run()
    dropped = w.app.deployments["Old"] = reconcile.deployed(None, spec(name="Old"))
    dropped.status = "HEALTHY"
    w.deploy("v2")
    reconcile.delete(dropped)
    w.act()
    assert list(reconcile.active(w.app)) == [w.d]
    w.d.cramped = True
    assert list(reconcile.active(w.app)) == [w.d, dropped], "or when they find no room while it is there"
    w.d.cramped = False
    w.run()
    assert list(reconcile.active(w.app)) == [w.d, dropped]


def test_a_renamed_ingress_takes_the_route_over_as_the_old_one_stops() -> None:
    def routes() -> tuple[str, list[str]]:
        built = json.loads(snapshot.build((1, 1), {"app": w.app}, Traffic()))
        return built["routes"][0]["deployment"], list(built["deployments"])

    w = World()
    w.run()
    old = w.app.deployments["Old"] = reconcile.deployed(None, spec(name="Old"))
    reconcile.born(old, "r", 0).state = "RUNNING"
    old.replicas["r"].address = ReplicaAddress("r", "n", "/s", None)
    w.app.former = "Old"
    assert routes()[0] == "app#D", "it is not dropped, and may be another thing now"
    reconcile.delete(old)
    assert routes() == ("app#Old", ["app#D", "app#Old"])
    old.replicas["r"].state = "STOPPING"
    assert routes() == ("app#D", ["app#D"]), "what waits for it moves, and it finishes what it has"


def test_a_deploy_under_the_name_of_an_application_that_leaves_starts_anew() -> None:
    w = World(num_replicas=2)
    w.run()
    reconcile.delete(w.d)
    w.act()
    w.deploy("v2")
    w.run()
    assert w.versions() == [w.d.version] * 2
    assert (w.d.status, w.d.trigger) == ("HEALTHY", "CONFIG_UPDATE_COMPLETED")


def test_random_histories_end_where_they_should() -> None:
    """Whatever order deploys, starts, deaths and drains come in: when they stop, the target is what runs."""
    rng = random.Random(7)
    for _ in range(200):
        w = World(num_replicas=rng.randint(1, 6), rolling_update_percentage=rng.choice([0.2, 0.5, 1.0]))
        for step in range(rng.randint(0, 40)):
            w.act()
            w.now += rng.random() * 5
            event = rng.random()
            if event < 0.1:
                w.deploy(f"v{step}", num_replicas=rng.randint(1, 6))
            elif event < 0.5 and w.d.among("STARTING"):
                w.ready(rng.choice(w.d.among("STARTING")))
            elif event < 0.7 and w.d.among("STOPPING"):
                w.gone(rng.choice(w.d.among("STOPPING")))
            elif event < 0.8 and w.d.among("RUNNING"):
                w.gone(rng.choice(w.d.among("RUNNING")))
            assert len(w.d.among("STARTING", "RUNNING", "UPDATING")) <= max(w.d.target, 6)
        w.deploy("last", num_replicas=3)
        w.now += 100
        w.run()
        assert w.versions() == [w.d.version] * 3
        assert sorted(r.rank for r in w.d.replicas.values()) == [0, 1, 2]
        assert w.d.status == "HEALTHY"


@pytest.mark.parametrize(
    ("deployments", "expected"),
    [
        ([("a", "HEALTHY", "", ""), ("b", "HEALTHY", "", "")], "RUNNING"),
        ([("a", "HEALTHY", "", ""), ("b", "UPDATING", "", "")], "DEPLOYING"),
        ([("a", "UNHEALTHY", "", ""), ("b", "UPDATING", "", "")], "UNHEALTHY"),
        ([("a", "UNHEALTHY", "", ""), ("b", "DEPLOY_FAILED", "", "why")], "DEPLOY_FAILED"),
        ([("a", "UPSCALING", "AUTOSCALING", "")], "RUNNING"),
        ([("a", "UPSCALING", "CONFIG_UPDATE_STARTED", "")], "DEPLOYING"),
    ],
)
def test_the_worst_deployment_decides_the_status_of_the_application(
    deployments: list[tuple[str, str, str, str]], expected: str
) -> None:
    assert transitions.application(deployments, deleting=False)[0] == expected
    assert transitions.application(deployments, deleting=True)[0] == "DELETING"


def test_a_deleted_deployment_never_looks_healthy_again() -> None:
    w = World()
    w.run()
    reconcile.delete(w.d)
    assert w.act() == [Stop("r1")]
    w.gone()
    w.act()
    assert (w.d.status, w.d.trigger) == ("UPDATING", "DELETING")


def test_versions_tell_restarts_from_changes_in_place() -> None:
    base = spec()
    assert reconcile.versions(base) == reconcile.versions(replace(base, config=replace(base.config, num_replicas=7)))
    assert reconcile.versions(base)[0] != reconcile.versions(spec(ray_actor_options={"num_cpus": 2}))[0]
    changed = reconcile.versions(spec(max_ongoing_requests=9))
    assert changed[0] == reconcile.versions(base)[0]
    assert changed[1] != reconcile.versions(base)[1]
