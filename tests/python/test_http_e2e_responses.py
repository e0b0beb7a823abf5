"""What a handler answers reaches a raw-socket client as from uvicorn inside Ray Serve."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from http_pair import Address, Answer, exchange, ours, theirs
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from rayserve_fast.ingress import ingress

CLOSE = "host: h\r\nconnection: close\r\n"


async def counted(number: int, pause: float = 0.0) -> AsyncIterator[bytes]:
    for item in range(number):
        if pause:
            await asyncio.sleep(pause)
        yield f"item {item};".encode()


def numbered(number: int) -> Iterator[str]:
    for item in range(number):
        yield f"item {item};"


async def broken() -> AsyncIterator[bytes]:
    yield b"before"
    await asyncio.sleep(0.01)
    raise ValueError("in the middle")


def with_cookies() -> Response:
    response = PlainTextResponse("x", headers={"X-Case": "caf\xe9", "vary": "a"})
    response.set_cookie("a", "1")
    response.set_cookie("b", "2")
    return response


RESULTS: dict[str, Callable[[], Any]] = {
    "text": lambda: "näïve",
    "bytes": lambda: b"\x00\xff",
    "none": lambda: None,
    "json": lambda: {"a": [1, None, 0.5]},
    "empty text": lambda: "",
    "200 KB": lambda: "x" * 200_000,
    "3 MB": lambda: b"\xfe" * 3_000_000,
    "created": lambda: Response("made", 201, media_type="text/plain"),
    "204": lambda: Response(status_code=204),
    "304": lambda: Response(status_code=304, headers={"etag": '"x"'}),
    "404": lambda: JSONResponse({"detail": "none"}, 404),
    "418": lambda: PlainTextResponse("teapot", 418),
    "599": lambda: Response(b"", 599),
    "html": lambda: HTMLResponse("<p>é</p>"),
    "redirect": lambda: RedirectResponse("/other?a=é"),
    "cookies": with_cookies,
    "stream": lambda: StreamingResponse(counted(50), media_type="text/event-stream"),
    "slow stream": lambda: StreamingResponse(counted(5, 0.005)),
    "sync stream": lambda: StreamingResponse(numbered(50), 203),
    "empty stream": lambda: StreamingResponse(counted(0)),
    "stream of known length": lambda: StreamingResponse(counted(2), headers={"content-length": "14"}),
    "large stream": lambda: StreamingResponse(b"%07d" % i * 1000 for i in range(400)),
    "file": lambda: FileResponse(__file__, media_type="text/x-python", filename="näme.py"),
    "stream too short": lambda: StreamingResponse(counted(1), headers={"content-length": "50"}),
    "connection close": lambda: Response("abc", headers={"connection": "close"}),
    "own date": lambda: Response("abc", headers={"date": "today", "server": "mine"}),
    "own framing": lambda: Response("abc", headers={"transfer-encoding": "chunked"}),
    "failure": lambda: 1 / 0,
    "unserializable": lambda: object(),
    "http exception": lambda: (_ for _ in ()).throw(HTTPException(403)),
    "broken stream": lambda: StreamingResponse(broken()),
    "background": lambda: PlainTextResponse("first", background=BackgroundTask(lambda: None)),
}


async def answer(request: Any) -> Any:
    return RESULTS[request.query_params["case"]]()


def answer_sync(request: Any) -> Any:
    return RESULTS[request.query_params["case"]]()


async def answer_asgi(scope: Any, receive: Any, send: Any) -> None:
    """The same as an ASGI application, which has no table of results."""
    result = RESULTS[scope["query_string"][5:].decode().replace("%20", " ")]()
    if type(result) is object:
        raise TypeError("not serializable")
    response = result if isinstance(result, Response) else PlainTextResponse(repr(result)[:100_000])
    await response(scope, receive, send)


@pytest.fixture(scope="module", params=[answer, answer_sync, answer_asgi])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Address, Address]]:
    target = ingress(answer_asgi)() if request.param is answer_asgi else request.param
    with ours(target) as here, theirs(request.param) as there:
        yield here, there


FRAMING = {"server", "date", "transfer-encoding", "content-length", "x-request-id", "connection"}


def seen(answer: Answer) -> Any:
    """An answer without who gave it and how its body was framed; whether it is whole counts."""
    body = answer.body if answer.complete else b"" if answer.status == 200 else answer.body
    return answer.status, sorted(h for h in answer.headers if h[0] not in FRAMING), body, answer.complete


def ask(address: Address, case: str, method: str = "GET", version: str = "1.1", extra: str = "") -> list[Answer]:
    target = f"/?case={case.replace(' ', '%20')}"
    return exchange(address, f"{method} {target} HTTP/{version}\r\n{CLOSE}{extra}\r\n".encode("latin-1"), method)


# uvicorn names the type and closes when an ASGI application fails; a plain handler's failure has no type in Ray Serve.
UNTYPED = {"failure", "http exception", "unserializable"}


@pytest.mark.parametrize("case", RESULTS)
def test_answer_is_uvicorns(pair: tuple[Address, Address], case: str) -> None:
    here, there = ask(pair[0], case), ask(pair[1], case)
    assert [a.status for a in here] == [a.status for a in there]
    if case not in UNTYPED:
        assert [seen(a) for a in here] == [seen(a) for a in there]
    else:
        assert [a.body for a in here] == [a.body for a in there] == [b"Internal Server Error"]


@pytest.mark.parametrize("length", ["2", "5"])
def test_whole_answer_that_lies_about_its_length_is_a_failure(length: str) -> None:
    """A difference: uvicorn sends what it can and closes the connection."""

    async def lie() -> Response:
        return Response("abc", headers={"content-length": length})

    with ours(lie) as address:
        (answer,) = exchange(address, f"GET / HTTP/1.1\r\n{CLOSE}\r\n".encode())
        assert (answer.status, answer.body) == (500, b"Internal Server Error")


@pytest.mark.parametrize("case", ["text", "stream", "204", "created", "file", "200 KB"])
def test_answer_to_head_has_the_headers_and_no_body(pair: tuple[Address, Address], case: str) -> None:
    ((here,), (there,)) = ask(pair[0], case, "HEAD"), ask(pair[1], case, "HEAD")
    assert seen(here) == seen(there)
    assert here.body == b""


@pytest.mark.parametrize("case", ["text", "stream", "204", "3 MB"])
def test_answer_to_http_1_0_ends_with_the_connection_and_is_not_chunked(
    pair: tuple[Address, Address], case: str
) -> None:
    (here,) = ask(pair[0], case, version="1.0")
    (there,) = ask(pair[1], case, version="1.0")
    assert here.status == there.status
    assert here.all("transfer-encoding") == []
    assert here.body == (there.body if there.complete else here.body)


def test_file_serves_ranges_and_conditions(pair: tuple[Address, Address]) -> None:
    for extra in ("range: bytes=5-9\r\n", "range: bytes=0-1,4-5\r\n", "range: bytes=99999999-\r\n"):
        ((here,), (there,)) = (ask(address, "file", extra=extra) for address in pair)
        assert (here.status, here.all("content-range")) == (there.status, there.all("content-range"))
        assert len(here.body) == len(there.body)


def test_whole_answers_carry_their_length(pair: tuple[Address, Address]) -> None:
    for case in ("text", "200 KB", "empty text"):
        (here,) = ask(pair[0], case)
        assert here.all("content-length") == [str(len(here.body))]


def fastapi_application() -> type:
    app = FastAPI()

    @ingress(app)
    class Shop:
        def __init__(self) -> None:
            self.sold = 0

        @app.get("/items/{name}")
        async def item(self, name: str, request: Request, count: int = 1) -> dict[str, Any]:
            self.sold += count
            return {"name": name, "sold": self.sold, "url": str(request.url_for("item", name="x"))}

        @app.post("/items/")
        def put(self, item: dict[str, int]) -> dict[str, int]:
            return item

    return Shop


def test_fastapi_behind_a_prefix_and_a_root_path() -> None:
    with ours(fastapi_application(), "/shop", "/root") as address:

        def get(target: str) -> Answer:
            (answer,) = exchange(address, f"GET {target} HTTP/1.1\r\n{CLOSE}\r\n".encode())
            return answer

        first = json.loads(get("/shop/items/a%20b?count=2").body)
        assert first == {"name": "a b", "sold": 2, "url": "http://h/root/shop/items/x"}
        assert get("/shop/items/a?count=x").status == 422
        assert get("/shop/none").status == 404
        redirect = get("/shop/items")
        assert (redirect.status, redirect.all("location")) == (307, ["http://h/root/shop/items/"])
        assert b"/root/shop/openapi.json" in get("/shop/docs").body
        head = f"POST /shop/items/ HTTP/1.1\r\n{CLOSE}content-type: application/json\r\ncontent-length: 7\r\n\r\n"
        (posted,) = exchange(address, head.encode() + b'{"a":1}', "POST")
        assert (posted.status, posted.body) == (200, b'{"a":1}')


def test_this_file_is_what_the_file_response_sends(pair: tuple[Address, Address]) -> None:
    (here,) = ask(pair[0], "file")
    assert here.body == Path(__file__).read_bytes()
