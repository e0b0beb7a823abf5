"""Endpoints: named entrances, with or without an HTTP route, whose requests go to backends by weight.

State and checks are the controller's, `controlplane/traffic.py`; routing and splitting are the data plane's. What is
left is to ask, and to make handles whose calls reach a backend as requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rayserve_fast import context
from rayserve_fast._core import check_pattern
from rayserve_fast.classic import bridge, session
from rayserve_fast.classic.backends import create_backend
from rayserve_fast.classic.handles import RayServeHandle
from rayserve_fast.classic.requests import HandleRequest
from rayserve_fast.classic.spelling import warn_older
from rayserve_fast.text import check_text

F = TypeVar("F", bound=Callable[..., Any])


def create_endpoint(
    endpoint_name: str,
    route: str | None = None,
    methods: Sequence[str] = ("GET",),
    *,
    backend: str | None = None,
) -> None:
    """Register an endpoint; it answers when this returns, without traffic by 503.

    Today: `route_prefix` of `serve.run`, and `serve.set_traffic` for a route that several applications answer.

    Args:
        endpoint_name: its name.
        route: the path that it answers, as a whole. It may have parameters, such as `/api/{user_id:int}`, for
            `request.path_params`; their types are `str`, `int`, `float`, `path` and `uuid`. None: handles only.
        methods: the HTTP methods that it takes; others are answered 405.
        backend: the tag of a backend that gets all its traffic, until `serve.set_traffic` says otherwise.

    Raises:
        ValueError: the name or the route is registered, or there is no such backend, or the route has no meaning.
        TypeError: an argument is of another type.
        RayServeException: Serve is not running, or the route belongs to an application.
    """
    warn_older("`serve.create_endpoint`", "`serve.run`")
    create(endpoint_name, route, methods, backend)


def create(name: str, route: str | None, methods: Sequence[str], backend: str | None) -> None:
    """`create_endpoint` for both APIs."""
    if isinstance(route, str):
        check_text("route", route)
        check_pattern(route)
    session.ask("create_endpoint", name, route, methods, None if backend is None else {backend: 1.0})


def delete_endpoint(endpoint_name: str) -> None:
    """Forget an endpoint and its route; its backends stay. Today: `serve.delete_traffic`.

    Raises:
        ValueError: there is no such endpoint.
    """
    warn_older("`serve.delete_endpoint`", "`serve.delete_traffic`")
    session.ask("delete_endpoint", endpoint_name)


def list_endpoints() -> dict[str, dict[str, Any]]:
    """Every endpoint: `route`, `methods`, `traffic` by backend, and `shadows` where there are some.

    Today: `serve.get_traffic()`.
    """
    warn_older("`serve.list_endpoints`", "`serve.get_traffic`")
    found: dict[str, dict[str, Any]] = session.ask("endpoints")
    return {
        name: {key: value for key, value in endpoint.items() if key != "shadows" or value}
        for name, endpoint in found.items()
    }


def link(endpoint_name: str, backend_tag: str) -> None:
    """Send all requests of an endpoint to one backend. Today: `serve.set_traffic`."""
    warn_older("`serve.link`", "`serve.set_traffic`")
    session.ask("set_traffic", endpoint_name, {backend_tag: 1.0})


def split(endpoint_name: str, traffic_policy_dictionary: Mapping[str, float]) -> None:
    """The older name of `serve.set_traffic` for endpoints."""
    warn_older("`serve.split`", "`serve.set_traffic`")
    session.ask("set_traffic", endpoint_name, traffic_policy_dictionary)


def route(url_route: str, methods: Sequence[str] = ("GET",)) -> Callable[[F], F]:
    """Serve a function or class at a path: an endpoint of its name, linked to a backend `{name}:v0`.

    Today: `@serve.deployment`, and `route_prefix` of `serve.run`.

    Args:
        url_route: see `create_endpoint`.
        methods: see `create_endpoint`.
    """

    def serve(func_or_class: F) -> F:
        name = func_or_class.__name__
        create_backend(f"{name}:v0", func_or_class)
        create(name, url_route, methods, f"{name}:v0")
        return func_or_class

    return serve


def get_handle(
    endpoint_name: str,
    relative_slo_ms: float | None = None,
    absolute_slo_ms: float | None = None,
    missing_ok: bool = False,
    sync: bool = True,
) -> EndpointHandle:
    """A handle to an endpoint; its backends see a request for each call, see `EndpointHandle`.

    Today: `serve.get_app_handle`.

    Args:
        endpoint_name: of the endpoint.
        relative_slo_ms, absolute_slo_ms: accepted; requests are served in the order of their arrival.
        missing_ok: the endpoint may be created later.
        sync: see `EndpointHandle.remote`.

    Raises:
        KeyError: there is no such endpoint. A replica's event loop is not held up to ask: a call raises there.
    """
    warn_older("`serve.get_handle`", "`serve.get_app_handle`")
    return handle(endpoint_name, missing_ok, sync)


def handle(name: str, missing_ok: bool, sync: bool) -> EndpointHandle:
    """`get_handle` for both APIs."""
    from rayserve_fast.handle import DeploymentHandle

    if not (missing_ok or context._on_replica_loop()) and name not in session.ask("endpoints"):
        raise KeyError(f"Endpoint '{name}' does not exist.")
    target = DeploymentHandle(name, "", _key=f"split:{name}")
    bridge.prepare()
    return EndpointHandle(target, sync)


class EndpointHandle(RayServeHandle):
    """Calls an endpoint: `handle.remote(data, **kwargs)`.

    Backends made after `serve.init` are called with the keyword arguments, and with a Flask-shaped request where they
    leave a parameter for it; the others get one request with `data`, `query_params`, `method` and `headers`.
    """

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > 1:
            raise TypeError(
                f"remote() of the handle to endpoint '{self.deployment_name}' takes at most one positional argument,"
                f" the request's data, but was given {len(args)}. Give the others names."
            )
        data = args[0] if args else None
        return (HandleRequest(data, kwargs, self._http_method, self._http_headers),), {}


def stat() -> list[dict[str, Any]]:
    """What the proxies have counted, as a list of `{"info": {...}, "value": number}`.

    The name in `info` is `requests`, `errors` or `latency_ms` (with a `quantile`); `endpoint` and `backend` are whose.
    Today: `serve.get_traffic()`, or Prometheus at `/-/metrics`.
    """
    from rayserve_fast.traffic import get_traffic

    warn_older("`serve.stat`", "`serve.get_traffic`")
    found = []
    for name, traffic in get_traffic().items():
        for target, counts in traffic.targets.items():
            values: list[tuple[dict[str, Any], Any]] = [
                ({"name": "requests"}, counts.requests),
                ({"name": "errors"}, counts.errors),
                ({"name": "latency_ms", "quantile": 0.5}, counts.p50_ms),
                ({"name": "latency_ms", "quantile": 0.95}, counts.p95_ms),
                ({"name": "latency_ms", "quantile": 0.99}, counts.p99_ms),
            ]
            found += [
                {"info": {**info, "endpoint": name, "backend": target}, "value": value}
                for info, value in values
                if value is not None
            ]
    return found
