"""The public functions refuse wrong arguments before they ask anybody, with the field's name and what to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rayserve_fast import serve
from rayserve_fast.controlplane.traffic_checks import rollout_steps, rule_of, sticky_by
from rayserve_fast.exceptions import RayServeException


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> None:
        pytest.fail("asked the controller")

    monkeypatch.setattr("rayserve_fast.controlplane.client.ask", ask)


RULE = {"header": "x-canary", "target": "b"}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: serve.set_traffic(5, {}), TypeError, "route_or_endpoint: must be a string, got int"),
        (lambda: serve.set_traffic("", {}), ValueError, "route_or_endpoint: must not be empty"),
        (lambda: serve.set_traffic("/x", {"a": 0.5}), ValueError, "weights: must sum to 1"),
        (lambda: serve.set_traffic("e", [1]), TypeError, "weights: must be a dictionary of backend to weight"),
        (
            lambda: serve.set_traffic("/x", {"a": 1}, sticky_header="a", sticky_cookie="b"),
            ValueError,
            "sticky_header, sticky_cookie: give one of them",
        ),
        (lambda: serve.set_traffic("/x", {"a": 1}, sticky_header="x y"), ValueError, "sticky_header: 'x y' cannot be"),
        (lambda: serve.set_traffic("/x", {"a": 1}, sticky_cookie=1), TypeError, "sticky_cookie: must be the name of"),
        (lambda: serve.set_traffic("/x", {"a": 1}, rules=["x"]), TypeError, r"rules\[0\]: must be a dict such as"),
        (
            lambda: serve.set_traffic("/x", {"a": 1}, rules=[RULE, {**RULE, "cookie": "c"}]),
            ValueError,
            r'rules\[1\]: give either "header" or "cookie"',
        ),
        (lambda: serve.set_traffic("/x", {"a": 1}, rules=[{"target": "b"}]), ValueError, "give either"),
        (
            lambda: serve.set_traffic("/x", {"a": 1}, rules=[{**RULE, "percent": 5}]),
            ValueError,
            r"rules\[0\]: unknown keys \['percent'\]; give header or cookie, value and target",
        ),
        (
            lambda: serve.set_traffic("/x", {"a": 1}, rules=[{"header": "h"}]),
            TypeError,
            r"rules\[0\].target: must be a string",
        ),
        (lambda: serve.set_traffic("/x", {"a": 1}, rules=[{**RULE, "value": 1}]), TypeError, r"rules\[0\].value: must"),
        (
            lambda: serve.set_traffic("/\ud800", {"a": 1}),
            ValueError,
            "route_or_endpoint: .* cannot be encoded",
        ),
        (lambda: serve.set_traffic("/x", {"\ud800": 1}), ValueError, "weights: .* cannot be encoded as UTF-8"),
        (
            lambda: serve.set_traffic("/x", {"a": 1}, rules=[{**RULE, "value": "\ud800"}]),
            ValueError,
            r"rules\[0\].value: .* cannot be encoded as UTF-8",
        ),
        (lambda: serve.shadow_traffic("/x", "\ud800", 0.1), ValueError, "target: .* cannot be encoded as UTF-8"),
        (lambda: serve.shadow_traffic("/x", "", 0.1), ValueError, "target: must not be empty"),
        (lambda: serve.get_traffic(5), TypeError, "name: must be a string"),
        (lambda: serve.delete_traffic(None), TypeError, "route: must be a string"),
        (lambda: serve.get_rollout(""), ValueError, "route_or_endpoint: must not be empty"),
        (lambda: serve.rollout("/x", "b", steps=[]), TypeError, r"steps: must be a list of shares such as \[0.1,"),
        (lambda: serve.rollout("/x", "b", steps=0.5), TypeError, "steps: must be a list of shares"),
        (lambda: serve.rollout("/x", "b", steps=[0.0, 1.0]), ValueError, r"steps\[0\]: must be a share above 0 and at"),
        (lambda: serve.rollout("/x", "b", steps=[0.5, 1.1]), ValueError, r"steps\[1\]: must be a share above 0 and at"),
        (lambda: serve.rollout("/x", "b", steps=[0.5, 0.5]), ValueError, r"steps\[1\]: must be above the step before"),
        (lambda: serve.rollout("/x", "b", step_duration_s=0), ValueError, "step_duration_s: must be a number of sec"),
        (lambda: serve.rollout("/x", "b", step_duration_s="1"), TypeError, "step_duration_s: must be a number of sec"),
        (lambda: serve.rollout("/x", "b", window_s=float("inf")), ValueError, "window_s: must be a number of seconds"),
        (lambda: serve.rollout("/x", "b", min_requests=0), ValueError, "min_requests: must be an integer of at least"),
        (lambda: serve.rollout("/x", "b", max_error_rate=2), ValueError, "max_error_rate: must be a number from 0 to"),
        (lambda: serve.rollout("/x", "b", max_p99_ms=0), ValueError, "max_p99_ms: must be a number of ms above 0"),
        (lambda: serve.rollout("/x", "b", max_p99_ratio=True), TypeError, "max_p99_ratio: must be a number above 0"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_what_is_right_becomes_what_the_snapshot_says() -> None:
    assert sticky_by("X-User", None) == {"header": "x-user"}
    assert sticky_by(None, "Session") == {"cookie": "Session"}
    assert sticky_by(None, None) is None
    assert rule_of(0, {"header": "X-Canary", "value": "1", "target": "b"}) == {
        "header": "x-canary",
        "value": "1",
        "target": "b",
    }
    assert rule_of(0, {"cookie": "Beta", "target": "b"}) == {"cookie": "Beta", "value": None, "target": "b"}
    assert rollout_steps([0.1, 1]) == (0.1, 1.0)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from rayserve_fast.local import applications

    @serve.deployment
    def hello() -> str:
        return "hello"

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    serve.run(hello.bind(), _local_testing_mode=True)
    yield
    applications.shutdown()


@pytest.mark.parametrize(
    "call",
    [
        lambda: serve.set_traffic("/", {"default": 1.0}),
        lambda: serve.shadow_traffic("/", "default", 0.5),
        lambda: serve.get_traffic(),
        lambda: serve.delete_traffic("/"),
        lambda: serve.rollout("/", "default"),
        lambda: serve.get_rollout("/"),
    ],
)
def test_local_testing_mode_has_no_traffic_to_split(local: None, call: Callable[[], Any]) -> None:
    with pytest.raises(RayServeException, match="local testing mode has no routes and no proxies"):
        call()
