"""`serve.ingress`: let an ASGI application answer a deployment's HTTP requests.

The application is frozen when the class is decorated: pickled, so that a later change of it reaches no replica. A
replica unpickles it and binds the routes that were written as methods of the class to its instance
(``replica/asgi.py``). Nothing of the user's application is changed here, and nothing is imported that the user has
not imported already.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

__all__ = ["AsgiIngress", "asgi_app_of", "ingress"]

BUILD_METHOD = "__serve_build_asgi_app__"


@dataclass(frozen=True)
class AsgiIngress:
    """What `serve.ingress` leaves on a class: where a replica gets the application from."""

    frozen: bytes | None = field(default=None, repr=False)  # a pickled `Views`
    builder: Callable[[], Any] | None = None  # called on the replica
    docs_path: str | None = None  # of FastAPI's documentation page, below the route prefix


@dataclass
class Views:
    """An application and, of its routes, those of the decorated class and those of other decorated classes."""

    app: Any
    own: list[Any]
    foreign: list[Any]


def asgi_app_of(func_or_class: Any) -> AsgiIngress | None:
    """Tell whether a deployment's function or class is an ASGI ingress, and which."""
    return getattr(func_or_class, "__serve_ingress__", None) if inspect.isclass(func_or_class) else None


def ingress(app: Callable[..., Any] | None = None) -> Callable[..., type]:
    """Answer the HTTP requests of a deployment class with an ASGI application, as ``ray.serve.ingress`` does.

    Args:
        app: a FastAPI application or APIRouter, whose routes may be methods of the class; any other ASGI callable; or a
            function without parameters that is called on each replica and returns one. Without it the class must define
            ``__serve_build_asgi_app__(self)``, called after its constructor.

    Returns:
        A decorator. Called without a class it makes one, for applications that need no instance.

    Raises:
        ValueError: what is decorated is not a class, is callable, or nothing tells where the application comes from.
        TypeError: the application cannot be pickled, or a subclass has a constructor that is not ``async``.

    >>> from fastapi import FastAPI
    >>> app = FastAPI()
    >>> @ingress(app)
    ... class Greeter:
    ...     def __init__(self, greeting):
    ...         self.greeting = greeting
    ...
    ...     @app.get("/{name}")
    ...     def greet(self, name: str) -> str:
    ...         return f"{self.greeting} {name}"
    >>> asgi_app_of(Greeter).docs_path
    '/docs'
    """
    if app is not None and not callable(app):
        raise TypeError(f"serve.ingress needs an ASGI application or a function that builds one, not {app!r}.")

    def decorate(cls: type | None = None) -> type:
        if cls is None:
            cls = _without_class()
        if not inspect.isclass(cls):
            raise ValueError("@serve.ingress must be used with a class.")
        if issubclass(cls, Callable):  # type: ignore[arg-type]
            raise ValueError("Classes passed to @serve.ingress may not have __call__ method.")
        if app is None and not hasattr(cls, BUILD_METHOD):
            raise ValueError(
                f"serve.ingress() called without an app argument requires {cls.__name__} to define `{BUILD_METHOD}`."
            )
        return _wrap(cls, _describe(app, cls))

    return decorate


def _describe(app: Any, cls: type) -> AsgiIngress:
    if app is None:
        return AsgiIngress()
    if inspect.isfunction(app) and _takes_nothing(app):
        return AsgiIngress(builder=app)
    views = Views(app, [], [])
    if _is_fastapi(app):
        _sort_views(views, cls)
    return AsgiIngress(frozen=freeze(views), docs_path=getattr(app, "docs_url", None))


def _wrap(cls: type, asgi: AsgiIngress) -> type:
    """A subclass that carries `asgi`. Its constructor is asynchronous because Ray Serve's is: subclasses await it."""

    class Ingress(cls):  # type: ignore[misc]
        __serve_ingress__ = asgi

        @functools.wraps(cls.__init__)  # type: ignore[misc]
        async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
            done = cls.__init__(self, *args, **kwargs)  # type: ignore[misc]
            if inspect.isawaitable(done):
                await done

        def __init_subclass__(subclass, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            if not inspect.iscoroutinefunction(subclass.__init__):
                raise TypeError(
                    f"{subclass.__name__}.__init__ must be `async def`, and `await super().__init__(...)`: the "
                    "constructor of a class decorated with @serve.ingress is async, and a sync one would never run it. "
                    "If it comes from a mixin, define an `async def __init__` that calls both parents."
                )

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Ingress, name, getattr(cls, name))
    return cast("type", Ingress)


def _without_class() -> type:
    class ASGIIngressDeployment:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs = args, kwargs

    return ASGIIngressDeployment


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether it is a builder; an ASGI application that is a function takes three arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _is_fastapi(app: Any) -> bool:
    fastapi = sys.modules.get("fastapi")
    return fastapi is not None and isinstance(app, (fastapi.FastAPI, fastapi.APIRouter))


def routes_of(router: Any) -> Iterator[tuple[Any, Any]]:
    """Every (route, router that lists it) of a FastAPI application or router, through included and mounted ones."""
    router = getattr(router, "router", router)
    for route in getattr(router, "routes", ()):
        if hasattr(route, "dependant") and hasattr(route, "endpoint"):
            yield route, router
        elif (included := getattr(route, "original_router", None)) is not None:  # FastAPI >= 0.137 nests, older flatten
            yield from routes_of(included)
        elif (mounted := getattr(route, "app", None)) is not None and not hasattr(route, "endpoint"):
            yield from routes_of(mounted)


def _sort_views(views: Views, cls: type) -> None:
    """Find the routes whose endpoint is a method of `cls` or of a base, and those that belong to other classes.

    By name, because decorators hide the function, and a class may have several methods of one name. A class that is
    defined again (in a notebook) leaves the routes of its former self in the application: those are not its own.
    """
    for route, _ in routes_of(views.app):
        endpoint = route.endpoint
        owner = next((base for base in cls.__mro__ if _is_method_of(endpoint, base)), None)
        if isinstance(endpoint, staticmethod):
            continue
        if owner is not None and _claims.setdefault(endpoint, weakref.ref(owner))() is owner:
            _require_self(endpoint)
            views.own.append(route)
        elif endpoint in _claims:
            views.foreign.append(route)


def _is_method_of(endpoint: Any, cls: type) -> bool:
    start, name = cls.__qualname__ + ".", getattr(endpoint, "__qualname__", "")
    inner = name[len(start) :]
    return name.startswith(start) and "<" not in inner and getattr(endpoint, "__module__", None) == cls.__module__


def _require_self(method: Callable[..., Any]) -> None:
    if not inspect.signature(method).parameters:
        from rayserve_fast.exceptions import RayServeException

        raise RayServeException("Methods in FastAPI class-based view must have ``self`` as their first argument.")


def freeze(value: Any) -> bytes:
    """Pickle an application as definitions are, making new locks of locks (FastAPI >= 0.137 keeps some in its routes).

    Raises:
        TypeError: something in it cannot be pickled; the text names what the pickler says.
    """
    from rayserve_fast.definition import CodePickler, dump_code

    class Freezer(CodePickler):
        freezes = False

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) in _LOCKS:
                return _LOCKS[type(obj)], ()
            datastructures = sys.modules.get("starlette.datastructures")
            if datastructures is not None and type(obj) is datastructures.State:  # answers every attribute, so it hides
                return datastructures.State, (obj._state,)  # how to pickle it
            fastapi = sys.modules.get("fastapi.datastructures")
            if fastapi is not None and obj is getattr(fastapi, "_Unset", self):  # known by its identity
                return getattr, (fastapi, "_Unset")
            return super().reducer_override(obj)

        def _dynamic_function_reduce(self, func: Any) -> Any:
            """Keep what an annotation names when it is a string: FastAPI >= 0.137 reads some on the replica only."""
            reduced = super()._dynamic_function_reduce(func)
            state = reduced[2][1]
            for annotation in func.__annotations__.values():
                if isinstance(annotation, str):
                    names = compile(annotation, "annotation", "eval").co_names
                    state["__globals__"].update((n, func.__globals__[n]) for n in names if n in func.__globals__)
            return reduced

    return dump_code(value, None, "Failed to serialize the ASGI app", Freezer)


# Which class an endpoint was found to be a method of, over all decorations in this process.
_claims: weakref.WeakKeyDictionary[Callable[..., Any], weakref.ref[type]] = weakref.WeakKeyDictionary()
_LOCKS: dict[type, Callable[[], Any]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
}
