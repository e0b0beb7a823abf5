"""What results and failures become, held against what Ray Serve answered (reference_results.py recorded it)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from reference_results import evaluate
from starlette.background import BackgroundTask
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from rayserve_fast.controlplane.spec import DeploymentID
from rayserve_fast.exceptions import BackPressureError, DeploymentUnavailableError
from rayserve_fast.replica.responses import encode, failure

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("reference_results.json").read_text())


@pytest.mark.parametrize("expression", REFERENCE)
def test_result_is_answered_as_by_ray_serve(expression: str) -> None:
    answer = encode(evaluate(expression))
    assert isinstance(answer, tuple)
    status, headers, body = answer
    expected = REFERENCE[expression]
    assert {
        "status": status,
        "headers": [[name.decode(), value.decode()] for name, value in headers],
        "body": body.decode("latin-1"),
    } == expected


def sent_by(response: Response) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """What the response itself would send."""
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def never() -> Any:
        await asyncio.Event().wait()

    asyncio.run(response({"type": "http", "method": "GET", "headers": []}, never, send))
    body = b"".join(message.get("body", b"") for message in messages[1:])
    return messages[0]["status"], messages[0]["headers"], body


class Teapot(Response):
    media_type = "application/tea"
    charset = "latin-1"


@pytest.mark.parametrize(
    "response",
    [
        Response(),
        Response("é", 201, {"X-A": "1"}, "text/plain"),
        Response(b"\xff", media_type="image/png"),
        Response(status_code=204),
        Response(status_code=304),
        PlainTextResponse("x"),
        HTMLResponse("<p>"),
        JSONResponse({"a": "é"}),
        RedirectResponse("/x y"),
        Teapot("é", headers={"content-type": "own"}),
    ],
)
def test_complete_response_is_answered_without_awaiting_it(response: Response) -> None:
    response.set_cookie("a", "b")
    response.headers.append("x-two", "1")
    assert encode(response) == sent_by(response)


class Counting(Response):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__(scope, receive, send)


def test_response_with_more_to_do_is_left_to_itself() -> None:
    for response in (
        StreamingResponse(iter(["a"])),
        FileResponse(__file__),
        PlainTextResponse("x", background=BackgroundTask(print)),
        Counting("x"),
    ):
        assert encode(response) is response


def test_generator_is_refused_with_advice() -> None:
    def items() -> Iterator[int]:
        yield 1

    async def later() -> AsyncIterator[int]:
        yield 1

    for result in (items(), later()):
        with pytest.raises(TypeError, match="StreamingResponse"):
            encode(result)


def test_subclasses_of_bytes_and_str() -> None:
    class Text(str):
        __slots__ = ()

    class Raw(bytes):
        __slots__ = ()

    assert encode(Text("x")) == (200, [(b"content-type", b"text/plain; charset=utf-8")], b"x")
    status, _, body = encode(Raw(b"x"))  # type: ignore[misc]
    assert (status, type(body)) == (200, bytes)


def test_unserializable_result_raises() -> None:
    with pytest.raises(ValueError, match="not iterable"):
        encode(object())
    with pytest.raises(UnicodeEncodeError):
        encode("\ud800")


def test_failures() -> None:
    assert failure(ValueError("secret")) == (500, [], b"Internal Server Error")
    assert failure(BackPressureError(3, 2)) == (503, [], BackPressureError(3, 2).message.encode())
    assert failure(BackPressureError(3, 2, 429, 0.2))[:2] == (429, [(b"retry-after", b"1")])
    assert failure(BackPressureError(3, 2, 503, 0))[1] == [(b"retry-after", b"0")]
    gone = DeploymentUnavailableError(DeploymentID("D", "app"))
    assert failure(gone) == (503, [], gone.message.encode())


def test_plain_results_import_nothing_heavy() -> None:
    script = (
        "import sys; from rayserve_fast.replica.responses import encode\n"
        "for result in (None, b'', 'x', {'a': [1, None, 'é']}): encode(result)\n"
        "print({'starlette', 'fastapi', 'numpy', 'pandas', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
