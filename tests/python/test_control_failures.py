"""What the control plane decides when replicas fail to start, or die; without Ray."""

from __future__ import annotations

from test_control_reconcile import World

from rayserve_fast.controlplane import reconcile
from rayserve_fast.controlplane.reconcile import Start, Stop


def test_a_replica_that_keeps_dying_young_is_backed_off() -> None:
    w = World()
    w.run()
    for _ in range(2):
        w.gone(*w.d.among("RUNNING"))
        assert w.act() == [Start(0)]
        w.run()
    w.gone(*w.d.among("RUNNING"))
    assert w.act() == []
    w.now += 1.1
    assert w.act() == [Start(0)]


def test_the_same_failure_again_is_told_in_one_line() -> None:
    w, told = World(), []
    for error in ("boom", "boom", "bang"):
        w.act()
        told.append(reconcile.told(w.d, error))
        w.fail_start(error)
    assert told == [
        "failed to start:\nboom",
        "failed to start: attempt 2 of 3 failed in the same way.",
        "failed to start:\nbang",
    ]
    w.deploy("v2")
    assert reconcile.told(w.d, "bang") == "failed to start:\nbang"


def test_a_constructor_that_always_fails_is_tried_three_times_per_replica() -> None:
    w = World(num_replicas=2)
    tries = 0
    while any(isinstance(a, Start) for a in w.act()) or w.d.among("STARTING"):
        w.fail_start(f"boom {tries}")
        tries += 1
        assert tries < 50
    assert tries == 6
    assert (w.d.status, w.d.trigger) == ("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED")
    assert "boom 5" in w.d.message


def test_the_retries_are_capped_by_the_option() -> None:
    w = World(num_replicas=4, max_constructor_retry_count=2)
    w.act()
    w.fail_start()
    w.fail_start()
    assert {type(a) for a in w.act()} == {Stop}, "what still starts is stopped"
    w.gone()
    assert w.act() == []
    assert w.d.status == "DEPLOY_FAILED"


def test_a_failed_rollout_keeps_the_survivors_and_starts_nothing() -> None:
    w = World(num_replicas=3)
    w.run()
    old = w.d.version
    w.deploy("v2")
    for _ in range(100):
        w.act()
        w.gone()
        if not w.d.among("STARTING"):
            break
        w.fail_start("bad constructor")
    assert w.d.status == "DEPLOY_FAILED"
    assert "bad constructor" in w.d.message
    assert w.versions() == [old, old]
    w.gone(w.d.among("RUNNING")[0])
    assert w.act() == [], "the old code is not started again"
    w.deploy("v3")
    w.run()
    assert w.versions() == [w.d.version] * 3
    assert w.d.status == "HEALTHY"


def test_once_a_replica_has_run_starting_others_is_never_given_up() -> None:
    w = World(num_replicas=2)
    w.act()
    w.ready(w.d.among("STARTING")[0])
    for _ in range(30):
        w.act()
        if w.d.among("STARTING"):
            w.fail_start()
        w.now += 100
    assert w.d.status == "UPDATING"
    assert not w.d.failed


def test_the_previous_version_is_said_to_serve_on_only_while_it_does() -> None:
    w = World(num_replicas=2)
    w.run()
    w.deploy("v2")
    while w.d.status != "DEPLOY_FAILED":
        w.act()
        w.gone()
        if w.d.among("STARTING"):
            w.fail_start()
    assert "The update has stopped; replicas of the previous version keep serving. Error:" in w.d.message
    w.gone(*w.d.among("RUNNING"))
    w.act()
    assert "The update has stopped. Error:" in w.d.message
