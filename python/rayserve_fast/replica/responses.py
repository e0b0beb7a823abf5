"""What a plain handler's result, or its failure, becomes as an HTTP answer; ASGI applications answer for themselves.

A result that needs no event loop to be sent is returned ready: status, headers, body. Any other Starlette response (a
stream, a file, one with a background task) is returned as it is, to be sent by ``await response(scope, receive,
send)``.

Starlette is looked for in ``sys.modules`` only: a handler that returns responses has imported it, and the others
start a tenth of a second sooner. No content-length is given where none was: the body is complete, the proxy counts
it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from types import AsyncGeneratorType, GeneratorType
from typing import TYPE_CHECKING, Any

from rayserve_fast.replica import json

if TYPE_CHECKING:
    from starlette.responses import Response

Headers = list[tuple[bytes, bytes]]
Answer = tuple[int, Headers, bytes]


class Ready:
    """A value whose answer is known already: what a handler of this package returns where the rules below differ."""

    __slots__ = ("answer",)

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    @classmethod
    def of_json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Ready:
        """Any value as JSON, text and bytes too."""
        more = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in headers.items()] if headers else ()
        return cls((status, [*_JSON, *more] if more else _JSON, json.dumps(value)))


class Refused(Exception):
    """A request that the client has got wrong. Raised by code of this package; its text is the answer's."""

    status_code = 400


def encode(result: Any) -> Answer | Response:
    """Turn a handler's return value into an answer.

    Returns:
        (status, headers, body), or the Starlette response that has to be awaited.

    Raises:
        TypeError: the value is a generator, which has no meaning over HTTP.
        Exception: whatever makes the value not serializable.
    """
    if result is None:
        return 200, _EMPTY, b""
    if isinstance(result, bytes):
        return 200, _EMPTY, bytes(result)
    if isinstance(result, str):
        return 200, _TEXT, result.encode()
    starlette = sys.modules.get("starlette.responses")
    if starlette is not None and isinstance(result, starlette.Response):
        plain = type(result).__call__ is starlette.Response.__call__ and result.background is None
        return (result.status_code, result.raw_headers, bytes(result.body)) if plain else result
    if isinstance(result, (GeneratorType, AsyncGeneratorType)):
        raise TypeError(
            f"an HTTP handler returned the generator {result.__qualname__!r}; "
            "return starlette.responses.StreamingResponse(generator) to stream over HTTP"
        )
    if type(result) is Ready:
        return result.answer
    return 200, _JSON, json.dumps(result)


def failure(error: BaseException) -> Answer:
    """The answer for an exception that a handler raised before its response began.

    Only a request that is refused, a full queue and a deployment that failed to deploy, here or further down the chain
    of handles, tell the client anything; the rest is in the replica's log.
    """
    from rayserve_fast.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(error, BackPressureError):
        headers = []
        if error.retry_after_s is not None:
            headers.append((b"retry-after", str(max(0, math.ceil(error.retry_after_s))).encode()))
        return error.status_code, headers, error.message.encode()
    if isinstance(error, Refused):
        return error.status_code, _TEXT, str(error.args[0]).encode()
    if isinstance(error, DeploymentUnavailableError):
        return 503, [], error.message.encode()
    return 500, [], b"Internal Server Error"


# Shared by all answers; whoever sends them must not change them.
_EMPTY: Headers = [(b"content-type", b"text/plain")]
_TEXT: Headers = [(b"content-type", b"text/plain; charset=utf-8")]
_JSON: Headers = [(b"content-type", b"application/json")]
