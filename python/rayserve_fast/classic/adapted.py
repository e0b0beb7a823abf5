"""The FastAPI application in front of a graph whose adapter is one of FastAPI's dependencies.

It fills the adapter's parameters from query, path, body, form and headers, answers 422 where they do not fit, and sends
the graph's answer as JSON. Only replicas that need it import this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from rayserve_fast.classic.driver import METHODS
from rayserve_fast.classic.plan import ReadyPlan
from rayserve_fast.replica import json, portable


class Served(Response):
    """An application as the response to the request that it is to answer."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Json(JSONResponse):
    """What FastAPI encodes, as plain handlers' results are."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content)


def fastapi_app(graphs: Mapping[str, ReadyPlan], adapter: Callable[..., Any] | None) -> Served:
    """The application of these graphs, by their paths."""
    app = FastAPI(openapi_url=None)
    dependency = _dependency(adapter)
    for path, graph in graphs.items():
        app.add_api_route(path, _endpoint(graph, dependency), methods=list(METHODS), response_model=None)
    return Served(app)


def _endpoint(graph: ReadyPlan, dependency: Callable[..., Any]) -> Callable[..., Any]:
    async def answer(given: Any = Depends(dependency)) -> Response:  # noqa: B008
        result = await graph(await portable.copy(given) if type(given) is Request else given)
        return result if isinstance(result, Response) else _Json(result)

    answer.__annotations__["given"] = Any  # not as text, which FastAPI would look for elsewhere
    return answer


def _dependency(adapter: Callable[..., Any] | None) -> Callable[..., Any]:
    if adapter is None:
        return _whole_request
    if not (inspect.isclass(adapter) and issubclass(adapter, BaseModel)):
        return adapter

    def body(payload: Any) -> Any:
        return payload

    body.__annotations__["payload"] = adapter  # a model's fields are those of the body
    return body


def _whole_request(request: Request) -> Request:
    return request
