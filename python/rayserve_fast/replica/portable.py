"""An HTTP request as an argument of a call: what a graph passes from its ingress to the deployments behind it.

It must have its body, as nothing more can arrive where it goes. What it carries is decoded when somebody looks at it;
most deployments look at the body only.
"""

from __future__ import annotations

import pickle
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from rayserve_fast import values
from rayserve_fast._core import head_parts
from rayserve_fast.replica.request import Request

if TYPE_CHECKING:
    from starlette.requests import Request as StarletteRequest
    from starlette.types import Message, Receive

#: What the head of a request knows, in the order in which it travels.
PARTS = (
    "method",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
    "scheme",
    "http_version",
    "path_params",
)


def reduce(request: Request) -> tuple[Any, ...]:
    """What pickling a request gives.

    Raises:
        TypeError: its body has not been read.
    """
    state = vars(request)
    body = state.get("_body")
    if body is None:
        body = request._head.body
    if body is None:
        raise TypeError("A request can be sent on once its body is there: `await request.body()` first.")
    scope = state.get("scope")
    head = request._head.encoded if scope is None else _parts(scope)
    return rebuild, (head, pickle.PickleBuffer(body) if len(body) >= values.BESIDE_BYTES else body)


def arguments(request: Request) -> bytes | None:
    """The pickle of the arguments `((request,), {})`, which is most of what graphs send; None if it needs a pickler.

    Written by hand, as all but the two byte strings in it is always the same: 1 us instead of 9.
    """
    _, parts = reduce(request)
    head, body = parts
    if type(head) is not bytes or type(body) is not bytes:
        return None
    return b"".join((_BEGIN, len(head).to_bytes(4, "little"), head, b"B", len(body).to_bytes(4, "little"), body, _END))


#: Protocol 5, the function `rebuild`, and the opcode of a byte string.
_BEGIN = f"\x80\x05c{__name__}\nrebuild\nB".encode("latin-1")
#: A pair, which is what `rebuild` is called with; a tuple of that; an empty dict; a pair of both; the end.
_END = b"\x86R\x85}\x86."


def rebuild(encoded: bytes | list[Any], body: Any) -> Request:
    """The request where it arrives; `encoded`: by the proxy, or the parts themselves."""
    return Request(PortableHead(encoded, body))


def empty_request() -> Request:
    """A request of nobody's: GET / without headers and body."""
    return rebuild(["GET", "/", b"/", b"", "", [], None, None, "http", "1.1", {}], b"")


async def copy(request: StarletteRequest) -> Request:
    """A request of anybody's, with its body, as one of ours that can be sent on."""
    return rebuild(_parts(request.scope), await request.body())


def _parts(scope: MutableMapping[str, Any]) -> list[Any]:
    """What a scope says of each part; whoever looks for a route in it sets the parameters of its path."""
    return [scope.get(name) for name in PARTS[:-1]] + [scope.get("path_params", {})]


class PortableHead:
    """Like `_core.RequestHead`, of a request whose client is elsewhere."""

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    root_path: str
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    scheme: str
    http_version: str
    path_params: dict[str, Any]
    #: Nobody here would know.
    disconnected = False

    def __init__(self, encoded: bytes | list[Any], body: Any) -> None:
        self.encoded = encoded
        self._sent = body

    def __getattr__(self, name: str) -> Any:
        if name not in PARTS or "method" in self.__dict__:
            raise AttributeError(name)
        parts = head_parts(self.encoded) if isinstance(self.encoded, bytes) else self.encoded
        self.__dict__.update(zip(PARTS, parts, strict=True))
        return self.__dict__[name]

    def header(self, name: bytes) -> bytes | None:
        """The first header of that lower-case name."""
        return next((value for key, value in self.headers if key == name), None)

    @property
    def body(self) -> bytes:
        if type(self._sent) is not bytes:
            self._sent = bytes(self._sent)
        return self._sent

    async def read(self) -> bytes:
        """The body."""
        return self.body

    @property
    def receive(self) -> Receive:
        """ASGI receive: the body, then the end."""
        messages: list[Message] = [
            {"type": "http.disconnect"},
            {"type": "http.request", "body": self.body, "more_body": False},
        ]

        async def receive() -> Message:
            return messages.pop() if len(messages) > 1 else messages[0]

        return receive


values.pickle_plainly(Request, rebuild, arguments)
