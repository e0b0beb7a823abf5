"""The request that a handler gets: Starlette's, whose parts come into being when touched.

Most handlers touch one or two of a request's parts, while making them all costs more than carrying the request here.
So a ``Request`` begins as nothing but the native head. Headers, query parameters, method and a body that came with
the head are taken from it directly; whatever else Starlette derives, it derives from ``scope``, which is built at its
first use and from then on is the truth (user code may change it).

Invariant: every attribute and method answers what ``starlette.requests.Request`` answers over the scope that uvicorn
builds inside Ray Serve, in any order of use. Deliberate differences: ``is_disconnected()`` asks without receiving, so
it never swallows a piece of the body; the scope says ASGI 2.4, that is, ``send`` raises ``OSError`` after a
disconnect, which spares Starlette a listening task for each stream.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect, Request as StarletteRequest, empty_send

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope


class Head(Protocol):
    """What the extension module knows of one HTTP request (``_core.RequestHead``)."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str:
        """Percent-decoded, beginning with ``HTTPOptions.root_path``."""

    @property
    def raw_path(self) -> bytes:
        """As sent, beginning with ``HTTPOptions.root_path``."""

    @property
    def query_string(self) -> bytes: ...
    @property
    def root_path(self) -> str:
        """``HTTPOptions.root_path`` and the route prefix."""

    @property
    def path_params(self) -> dict[str, Any]:
        """What the route's pattern found in the path; a new dict at each access."""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Names in lower case, in the order of arrival; a new list at each access."""

    @property
    def client(self) -> tuple[str, int] | None: ...
    @property
    def server(self) -> tuple[str, int | None] | None: ...
    @property
    def scheme(self) -> str: ...
    @property
    def http_version(self) -> str: ...
    @property
    def encoded(self) -> Any:
        """What `_core.head_parts` makes this head of again."""

    @property
    def body(self) -> bytes | None:
        """The whole body, or None while it is still arriving."""

    def read(self) -> Awaitable[bytes | None]:
        """The whole body as soon as it has arrived, or None if the client goes away before."""

    @property
    def disconnected(self) -> bool: ...
    @property
    def receive(self) -> Receive:
        """ASGI receive; after the body it waits for the disconnect."""


def scope_of(head: Head) -> dict[str, Any]:
    """The ASGI scope of a request, with the keys and values of uvicorn's inside Ray Serve."""
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": head.http_version,
        "server": head.server,
        "client": head.client,
        "scheme": head.scheme,
        "method": head.method,
        "root_path": head.root_path,
        "path": head.path,
        "raw_path": head.raw_path,
        "query_string": head.query_string,
        "headers": head.headers,
        "state": {},
    }
    if params := head.path_params:
        scope["path_params"] = params
    return scope


class _Lazy:
    """An attribute that is computed at its first use and from then on is an ordinary one."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.make(instance)
        return value


class Request(StarletteRequest):
    """An HTTP request as a deployment's handler gets it; see ``starlette.requests.Request``."""

    _send = staticmethod(empty_send)
    _stream_consumed = False
    _is_disconnected = False
    _form = None

    def __init__(self, head: Head) -> None:
        self._head = head

    @_Lazy
    def scope(self) -> Scope:
        scope = scope_of(self._head)
        scope["headers"] = self.__dict__.get("_raw_headers", scope["headers"])  # shared with `headers`, as in Starlette
        if self.__dict__.get("_path_params"):
            scope["path_params"] = self._path_params
        return scope

    @property
    def method(self) -> str:
        scope = self.__dict__.get("scope")
        return self._head.method if scope is None else scope["method"]

    @property
    def headers(self) -> Headers:
        if "_headers" not in self.__dict__:
            scope = self.__dict__.get("scope")
            if scope is None:
                self._raw_headers = self._head.headers
                self._headers = Headers(raw=self._raw_headers)
            else:
                self._headers = Headers(scope=scope)
        return self._headers

    @property
    def query_params(self) -> QueryParams:
        if "_query_params" not in self.__dict__:
            scope = self.__dict__.get("scope")
            self._query_params = QueryParams(self._head.query_string if scope is None else scope["query_string"])
        return self._query_params

    @property
    def path_params(self) -> dict[str, Any]:
        scope = self.__dict__.get("scope")
        return self._path_params if scope is None else super().path_params

    @_Lazy
    def _path_params(self) -> dict[str, Any]:
        return self._head.path_params

    @_Lazy
    def _receive(self) -> Receive:
        receive = self._head.receive
        return _after_body(receive) if "_body" in self.__dict__ else receive

    async def body(self) -> bytes:
        if "_body" in self.__dict__:
            return self._body
        # Once somebody holds `receive`, the body may be on its way through there.
        if "_receive" in self.__dict__:
            return await super().body()
        body = self._head.body
        if body is None:
            body = await self._head.read()
        if body is None:
            self._is_disconnected = True
            raise ClientDisconnect
        self._body = body
        return body

    async def json(self) -> Any:
        if "_json" not in self.__dict__:
            self._json = loads(await self.body())
        return self._json

    async def is_disconnected(self) -> bool:
        if not self._is_disconnected and self._head.disconnected:
            self._is_disconnected = True
        return self._is_disconnected

    def __reduce__(self) -> tuple[Any, ...]:
        """As an argument of a call it arrives with its body, which must have been read."""
        from rayserve_fast.replica import portable

        return portable.reduce(self)


def loads(body: bytes) -> Any:
    """``json.loads(body)``, by orjson where that gives the same value.

    orjson makes a float of an integer beyond 64 bits, hence the look for 19 digits in a row, and refuses what only the
    standard library takes: NaN, UTF-16, lone surrogates.
    """
    if body.translate(_DIGITS).find(_LONG) < 0:
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            pass
    return json.loads(body)


def _after_body(receive: Receive) -> Receive:
    """A receive channel whose body was read by another way: it only tells the disconnect."""

    async def rest() -> Message:
        message = await receive()
        while message["type"] == "http.request":
            message = await receive()
        return message

    return rest


_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 19
