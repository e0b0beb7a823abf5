"""Splitting the requests of a route over applications: weights, shadows, figures and rollouts.

A *target* is an application by name, usually deployed with `route_prefix=None`; it sees the route as its root path.
The functions here check their arguments and ask the controller, and return when every proxy knows, or after 2 s: one
that has not answered by then is told when it is heard of again. docs/traffic.md is the operator's page. None of this is
in Ray Serve 2.60; `set_traffic` and `shadow_traffic` are what its versions before 1.3 had for endpoints and backends,
and take those too: a first argument that starts with `/` is a route, any other an endpoint.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, overload

import ray

from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.figures import RouteTraffic, ShadowTraffic, TargetTraffic
from rayserve_fast.controlplane.rollout import Decision, Plan, RolloutStatus, Window
from rayserve_fast.controlplane.traffic_checks import (
    check_name,
    check_number,
    check_weights,
    is_route,
    rollout_steps,
    rule_of,
    sticky_by,
)
from rayserve_fast.exceptions import RayServeException

__all__ = [
    "Decision",
    "Rollout",
    "RolloutStatus",
    "RouteTraffic",
    "ShadowTraffic",
    "TargetTraffic",
    "Window",
    "delete_traffic",
    "get_rollout",
    "get_traffic",
    "rollout",
    "set_traffic",
    "shadow_traffic",
]


def set_traffic(
    route_or_endpoint: str,
    weights: Mapping[str, float],
    *,
    sticky_header: str | None = None,
    sticky_cookie: str | None = None,
    rules: Sequence[Mapping[str, str | None]] | None = None,
) -> None:
    """Say where the requests of a route go. What the last call said is replaced; shadows stay.

    Takes effect without losing a request, and returns when every proxy has it, or after 2 s, as when one hangs. Each
    proxy keeps to the weights exactly: no target is ever more than one request away from its share. A target without a
    ready replica gets no share.

    Args:
        route_or_endpoint: a route such as "/models", or the name of an endpoint.
        weights: application -> share of the requests; the shares sum to 1. 0 keeps a target known without traffic. If
            an application is deployed on the route itself, it must be among them.
        sticky_header: requests with equal values of this header go to the same target, while its weight does not fall.
        sticky_cookie: the same with a cookie. Requests without it are spread by weight.
        rules: where some requests go whatever the weights say; the first that matches decides. Each is a dict of
            "header" or "cookie" (a name), "value" (left out or None: any) and "target".

    Raises:
        ValueError: weights that are negative or do not sum to 1, a rule or name that cannot be.
        TypeError: an argument is of the wrong type.
        RayServeException: Serve is not running, a target does not exist, the route's own application is not among the
            targets, or a rollout on the route is not over.

    Example:
        >>> serve.set_traffic(                                                    # doctest: +SKIP
        ...     "/models", {"blue": 0.9, "green": 0.1}, sticky_header="x-user",
        ...     rules=[{"header": "x-canary", "value": "1", "target": "green"}],
        ... )
    """
    check_name("route_or_endpoint", route_or_endpoint)
    if is_route(route_or_endpoint):
        check_weights(route_or_endpoint, weights)  # those of an endpoint depend on which name is the endpoint
    elif not isinstance(weights, Mapping):
        raise TypeError(f"weights: must be a dictionary of backend to weight, got {type(weights).__name__}.")
    sticky = sticky_by(sticky_header, sticky_cookie)
    _ask("set_traffic", route_or_endpoint, dict(weights), sticky, [rule_of(i, r) for i, r in enumerate(rules or ())])


def shadow_traffic(route_or_endpoint: str, target: str, share: float) -> None:
    """Send a copy of a share of a route's requests to one more application, whose answers are counted and thrown away.

    A copy never delays or fails the client's request; when the shadow is slow or full, copies are dropped and counted.

    Args:
        route_or_endpoint: a route such as "/models", or the name of an endpoint.
        target: the application that gets the copies.
        share: of the requests, from 0 to 1; 0 stops it.

    Raises:
        ValueError: `share` is not in that range (for an endpoint TypeError, as it was).
        RayServeException: Serve is not running, nothing serves the route, or the target does not exist.

    Example:
        >>> serve.shadow_traffic("/models", "next", 0.1)                          # doctest: +SKIP
    """
    check_name("route_or_endpoint", route_or_endpoint)
    check_name("target", target)
    _ask("shadow_traffic", route_or_endpoint, target, share)


@overload
def get_traffic(name: str) -> RouteTraffic: ...


@overload
def get_traffic(name: None = None) -> dict[str, RouteTraffic]: ...


def get_traffic(name: str | None = None) -> RouteTraffic | dict[str, RouteTraffic]:
    """Where requests go, and what the proxies counted: the sum over those that answer in 2 s, since each has started.

    Args:
        name: a route or an endpoint; None: all that have targets.

    Returns:
        A `RouteTraffic`; without a name one for each route and endpoint. Latencies are in ms, to the head of the
        answer, and at most a sixteenth above the true ones. Calls through handles are not counted.

    Raises:
        RayServeException: Serve is not running, or the route has no targets of its own.
        ValueError: there is no such endpoint.

    Example:
        >>> serve.get_traffic("/models").targets["green"].requests                # doctest: +SKIP
        120
    """
    if name is not None:
        check_name("name", name)
    found: dict[str, RouteTraffic] = _ask("traffic", name)
    return found if name is None else found[name]


def delete_traffic(route: str) -> None:
    """Forget the targets, rules and shadows of a route: the application deployed there, if any, gets every request.

    Raises:
        ValueError: `route` is no route.
        RayServeException: Serve is not running, the route has no targets, or a rollout on it is not over.

    Example:
        >>> serve.delete_traffic("/models")                                       # doctest: +SKIP
    """
    check_name("route", route)
    _ask("delete_traffic", route)


def rollout(
    route_or_endpoint: str,
    target: str,
    *,
    steps: Sequence[float] = (0.05, 0.25, 0.5, 1.0),
    step_duration_s: float = 60.0,
    window_s: float | None = None,
    min_requests: int = 100,
    max_error_rate: float | None = 0.01,
    max_p99_ms: float | None = None,
    max_p99_ratio: float | None = None,
) -> Rollout:
    """Give an application its traffic step by step, and take it back by itself when it does badly.

    Returns at once. The controller drives it, with or without this process, and over its own restarts. While it is not
    over, nothing else changes the weights of the route. The other targets share the rest as they do now.

    Args:
        route_or_endpoint: a route such as "/models", or the name of an endpoint.
        target: the application that shall get the traffic.
        steps: its shares, one after the other, each in (0, 1] and above the one before; the last one stays.
        step_duration_s: seconds that each step lasts at least.
        window_s: bounds are judged over the last so many seconds of the step; None: `step_duration_s`.
        min_requests: a window with fewer requests of the target is not judged, and no step ends before there is one
            with enough. The ratio is only taken to windows with as many of the old targets.
        max_error_rate: errors (status 5xx, broken answers) per request, from 0 to 1; None: any.
        max_p99_ms: 99th percentile of the time to the head of the answer in ms; None: any.
        max_p99_ratio: the same, as a multiple of the old targets' p99 in the same window, or the last that was known;
            None: any.

    Returns:
        A `Rollout` to look at it and to steer it; `serve.get_rollout` gives one to any other driver.

    Raises:
        ValueError, TypeError: an argument is wrong; the text names it.
        RayServeException: Serve is not running, nothing serves the route, the target does not exist, or the route has
            a rollout that is not over.

    Example:
        >>> rolling = serve.rollout("/models", "green", steps=[0.1, 1.0], max_p99_ms=50)   # doctest: +SKIP
        >>> rolling.wait().state                                                  # doctest: +SKIP
        'COMPLETED'
    """
    check_name("route_or_endpoint", route_or_endpoint)
    check_name("target", target)
    check_number("step_duration_s", step_duration_s, "a number of seconds above 0", above=0)
    if window_s is not None:
        check_number("window_s", window_s, "a number of seconds above 0, or None", above=0)
    if isinstance(min_requests, bool) or not isinstance(min_requests, int) or min_requests < 1:
        raise ValueError(f"min_requests: must be an integer of at least 1, got {min_requests!r}.")
    if max_error_rate is not None:
        check_number("max_error_rate", max_error_rate, "a number from 0 to 1, or None", least=0, most=1)
    if max_p99_ms is not None:
        check_number("max_p99_ms", max_p99_ms, "a number of ms above 0, or None", above=0)
    if max_p99_ratio is not None:
        check_number("max_p99_ratio", max_p99_ratio, "a number above 0 such as 1.5, or None", above=0)
    plan = Plan(
        steps=rollout_steps(steps),
        step_duration_s=step_duration_s,
        window_s=step_duration_s if window_s is None else window_s,
        min_requests=min_requests,
        max_error_rate=max_error_rate,
        max_p99_ms=max_p99_ms,
        max_p99_ratio=max_p99_ratio,
    )
    id = secrets.token_hex(4)
    _ask("start_rollout", id, route_or_endpoint, target, plan)
    return Rollout(route_or_endpoint, id)


def get_rollout(route_or_endpoint: str) -> Rollout:
    """The last rollout of a route or an endpoint, whether it is over or not, and whoever started it.

    Raises:
        RayServeException: Serve is not running, or there was none.

    Example:
        >>> serve.get_rollout("/models").abort()                                  # doctest: +SKIP
    """
    check_name("route_or_endpoint", route_or_endpoint)
    return Rollout(route_or_endpoint, _ask("rollout_id", route_or_endpoint))


class Rollout:
    """A rollout that the controller drives. Made by `serve.rollout` and `serve.get_rollout`; may be pickled.

    Every method raises RayServeException when a later rollout has taken this one's place.
    """

    def __init__(self, name: str, id: str) -> None:
        self._name = name
        self._id = id

    def __repr__(self) -> str:
        return f"Rollout({self._name!r}, id={self._id!r})"

    def status(self) -> RolloutStatus:
        """Its state, step and share, what was counted last, and every decision with its reason."""
        status: RolloutStatus = _ask("rollout_status", self._name, self._id)
        return status

    def pause(self) -> None:
        """Take no further step. The share stays, and a window that crosses a bound still rolls back.

        Raises:
            ValueError: it is over.
        """
        _ask("order_rollout", self._name, self._id, "pause")

    def resume(self) -> None:
        """Go on after `pause`; the present step begins anew.

        Raises:
            ValueError: it is over.
        """
        _ask("order_rollout", self._name, self._id, "resume")

    def abort(self) -> None:
        """Give every target the weight that it had before; returns when the proxies have that, or after 2 s.

        Raises:
            ValueError: it is over.
        """
        _ask("order_rollout", self._name, self._id, "abort")

    def wait(self, timeout_s: float | None = None) -> RolloutStatus:
        """Wait until it is over, however it ends; `state` of what is returned says how.

        Args:
            timeout_s: seconds to wait at most; None: as long as it takes.

        Raises:
            TimeoutError: it was not over in time; it goes on.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        left = timeout_s
        while left is None or left >= 0:
            try:
                status: RolloutStatus = _ask("rollout_over", self._name, self._id, left, timeout_s=left)
            except ray.exceptions.GetTimeoutError:
                break
            if status.over:
                return status
            left = None if until is None else until - time.monotonic()
        raise TimeoutError(f"The rollout on {self._name!r} was not over after {timeout_s} s.")


def _ask(method: str, *args: Any, timeout_s: float | None = None) -> Any:
    from rayserve_fast.api import _local
    from rayserve_fast.config import forces_local_testing

    if forces_local_testing() or (_local() and not ray.is_initialized()):
        raise RayServeException(
            "Traffic can only be split on a cluster: local testing mode has no routes and no proxies."
            " Deploy with serve.run without _local_testing_mode."
        )
    return client.ask(method, *args, timeout_s=timeout_s)
