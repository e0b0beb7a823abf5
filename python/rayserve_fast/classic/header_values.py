"""What Flask makes of headers: type and length of a body, who the client is, its credentials. See `requests.py`."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.request import parse_http_list, parse_keqv_list

from starlette.datastructures import Headers


class Typed:
    """Mappings of strings with werkzeug's `get`."""

    def get(self, key: str, default: Any = None, type: Callable[[Any], Any] | None = None) -> Any:
        """The first value, through `type` if given; `default` if there is none or `type` refuses it."""
        this: Any = self
        if key not in this:
            return default
        try:
            return this[key] if type is None else type(this[key])
        except (ValueError, TypeError):
            return default


class FlaskHeaders(Typed, Headers):
    """Starlette's headers as werkzeug shows them: names are `Title-Case`, and iterating gives pairs.

    >>> headers = FlaskHeaders({"x-version": "3"})
    >>> list(headers), dict(headers), headers["X-VERSION"], headers.get("x-version", type=int)
    ([('X-Version', '3')], {'X-Version': '3'}, '3', 3)
    """

    def keys(self) -> list[str]:  # type: ignore[override]
        return [name.decode("latin-1").title() for name, _ in self._list]

    def items(self) -> list[tuple[str, str]]:  # type: ignore[override]
        return list(zip(self.keys(), self.values(), strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items())


def mimetype_of(content_type: str | None) -> str:
    """The type alone, in lower case.

    >>> mimetype_of("Text/CSV; charset=utf-8"), mimetype_of(None)
    ('text/csv', '')
    """
    return (content_type or "").partition(";")[0].strip().lower()


def length_of(headers: Mapping[str, str]) -> int | None:
    """Bytes by the header `Content-Length`; None if that is not there or no number."""
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


class UserAgent(str):
    """The header `User-Agent`: its text, of which nothing is parsed, as in werkzeug since 2.1.

    >>> agent = UserAgent("curl/8.5.0")
    >>> agent.string, str(agent), agent.browser
    ('curl/8.5.0', 'curl/8.5.0', None)
    """

    __slots__ = ()

    platform = browser = version = language = None

    @property
    def string(self) -> str:
        """The text itself."""
        return str(self)


@dataclass(frozen=True)
class Authorization:
    """The header `Authorization`.

    Args:
        type: the scheme, in lower case.
        parameters: of Basic `username` and `password`, of others what they list, such as Digest's `realm`.
        token: what follows the scheme if it is no list, such as a bearer's.
    """

    type: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    token: str | None = None

    @classmethod
    def of_header(cls, value: str | None) -> Authorization | None:
        """None: there is no such header, or it is no credentials.

        >>> found = Authorization.of_header("Basic YWRhOnNlY3JldA==")
        >>> found.type, found.username, found.password
        ('basic', 'ada', 'secret')
        >>> Authorization.of_header("Bearer abc=").token, Authorization.of_header("Basic abc")
        ('abc=', None)
        """
        scheme, _, rest = (value or "").partition(" ")
        scheme, rest = scheme.lower(), rest.strip()
        if not rest:
            return None
        if scheme == "basic":
            try:
                username, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
            except ValueError:  # no base64, or of no UTF-8
                return None
            return cls(scheme, {"username": username, "password": password})
        if "=" not in rest.rstrip("="):
            return cls(scheme, token=rest)
        return cls(scheme, parse_keqv_list([part for part in parse_http_list(rest) if part.partition("=")[2]]))

    @property
    def username(self) -> str | None:
        """Of Basic and Digest."""
        return self.parameters.get("username")

    @property
    def password(self) -> str | None:
        """Of Basic."""
        return self.parameters.get("password")

    def get(self, name: str, default: str | None = None) -> str | None:
        """A parameter."""
        return self.parameters.get(name, default)

    def __getitem__(self, name: str) -> str | None:
        return self.parameters.get(name)
