"""A replica's ASGI application: made of what `serve.ingress` froze, bound to the user's instance, started, stopped.

Lifespan is driven as uvicorn's "auto" mode does, but more precisely: an application that fails before it has asked
for the startup event does not know the protocol and is served without it; one that fails afterwards has failed to
start, and so has the replica. The state that it yields is copied into each request's scope.

Everything here runs on the user's event loop.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import types
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, cast

from rayserve_fast.exceptions import BackPressureError, DeploymentUnavailableError
from rayserve_fast.ingress import BUILD_METHOD, AsgiIngress, Views, routes_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")


class AsgiApp:
    """The ASGI callable of one replica.

    Args:
        ingress: what ``rayserve_fast.ingress.asgi_app_of`` said of the deployment's class.
        instance: the user's object, constructed.
    """

    app: ASGIApp

    def __init__(self, ingress: AsgiIngress, instance: Any) -> None:
        self._ingress = ingress
        self._instance = instance
        self._lifespan: Lifespan | None = None

    async def start(self) -> None:
        """Make the application and run its startup; raises what makes the replica's start fail."""
        self.app = await self._make()
        handlers = getattr(self.app, "exception_handlers", None)
        if isinstance(handlers, dict):  # FastAPI and Starlette; a handler of the user's own wins
            for kind in (BackPressureError, DeploymentUnavailableError):
                handlers.setdefault(kind, _refused)
        self._lifespan = Lifespan(self.app)
        await self._lifespan.startup()

    async def stop(self) -> None:
        """Run the application's shutdown, if its startup was run; its errors are logged."""
        if self._lifespan is not None:
            await self._lifespan.shutdown()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if self._lifespan is not None and self._lifespan.state:
            scope["state"] = self._lifespan.state.copy()
        return self.app(scope, receive, send)

    @property
    def docs_path(self) -> str | None:
        """Where FastAPI's documentation page is, below the route prefix."""
        return getattr(self.app, "docs_url", None)

    async def _make(self) -> ASGIApp:
        build = getattr(self._instance, BUILD_METHOD, None) or self._ingress.builder
        if build is None:
            if self._ingress.frozen is None:
                raise TypeError(f"the deployment's class does not define `{BUILD_METHOD}`, and has no other ASGI app")
            return thaw(self._ingress.frozen, self._instance)
        app = build()
        if inspect.isawaitable(app):
            app = await app
        if app is None:
            raise TypeError(f"`{build.__name__}` must return an ASGI app.")
        return cast("ASGIApp", app)


def thaw(frozen: bytes, instance: Any) -> ASGIApp:
    """Unpickle an application and give its class-based views their instance."""
    from ray import cloudpickle

    views: Views = cloudpickle.loads(frozen)
    own, foreign = {id(route) for route in views.own}, {id(route) for route in views.foreign}
    for route, router in list(routes_of(views.app)):
        if id(route) in own:
            _bind(route, instance)
        elif id(route) in foreign:  # another class's methods: there is no instance for them here
            router.routes[:] = [other for other in router.routes if other is not route]
        else:
            continue
        if hasattr(router, "_mark_routes_changed"):  # FastAPI >= 0.137 caches what it derives from included routes
            router._mark_routes_changed()
    if (own or foreign) and hasattr(views.app, "openapi_schema"):
        views.app.openapi_schema = None
    fastapi = sys.modules.get("fastapi")
    if fastapi is not None and isinstance(views.app, fastapi.APIRouter):  # which recent versions cannot serve alone
        router, views.app = views.app, fastapi.FastAPI(openapi_url=None)
        views.app.include_router(router)
    return cast("ASGIApp", views.app)


def _bind(route: Any, instance: Any) -> None:
    """Make a method of `instance` of a route's function, which FastAPI took for one with a query parameter `self`.

    The route's analysis stays otherwise as FastAPI made it, and a request pays nothing for the instance.
    """
    this = next(iter(inspect.signature(route.endpoint).parameters))
    route.endpoint = route.dependant.call = types.MethodType(route.endpoint, instance)
    route.dependant.query_params = [field for field in route.dependant.query_params if field.name != this]


async def _refused(request: Any, error: Exception) -> Any:
    """The answer inside a FastAPI or Starlette application for what a handle raises when it cannot take a call."""
    from starlette.responses import Response

    from rayserve_fast.replica.responses import failure

    status, headers, body = failure(error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


class Lifespan:
    """One application's lifespan: a task that runs the application with a scope of that type, from start to stop."""

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._asked = self._failed = False
        self._reason = ""
        self._started, self._stopping, self._stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def startup(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        await self._started.wait()
        if self._failed:
            error = await self._end()
            raise RuntimeError(f"ASGI lifespan startup failed. {self._reason or error or ''}".strip()) from error

    async def shutdown(self) -> None:
        if self._task.done():
            return
        self._stopping.set()
        await self._stopped.wait()
        error = await self._end()
        if self._failed:
            logger.error("ASGI lifespan shutdown failed. %s", self._reason, exc_info=error)

    async def _run(self) -> BaseException | None:
        """Returns the application's exception instead of raising it: not everybody waits for this task."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except _NotLifespanError:
            return None
        except BaseException as error:
            if not self._started.is_set():
                self._failed = self._asked or not isinstance(error, Exception)
            elif not self._failed:
                logger.error("Exception in the lifespan of the ASGI app.", exc_info=error)
            return error
        finally:
            self._started.set()
            self._stopped.set()
        return None

    async def _end(self) -> BaseException | None:
        """Let the task finish, which the protocol does not force it to, and return the application's exception."""
        await asyncio.wait({self._task}, timeout=1)
        return self._task.result() if self._task.done() else None

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self._stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            self._started.set()
        elif kind == "lifespan.shutdown.complete":
            self._stopped.set()
        elif kind in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
            self._failed, self._reason = True, message.get("message", "")
            (self._started if kind == "lifespan.startup.failed" else self._stopped).set()
        else:  # it answers as if this were a request
            raise _NotLifespanError(kind)


class _NotLifespanError(Exception):
    """The application does not look at the type of its scope."""
