"""What may be asked of the traffic, what is refused, and what the snapshot then says; without Ray."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayserve_fast.controlplane import reconcile, snapshot
from rayserve_fast.controlplane.rollout import Plan, Rollout
from rayserve_fast.controlplane.spec import ApplicationSpec, DeploymentConfig, DeploymentSpec, DriverEnv
from rayserve_fast.controlplane.state import Application
from rayserve_fast.controlplane.traffic import Traffic
from rayserve_fast.exceptions import RayServeException


def app(name: str, route: str | None = None, era: str = "") -> Application:
    ingress = DeploymentSpec(name, "In", b"", DeploymentConfig(), DriverEnv(), False, None, "")
    spec = ApplicationSpec(name, route, "In", (ingress,), era=era)
    return Application(spec, 0.0, {"In": reconcile.deployed(None, ingress)})


class World:
    """A cluster with an application at /x, two without a route, and a backend."""

    def __init__(self) -> None:
        self.apps = {a.name: a for a in (app("a", "/x"), app("b"), app("c"), app("old", era="backend"))}
        self.traffic = Traffic()

    def set(self, name: str, weights: Any, sticky: Any = None, rules: Any = ()) -> None:
        self.traffic.assign(name, weights, sticky, rules, self.apps)

    def shadow(self, name: str, target: str, share: Any) -> None:
        self.traffic.shadow(name, target, share, self.apps)

    def endpoint(self, name: str = "e", route: Any = "/e", methods: Any = ("get",), weights: Any = None) -> None:
        self.traffic.create_endpoint(name, route, methods, weights, self.apps)

    def deploy(self, *specs: ApplicationSpec) -> None:
        self.traffic.check_deploy(specs, self.apps)

    def snapshot(self) -> dict[str, Any]:
        built: dict[str, Any] = json.loads(snapshot.build((1, 1), self.apps, self.traffic))
        return built

    def routes(self) -> dict[str, dict[str, Any]]:
        return {r["prefix"]: r for r in self.snapshot()["routes"]}


@pytest.fixture
def w() -> World:
    return World()


def test_a_route_of_an_application_is_split(w: World) -> None:
    w.set("/x", {"a": 0.75, "b": 0.25}, {"header": "x-user"})
    w.shadow("/x", "c", 0.1)
    assert w.routes()["/x"] == {"prefix": "/x", "app": "a", "deployment": "a#In", "split": "/x"}
    assert w.snapshot()["splits"]["/x"] == {
        "targets": [
            {"name": "a", "deployment": "a#In", "weight": 0.75},
            {"name": "b", "deployment": "b#In", "weight": 0.25},
        ],
        "sticky": {"header": "x-user"},
        "rules": [],
        "shadows": [{"name": "c", "deployment": "c#In", "share": 0.1}],
    }


def test_a_route_that_nobody_owns_exists_while_it_has_targets(w: World) -> None:
    w.set("/new", {"b": 1.0})
    assert w.routes()["/new"] == {
        "prefix": "/new",
        "app": "",
        "deployment": "",
        "label": {"b": 1.0},
        "split": "/new",
    }
    w.traffic.remove("/new")
    assert "/new" not in w.routes()
    with pytest.raises(RayServeException, match="'/new' has no traffic settings"):
        w.traffic.remove("/new")


def test_new_weights_replace_the_old_ones_and_what_stood_with_them_but_not_the_shadows(w: World) -> None:
    w.set("/x", {"a": 0.75, "b": 0.25}, {"header": "x-user"}, [{"header": "x-canary", "value": "1", "target": "b"}])
    w.shadow("/x", "c", 0.1)
    w.set("/x", {"a": 1.0})
    split = w.snapshot()["splits"]["/x"]
    assert [t["name"] for t in split["targets"]] == ["a"]
    assert (split["sticky"], split["rules"]) == (None, [])
    assert [s["name"] for s in split["shadows"]] == ["c"]


def test_a_target_that_only_a_rule_names_has_the_weight_0(w: World) -> None:
    w.set("/x", {"a": 1.0}, None, [{"cookie": "beta", "value": None, "target": "b"}])
    assert [(t["name"], t["weight"]) for t in w.snapshot()["splits"]["/x"]["targets"]] == [("a", 1.0), ("b", 0.0)]


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ({"b": 1.0}, RayServeException, r'/x belongs to application "a", which is not among the targets \[\'b\'\]'),
        ({"a": 0.5, "z": 0.5}, RayServeException, r"no application 'z'.*serve.run\(app, name='z', route_prefix=None\)"),
        ({"a": 0.5, "b": 0.6}, ValueError, r"weights: must sum to 1, they sum to 1.1\. Divide"),
        ({}, ValueError, r"weights: must sum to 1.*serve.delete_traffic\('/x'\)"),
        ({"a": 1.5, "b": -0.5}, ValueError, "weights: the weight of 'b' is -0.5; give 0 or more"),
        ({"a": "1"}, TypeError, "weights: the weight of 'a' must be a finite number, got '1'"),
        ({"a": True}, TypeError, "weights: the weight of 'a' must be a finite number"),
        ({"a": float("nan")}, TypeError, "weights: the weight of 'a' must be a finite number"),
        ({1: 1.0}, TypeError, "weights: a target is the name of an application, got 1"),
        ([("a", 1.0)], TypeError, "weights: must be a dictionary of target to weight, got list"),
    ],
)
def test_weights_that_a_route_cannot_have_change_nothing(w: World, weights: Any, error: Any, text: str) -> None:
    w.set("/x", {"a": 1.0})
    before = w.snapshot()
    with pytest.raises(error, match=text):
        w.set("/x", weights)
    assert w.snapshot() == before


@pytest.mark.parametrize("route", ["/x/", "/x/{name}", "/x y", "/x?a=1", "/x#a", "/-/healthz"])
def test_a_route_that_no_request_would_find_is_refused(w: World, route: str) -> None:
    with pytest.raises(ValueError, match="route: "):
        w.set(route, {"b": 1.0})
    w.set("/", {"b": 1.0})


def test_thirds_sum_to_one(w: World) -> None:
    w.set("/x", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"old": 0.5}, "Traffic dictionary weights must sum to 1, currently they sum to 0.5"),
        (
            {"old": -1},
            r"Attempted to assign a weight of -1 to backend 'old'\. Weights cannot be negative\.",
        ),
        ({"nope": 1.0}, r"Attempted to assign traffic to a backend 'nope' that is not registered\."),
        ({"a": 1.0}, r"Attempted to assign traffic to a backend 'a' that is not registered\."),
    ],
)
def test_endpoints_refuse_in_the_words_of_the_reference(w: World, weights: Any, text: str) -> None:
    w.endpoint()
    with pytest.raises(ValueError, match=text):
        w.set("e", weights)
    with pytest.raises(ValueError, match=text):
        w.endpoint("f", "/f", ["GET"], weights)
    assert list(w.traffic.endpoints) == ["e"]


def test_an_endpoint_has_no_traffic_at_first_and_its_route_is_matched_as_a_whole(w: World) -> None:
    w.endpoint(methods=["get", "POST"])
    w.endpoint("headless", None)
    assert w.routes().keys() == {"/x", "/e"}
    assert w.routes()["/e"] == {
        "prefix": "/e",
        "app": "",
        "deployment": "",
        "pattern": True,
        "methods": ["GET", "POST"],
        "label": ["e", ["GET", "POST"]],
        "split": "e",
    }
    assert w.snapshot()["splits"]["e"]["targets"] == w.snapshot()["splits"]["headless"]["targets"] == []
    w.set("e", {"old": 1.0})
    assert [t["deployment"] for t in w.snapshot()["splits"]["e"]["targets"]] == ["old#In"]
    w.traffic.delete_endpoint("e")
    assert w.snapshot()["splits"].keys() == {"headless"}
    with pytest.raises(ValueError, match="Endpoint 'e' is not registered"):
        w.traffic.delete_endpoint("e")


def test_endpoints_and_backends_in_the_reversed_order(w: World) -> None:
    w.endpoint("e1", "/e1")
    w.endpoint("e2", "/e2")
    w.set("old", {"e1": 1.0, "e2": 1.0})
    assert w.traffic.splits["e1"].weights == w.traffic.splits["e2"].weights == {"old": 1.0}
    with pytest.raises(ValueError, match=r"with a weight of 1.0; for 0.5 of endpoint 'e2' call set_traffic\('e2'"):
        w.set("old", {"e1": 1.0, "e2": 0.5})
    for name, weights in (("nobody", {"e1": 1.0}), ("old", {"e1": 1.0, "e3": 1.0}), ("old", {}), ("b", {"e1": 1.0})):
        with pytest.raises(ValueError, match=f"for an endpoint '{name}' that is not registered"):
            w.set(name, weights)


def test_the_normal_order_wins_when_an_endpoint_and_a_backend_have_one_name(w: World) -> None:
    w.endpoint("old", "/old")
    w.set("old", {"old": 1.0})
    assert w.traffic.splits["old"].weights == {"old": 1.0}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("e", "/other"), ValueError, r"Endpoint 'e' is already registered\."),
        (("e", "/e"), ValueError, r"Route '/e' is already registered to endpoint 'e'\."),
        (("f", "/e"), ValueError, r"Route '/e' is already registered to endpoint 'e'\."),
        (("f", "/x"), RayServeException, 'Route /x is being used by application "a"'),
        (("f", "/split"), RayServeException, r"serve.delete_traffic\('/split'\)"),
        (("f", "no-slash"), TypeError, "route: must be a string that starts with '/'"),
        (("f", 5), TypeError, "route: must be a string that starts with '/'"),
        (("f", "/f", "GET"), TypeError, "methods: must be a list"),
        (("f", "/f", []), TypeError, "methods: must be a list"),
        (("f#g", "/f"), ValueError, "endpoint_name: must be a name without"),
        (("/f", "/f"), ValueError, "endpoint_name: must be a name without"),
        ((None, "/f"), TypeError, "endpoint_name: must be a string"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(w: World, arguments: Any, error: Any, text: str) -> None:
    w.endpoint()
    w.set("/split", {"b": 1.0})
    with pytest.raises(error, match=text):
        w.endpoint(*arguments)
    assert list(w.traffic.endpoints) == ["e"]


def test_the_route_of_an_endpoint_is_set_by_the_endpoints_name(w: World) -> None:
    w.endpoint()
    for order in (lambda: w.set("/e", {"a": 1.0}), lambda: w.shadow("/e", "b", 0.1)):
        with pytest.raises(RayServeException, match="Route /e belongs to endpoint 'e'; pass that name"):
            order()
    with pytest.raises(ValueError, match=r"must start with '/', got 'e'; an endpoint goes with serve.delete_endpoint"):
        w.traffic.remove("e")


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda w: w.set("/x", {"a": 0.9, "b": 0.1}), r"target of the traffic of route /x .*delete_traffic\('/x'\)"),
        (lambda w: w.set("/x", {"a": 1}, None, [{"header": "h", "value": None, "target": "b"}]), "of route /x"),
        (lambda w: w.shadow("/x", "b", 0.1), r"of route /x .*serve.shadow_traffic\('/x', 'b', 0\) first"),
    ],
)
def test_a_target_in_use_cannot_be_deleted(w: World, prepare: Any, text: str) -> None:
    prepare(w)
    with pytest.raises(RayServeException, match=text):
        w.traffic.check_unused(w.apps["b"])
    w.traffic.check_unused(w.apps["c"])


def test_a_backend_in_use_is_refused_in_the_words_of_the_reference(w: World) -> None:
    w.endpoint()
    words = r"^Backend 'old' is used by endpoint 'e' and cannot be deleted\. Please remove the backend from all endpoin"
    for use in (lambda: w.set("e", {"old": 1.0}), lambda: w.shadow("e", "old", 0.5)):
        use()
        with pytest.raises(ValueError, match=words):
            w.traffic.check_unused(w.apps["old"])
        w.traffic.delete_endpoint("e")
        w.traffic.check_unused(w.apps["old"])
        w.endpoint()


def test_a_target_with_weight_0_may_go_and_leaves_the_split(w: World) -> None:
    w.set("/x", {"a": 0.0, "b": 1.0})
    w.traffic.check_unused(w.apps["a"])
    assert w.traffic.forget("a")
    w.apps["a"].deleting = True
    assert not w.traffic.forget("a")
    assert w.routes()["/x"]["label"] == {"b": 1.0}, "the route goes on without its owner"


def test_a_target_that_leaves_with_all_of_serve_is_named_nowhere_in_the_snapshot(w: World) -> None:
    """A proxy refuses a snapshot with a rule for what is no target."""
    w.set("/x", {"a": 0.5, "b": 0.5}, None, [{"header": "h", "value": None, "target": "b"}])
    w.shadow("/x", "b", 0.5)
    w.apps["b"].deleting = True
    split = w.snapshot()["splits"]["/x"]
    assert ([t["name"] for t in split["targets"]], split["rules"], split["shadows"]) == (["a"], [], [])


def test_a_route_with_traffic_is_only_deployed_to_by_its_targets(w: World) -> None:
    w.set("/new", {"b": 1.0})
    w.deploy(ApplicationSpec("b", "/new", "In", ()))
    w.deploy(ApplicationSpec("b", None, "In", ()))
    with pytest.raises(RayServeException, match=r"(?s)Prefix /new has traffic.*'d' is not one of its targets \['b'\]"):
        w.deploy(ApplicationSpec("d", "/new", "In", ()))
    w.endpoint()
    with pytest.raises(RayServeException, match='Prefix /e is being used by endpoint "e"'):
        w.deploy(ApplicationSpec("d", "/e", "In", ()))
    with pytest.raises(RayServeException, match='Prefix /x is being used by application "a"'):
        w.deploy(ApplicationSpec("d", "/x", "In", ()))


@pytest.mark.parametrize(
    ("name", "era", "text"),
    [
        ("a", "backend", r'name "a" is held by an application; serve.delete\(\'a\'\)'),
        ("a", "deploy", r'name "a" is held by an application'),
        ("old", "", r'name "old" is held by a backend; serve.delete_backend\(\'old\'\)'),
    ],
)
def test_a_name_held_by_another_era_is_refused(w: World, name: str, era: str, text: str) -> None:
    with pytest.raises(RayServeException, match=text):
        w.deploy(ApplicationSpec(name, None, "In", (), era=era))
    w.apps[name].deleting = True
    w.deploy(ApplicationSpec(name, None, "In", (), era=era))


def test_a_shadow_of_a_route_without_split_begins_and_ends_without_a_trace(w: World) -> None:
    w.shadow("/x", "b", 0.5)
    assert w.traffic.splits["/x"].weights == {"a": 1.0}
    w.shadow("/x", "c", 1)
    w.shadow("/x", "b", 0)
    assert w.traffic.splits["/x"].shadows == {"c": 1.0}
    w.shadow("/x", "c", 0)
    assert w.traffic.splits == {}
    with pytest.raises(RayServeException, match="Nothing serves the route '/nowhere'"):
        w.shadow("/nowhere", "b", 0.5)
    with pytest.raises(ValueError, match="Endpoint 'nowhere' is not registered"):
        w.shadow("nowhere", "old", 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.1, "0.5", None, True])
def test_a_share_is_between_0_and_1(w: World, share: Any) -> None:
    w.endpoint()
    number = isinstance(share, float)
    with pytest.raises(ValueError if number else TypeError, match="share: must be a number from 0"):
        w.shadow("/x", "b", share)
    with pytest.raises(TypeError, match="share: must be a number from 0"):
        w.shadow("e", "old", share)


PLAN = Plan((0.1, 1.0), 10.0, 10.0, 100, 0.01, None, None)


def roll(w: World, name: str = "/x", target: str = "b", id: str = "1") -> Rollout:
    return w.traffic.roll_out(id, name, target, PLAN, 0.0, w.apps)


def test_a_rollout_takes_its_first_step_from_the_owner_of_the_route(w: World) -> None:
    roll(w)
    assert w.traffic.splits["/x"].weights == {"a": 0.9, "b": 0.1}
    assert w.traffic.rollout("/x").before == {"a": 1.0, "b": 0.0}


def test_nothing_else_decides_over_the_weights_while_a_rollout_does(w: World) -> None:
    w.set("/x", {"a": 1.0, "c": 0.0})
    rolling = roll(w)
    for order in (
        lambda: w.set("/x", {"a": 1.0}),
        lambda: w.traffic.remove("/x"),
        lambda: roll(w, target="c", id="2"),
    ):
        with pytest.raises(RayServeException, match=r"A rollout of 'b' decides.*serve.get_rollout\('/x'\).abort\(\)"):
            order()
    w.traffic.splits["/x"].weights["a"] = 0.0
    for target in "ac":  # it may have to go back to them
        with pytest.raises(RayServeException, match=f'"{target}" is part of the rollout on /x and cannot be deleted'):
            w.traffic.check_unused(w.apps[target])
    w.shadow("/x", "c", 0.5)
    w.shadow("/x", "c", 0)
    rolling.abort(1.0)
    w.set("/x", {"a": 1.0})
    w.traffic.check_unused(w.apps["c"])
    assert roll(w, id="1") is rolling, "a repeated call is the same rollout"
    assert roll(w, id="2") is not rolling


def test_an_endpoint_with_a_rollout_stays(w: World) -> None:
    w.apps["new"] = app("new", era="backend")
    w.endpoint(weights={"old": 1.0})
    roll(w, "e", "new")
    with pytest.raises(RayServeException, match="A rollout of 'new' decides"):
        w.traffic.delete_endpoint("e")


@pytest.mark.parametrize(
    ("name", "target", "error", "text"),
    [
        ("/x", "a", ValueError, r"steps: the first one is 0.1, but 'a' gets 1.0 of '/x' already"),
        ("/half", "b", ValueError, r"steps: the first one is 0.1, but 'b' gets 0.5 of '/half' already"),
        ("/x", "z", RayServeException, "no application 'z'"),
        ("/nowhere", "b", RayServeException, "Nothing serves the route '/nowhere'"),
        ("nowhere", "b", ValueError, "Endpoint 'nowhere' is not registered"),
        ("e", "old", ValueError, "endpoint 'e' has no traffic that 'old' could take over"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused(w: World, name: str, target: str, error: Any, text: str) -> None:
    w.set("/half", {"b": 0.5, "c": 0.5})
    w.endpoint()
    with pytest.raises(error, match=text):
        roll(w, name, target)
    assert w.traffic.rollouts == {}
    with pytest.raises(RayServeException, match=r"no rollout on '/x'; serve.rollout\('/x', ...\) starts one"):
        w.traffic.rollout("/x")
