"""`DAGDriver`: the ingress of a deployment graph, which answers HTTP requests and handle calls by running the graph.

One replica class for all graphs. An adapter makes the graph's input of the HTTP request. FastAPI stands between only
if the adapter is one of its dependencies (it has parameters that FastAPI fills) or a route is a pattern; otherwise a
request costs what an ingress costs that calls a handle by itself.
"""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rayserve_fast.classic.graph import Node
from rayserve_fast.deployment import Application, Deployment
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.options import DeploymentOptions
from rayserve_fast.replica.calls import is_async
from rayserve_fast.replica.responses import Ready

if TYPE_CHECKING:
    from starlette.requests import Request

    from rayserve_fast.classic.plan import Plan, ReadyPlan
    from rayserve_fast.replica.request import Request as OwnRequest

Adapter = Callable[..., Any]
METHODS = ("GET", "POST")
#: The path of a graph that was bound without one; FastAPI's for any.
ANY_PATH = "/{path:path}"


class GraphIngress:
    """What a replica of `DAGDriver` runs.

    Args:
        plans: the graphs by the path below the route prefix, or one of any path.
        adapter: what makes the graph's input of a request; None: the request itself.
    """

    def __init__(self, plans: Mapping[str, Plan], adapter: Adapter | None = None) -> None:
        self._graphs: dict[str, ReadyPlan] = {path: plan.ready() for path, plan in plans.items()}
        self._single = next(iter(self._graphs.values())) if len(self._graphs) == 1 else None
        self._only = self._single if ANY_PATH in self._graphs else None
        self._input = None if adapter is None else _direct(adapter)
        pattern = self._only is None and any("{" in path for path in self._graphs)
        self._fastapi = None
        if pattern or (adapter is not None and self._input is None):
            from rayserve_fast.classic.adapted import fastapi_app

            self._fastapi = fastapi_app(self._graphs, adapter)

    async def __call__(self, request: OwnRequest) -> Any:
        """Answer an HTTP request with the graph's answer as JSON."""
        if self._fastapi is not None:
            return self._fastapi
        if request.method not in METHODS:
            return Ready.of_json({"detail": "Method Not Allowed"}, 405, {"allow": ", ".join(METHODS)})
        graph = self._only or self._graphs.get(_below_prefix(request))
        if graph is None:
            return Ready.of_json({"detail": "Not Found"}, 404)
        given: Any = request
        if self._input is not None:
            try:
                given = await self._input(request)
            except Exception as error:
                return _refused(error)
        elif request._head.body is None:
            await request.body()  # what it needs to be sent on
        result = await (graph.single(given) if graph.single is not None else graph(given))
        # Text, bytes and None are not JSON to an ordinary handler; here they are, as everything is.
        return Ready.of_json(result) if result is None or isinstance(result, (str, bytes)) else result

    async def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Raises:
            RayServeException: there are several.
        """
        if self._single is None:
            raise RayServeException(
                f"This DAGDriver has several graphs: call predict_with_route(route, ...) with one of its routes, "
                f"{', '.join(map(repr, self._graphs))}."
            )
        return await self._single(*args, **kwargs)

    async def predict_with_route(self, route: str, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of this route.

        Raises:
            RayServeException: there is none.
        """
        if (graph := self._graphs.get(route)) is None:
            raise RayServeException(
                f"{route!r} does not exist in dags routes: there are {', '.join(map(repr, self._graphs))}."
            )
        return await graph(*args, **kwargs)


class GraphDriver(Deployment):
    """The deployment `DAGDriver`: bound to graphs instead of constructor arguments."""

    def bind(self, *args: Any, **kwargs: Any) -> Application:
        """Bind a graph.

        Args:
            dags: the last node of a graph, or a dict of such by their route, such as `{"/classify": node}`; an
                Application in the place of a node is called with the input.
            http_adapter: a function, or its import path, that makes the graph's input of an HTTP request: one of
                `rayserve_fast.http_adapters`, one that takes a `starlette.requests.Request`, or any dependency of
                FastAPI, a pydantic model included. None: the input is the request.

        Returns:
            An Application for `serve.run`, which returns a handle whose `predict` runs the graph.

        Raises:
            TypeError: a graph, a route or the adapter is of another kind.
            ValueError: there is no graph, or a route does not start with "/".
        """
        plans, adapter = _bound(*args, **kwargs)
        return Application(self._copy(init_args=(plans, adapter)))

    def _copy(self, **changes: Any) -> Deployment:
        plain = super()._copy(**changes)
        copy = GraphDriver.__new__(GraphDriver)
        copy.__dict__.update(vars(plain))
        return copy


def graph_driver() -> GraphDriver:
    """`DAGDriver` with the options of any deployment."""
    return GraphDriver("DAGDriver", DeploymentOptions(), GraphIngress, _internal=True)


def _bound(dags: Any, http_adapter: Any = None) -> tuple[dict[str, Plan], Adapter | None]:
    from rayserve_fast.classic.plan import compile_graph

    given = dags if isinstance(dags, dict) else {ANY_PATH: dags}
    if not given:
        raise ValueError("DAGDriver.bind needs at least one graph.")
    for route, dag in given.items():
        if not isinstance(route, str) or not isinstance(dag, (Node, Application)):
            raise TypeError(
                "DAGDriver.bind takes a node of a graph, or a dict of such by their routes; "
                f"got {type(route).__name__} -> {type(dag).__name__}."
            )
        if not route.startswith("/"):
            raise ValueError(f"A route of DAGDriver must start with '/', got {route!r}.")
    return {route: compile_graph(dag) for route, dag in given.items()}, load_adapter(http_adapter)


def load_adapter(adapter: Any) -> Adapter | None:
    """The adapter that was given, or that an import path names (`ray.serve.http_adapters...` means ours).

    Raises:
        TypeError: it cannot be called.
    """
    if isinstance(adapter, str):
        from rayserve_fast.importing import import_attr

        adapter = import_attr(adapter.replace("ray.serve.", "rayserve_fast.", 1))
    if adapter is not None and not callable(adapter):
        raise TypeError(f"http_adapter must be a function or its import path, got {type(adapter)}.")
    return adapter  # type: ignore[no-any-return]


def _direct(adapter: Adapter) -> Callable[[Request], Awaitable[Any]] | None:
    """The adapter as a coroutine function of the request; None: FastAPI must fill its parameters."""
    from starlette.requests import Request

    if inspect.isclass(adapter):
        return None
    parameters = list(inspect.signature(adapter).parameters.values())
    takes_request = len(parameters) == 1 and _annotation(adapter, parameters[0]) is Request
    if parameters and not takes_request:
        return None
    on_loop = is_async(adapter)

    async def call(request: Request) -> Any:
        await request.body()  # as FastAPI does for whoever wants a request
        given = (request,) if takes_request else ()
        # Sync ones are the user's own, and may take their time: as FastAPI has them, they do not hold up the loop.
        made = adapter(*given) if on_loop else await asyncio.to_thread(adapter, *given)
        return await made if inspect.isawaitable(made) else made

    return call


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation of one parameter; others, and that of the result, need not be resolvable here."""
    alone = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return typing.get_type_hints(alone, getattr(inspect.unwrap(function), "__globals__", {}))[parameter.name]
    except Exception:  # of text that only FastAPI, or a type checker, can resolve
        return None


def _below_prefix(request: Request) -> str:
    path, prefix = request.scope["path"], request.scope["root_path"]
    return path[len(prefix) :] or "/"


def _refused(error: Exception) -> Any:
    """What FastAPI answers to an adapter that raises an HTTPException; other errors are the adapter's own."""
    from starlette.exceptions import HTTPException

    if not isinstance(error, HTTPException):
        raise error
    return Ready.of_json({"detail": error.detail}, error.status_code, error.headers)
