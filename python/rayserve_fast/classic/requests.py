"""The requests that backends get: Flask-shaped ones, and those that stand for calls by handles.

`FlaskRequest` has the parts of `flask.Request` that model-serving code reads, as plain values: there is no Flask here,
and nothing to await. `HandleRequest` is what a handle of an endpoint sends; a backend of the Client API is given it
as it is, as it answers to the names of Starlette's request.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException

from rayserve_fast.classic.header_values import Authorization, FlaskHeaders, Typed, UserAgent, length_of, mimetype_of
from rayserve_fast.classic.uploads import FileStorage
from rayserve_fast.replica.request import _Lazy, loads
from rayserve_fast.replica.responses import Refused

if TYPE_CHECKING:
    from rayserve_fast.replica.request import Request

_PATH_SAFE = "/:@!$&'()*+,;=~"
_URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"


class MultiDict(Typed, dict[str, Any]):
    """Several values under one key, of which the first is the dict's, as werkzeug's.

    >>> found = MultiDict([("n", "1"), ("n", "2")])
    >>> found["n"], found.get("n", type=int), found.getlist("n"), found.getlist("n", type=int), found.get("m", 0)
    ('1', 1, ['1', '2'], [1, 2], 0)
    """

    def __init__(self, pairs: Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__()
        self._further: dict[str, list[Any]] = {}
        for key, value in pairs:
            if key in self:
                self._further.setdefault(key, []).append(value)
            else:
                self[key] = value

    def getlist(self, key: str, type: Callable[[Any], Any] | None = None) -> list[Any]:
        """All values of a key; through `type` if given, without those that it refuses."""
        found = [self[key], *self._further.get(key, ())] if key in self else []
        if type is None:
            return found
        taken = []
        for value in found:
            with suppress(ValueError, TypeError):
                taken.append(type(value))
        return taken

    def items(self, multi: bool = False) -> Iterable[tuple[str, Any]]:  # type: ignore[override]
        """Keys with their first values, or with each of all."""
        return ((key, value) for key in self for value in self.getlist(key)) if multi else super().items()

    def lists(self) -> Iterable[tuple[str, list[Any]]]:
        """Keys with all of their values."""
        return ((key, self.getlist(key)) for key in self)

    def listvalues(self) -> Iterable[list[Any]]:
        """All values of each key."""
        return (self.getlist(key) for key in self)

    def to_dict(self, flat: bool = True) -> dict[str, Any]:
        """A plain dict, of first values or of lists of all."""
        return dict(self) if flat else {key: self.getlist(key) for key in self}


@dataclass
class HandleRequest:
    """A call by a handle, as `handle.remote(data, **query_params)` made it.

    >>> request = HandleRequest({"x": 1}, {"verbose": True})
    >>> request.data, request.query_params, request.method
    ({'x': 1}, {'verbose': True}, 'GET')
    """

    data: Any = None
    query_params: dict[str, Any] = field(default_factory=dict)
    method: str = "GET"
    given_headers: dict[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> Headers:
        """The handle's `http_headers`; names in any case."""
        return Headers(self.given_headers)

    @property
    def path_params(self) -> dict[str, Any]:
        """None: a handle has no path."""
        return {}

    async def body(self) -> Any:
        """`data` as it was given."""
        return self.data

    async def json(self) -> Any:
        """`data`, parsed if it is text."""
        return parsed(self.data)

    async def form(self) -> Any:
        """`data` as it was given."""
        return self.data


def parsed(data: Any) -> Any:
    """The value of JSON text; any other value is itself."""
    return loads(data.encode() if isinstance(data, str) else data) if isinstance(data, (str, bytes)) else data


class BadJson(Refused, ValueError):
    """The body of an HTTP request is no JSON; not caught, it is a 400, as with Flask."""


class BadForm(Refused):
    """The body of an HTTP request is not the multipart form that it is said to be."""


async def fields_of(request: Request) -> list[tuple[str, Any]]:
    """The names in a multipart form with text, or with files.

    Raises:
        BadForm: it cannot be read.
    """
    try:
        return (await request.form()).multi_items()
    except (MultiPartException, ValueError) as error:  # the latter: what older Starlettes' parser raises
        raise BadForm(f"The body of the request is not a multipart form: {error}") from error


class FlaskRequest:
    """A request with the names of `flask.Request`, whose values are there.

    Each value is made when it is first asked for: most handlers read one or two of them.

    Args:
        request: what came over HTTP.
        body: all of its body.
        fields: of a multipart form: names with text, or with files.
    """

    def __init__(self, request: Request, body: bytes, fields: Iterable[tuple[str, Any]] = ()) -> None:
        self._request = request
        self._body: Any = body
        self._fields = fields

    @classmethod
    def of_call(cls, call: HandleRequest) -> FlaskRequest:
        """What a handle sent: `data` and `json` are its value, `args` its keyword arguments, as they are."""
        made = cls.__new__(cls)
        made._body = call.data
        form = call.data.items() if isinstance(call.data, dict) else ()
        made.__dict__.update(
            method=call.method,
            path="",
            query_string=b"",
            headers=FlaskHeaders(call.given_headers),
            remote_addr=None,
            base_url="",
            host_url="",
            scheme="",
            view_args={},
            cookies={},
            args=MultiDict(call.query_params.items()),
            form=MultiDict(form),
            files=MultiDict(),
            data=call.data,
        )
        return made

    @_Lazy
    def method(self) -> str:
        """As `GET`."""
        return self._request.method

    @_Lazy
    def headers(self) -> FlaskHeaders:
        """Names in any case."""
        return FlaskHeaders(raw=self._request.headers.raw)

    @_Lazy
    def path(self) -> str:
        """Percent-decoded, without the query."""
        return self._request._head.path

    @_Lazy
    def query_string(self) -> bytes:
        """As sent."""
        return self._request._head.query_string

    @_Lazy
    def remote_addr(self) -> str | None:
        """The client's address."""
        return self._request.client.host if self._request.client else None

    @_Lazy
    def base_url(self) -> str:
        """The whole URL without the query."""
        return f"{self.host_url[:-1]}{quote(self.path, safe=_PATH_SAFE)}"

    @_Lazy
    def host_url(self) -> str:
        """Scheme and host alone, and a slash."""
        return f"{self.scheme}://{self._request.url.netloc}/"

    @property
    def url_root(self) -> str:
        """`host_url`: `path` begins with whatever prefix there is."""
        return str(self.host_url)

    @_Lazy
    def scheme(self) -> str:
        """As `http`."""
        return self._request.url.scheme

    @property
    def is_secure(self) -> bool:
        """Whether the scheme is that of an encrypted connection."""
        return self.scheme in ("https", "wss")

    @_Lazy
    def view_args(self) -> Mapping[str, Any]:
        """What the route's pattern found in the path."""
        return self._request.path_params

    @_Lazy
    def cookies(self) -> Mapping[str, str]:
        """By name."""
        return self._request.cookies

    @property
    def _is_http(self) -> bool:
        return "_request" in self.__dict__

    @property
    def content_type(self) -> str | None:
        """The header, with its parameters."""
        kind: str | None = self.headers.get("content-type")
        return kind

    @property
    def content_length(self) -> int | None:
        """Bytes of the body by its header; None if that is not there, as with a chunked body, or no number."""
        return length_of(self.headers)

    @property
    def user_agent(self) -> UserAgent:
        """What the client says that it is; empty if it says nothing."""
        return UserAgent(self.headers.get("user-agent", ""))

    @property
    def authorization(self) -> Authorization | None:
        """The client's credentials; None if there are none, or none that can be read."""
        return Authorization.of_header(self.headers.get("authorization"))

    @property
    def endpoint(self) -> None:
        """None: what Flask means is the name of a view function, and Flask has routed nothing here."""
        return None

    @property
    def mimetype(self) -> str:
        """The type alone, in lower case."""
        return mimetype_of(self.content_type)

    @property
    def host(self) -> str:
        """The header."""
        return str(self.headers.get("host", ""))

    @property
    def full_path(self) -> str:
        """With the query, and a question mark in any case."""
        return f"{self.path}?{self.query_string.decode()}"

    @property
    def url(self) -> str:
        """With the query."""
        return f"{self.base_url}?{self.query_string.decode()}" if self.query_string else self.base_url

    @_Lazy
    def args(self) -> MultiDict:
        """The query's parameters."""
        return MultiDict(parse_qsl(self.query_string.decode(), keep_blank_values=True))

    @_Lazy
    def form(self) -> MultiDict:
        """The fields of a form that are text."""
        if self.mimetype == _URLENCODED:
            return MultiDict(parse_qsl(self.get_data(as_text=True), keep_blank_values=True))
        return MultiDict((key, value) for key, value in self._fields if isinstance(value, str))

    @_Lazy
    def files(self) -> MultiDict:
        """The files of a form."""
        return MultiDict(
            (key, FileStorage(value.file, value.filename, key, value.headers))
            for key, value in self._fields
            if not isinstance(value, str)
        )

    @_Lazy
    def values(self) -> MultiDict:
        """Query and form together; the query's come first."""
        pairs = [(key, value) for source in (self.args, self.form) for key in source for value in source.getlist(key)]
        return MultiDict(pairs)

    @_Lazy
    def data(self) -> Any:
        """The body; of a form nothing, as that has been read into `form`."""
        return b"" if self.mimetype in (_URLENCODED, MULTIPART) else self._body

    @_Lazy
    def stream(self) -> io.BytesIO:
        """The body in any case, as a file; reading it leaves the other ways to the body as they are.

        From a handle: of its data, which must be bytes.
        """
        return io.BytesIO(self._body)

    def get_data(self, cache: bool = True, as_text: bool = False) -> Any:
        """The body in any case; as text with U+FFFD for what is no UTF-8."""
        return self._body.decode(errors="replace") if as_text else self._body

    @property
    def is_json(self) -> bool:
        """Whether the content type is JSON's."""
        return self.mimetype == "application/json" or (
            self.mimetype.startswith("application/") and self.mimetype.endswith("+json")
        )

    @_Lazy
    def json(self) -> Any:
        """The value of a JSON body; None if the content type is another. From a handle: of the data, whatever it is.

        Raises:
            ValueError: the body is no JSON. Over HTTP the client is answered 400 if the handler does not catch it.
        """
        return self._parsed() if self.is_json or not self._is_http else None

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """`json`; with `force` whatever the content type, with `silent` None instead of an error."""
        try:
            return self._parsed() if force else self.json
        except ValueError:
            if silent:
                return None
            raise

    def _parsed(self) -> Any:
        try:
            return parsed(self._body)
        except ValueError as error:
            if not self._is_http:
                raise
            raise BadJson(f"The body of the request is not JSON: {error}.") from error
