"""The lazy request answers what Starlette's answers over uvicorn's scope, whatever is asked first."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from starlette.requests import ClientDisconnect, Request as StarletteRequest

from rayserve_fast.replica.request import Request, loads, scope_of


@dataclasses.dataclass
class PlainHead:
    """A request head as the extension module gives it, from a list of body chunks; one chunk arrives with the head."""

    method: str = "GET"
    target: bytes = b"/"
    query_string: bytes = b""
    server_root: str = ""
    route: str = "/"
    headers_in: tuple[tuple[bytes, bytes], ...] = ((b"host", b"example.org"),)
    client: tuple[str, int] | None = ("10.0.0.7", 4711)
    server: tuple[str, int | None] | None = ("127.0.0.1", 8000)
    scheme: str = "http"
    http_version: str = "1.1"
    chunks: tuple[bytes, ...] = (b"",)
    disconnected: bool = False
    request_id: str = "id"
    params: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.pending = list(self.chunks)

    @property
    def path(self) -> str:
        return self.server_root + urllib.parse.unquote(self.target.decode("ascii"))

    @property
    def raw_path(self) -> bytes:
        return self.server_root.encode() + self.target

    @property
    def root_path(self) -> str:
        return self.server_root + (self.route if self.route != "/" else "")

    @property
    def path_params(self) -> dict[str, Any]:
        return dict(self.params)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return list(self.headers_in)

    @property
    def body(self) -> bytes | None:
        return self.chunks[0] if len(self.chunks) == 1 else None

    async def read(self) -> bytes | None:
        body = b""
        while (message := await self.receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                return body
        return None

    async def receive(self) -> dict[str, Any]:
        if not self.pending:
            return {"type": "http.disconnect"}
        chunk = self.pending.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(self.pending)}


def uvicorn_scope(head: PlainHead) -> dict[str, Any]:
    """The scope of uvicorn behind Ray Serve's proxy, written down independently of the code under test."""
    params = {"path_params": dict(head.params)} if head.params else {}
    return params | {
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
        "headers": list(head.headers_in),
        "state": {},
    }


async def chunks_of(request: StarletteRequest) -> list[bytes]:
    return [chunk async for chunk in request.stream()]


async def form_of(request: StarletteRequest) -> list[tuple[str, Any]]:
    form = await request.form()
    return [
        (k, v if isinstance(v, str) else (v.filename, v.content_type, await v.read())) for k, v in form.multi_items()
    ]


def header_twice(request: StarletteRequest) -> list[str]:
    """Seen through the headers and through the scope: one list."""
    request.headers  # noqa: B018
    request.scope["headers"].append((b"x-late", b"1"))
    return request.headers.getlist("x-late")


def other_method(request: StarletteRequest) -> str:
    request.scope["method"] = "PATCH"
    return request.method


def add_state(request: StarletteRequest) -> Any:
    request.state.seen = 1
    return request.scope["state"]


async def after_body(request: StarletteRequest) -> str:
    await request.body()
    return (await request.receive())["type"]


async def half_received(request: StarletteRequest) -> bytes:
    first = await request.receive()
    assert first["type"] == "http.request"
    return first["body"] + (await request.body() if first["more_body"] else b"")


async def reborn(request: StarletteRequest) -> bytes:
    """What middleware does: a second request over the first one's scope and receive."""
    return await StarletteRequest(request.scope, request.receive).body()


QUESTIONS: dict[str, Callable[[StarletteRequest], Any]] = {
    "method": lambda r: r.method,
    "url": lambda r: str(r.url),
    "url parts": lambda r: (r.url.scheme, r.url.netloc, r.url.path, r.url.query, r.url.port, r.url.hostname),
    "base_url": lambda r: str(r.base_url),
    "headers": lambda r: (r.headers.raw, dict(r.headers), r.headers.get("Host"), "x-none" in r.headers),
    "query": lambda r: r.query_params.multi_items(),
    "path_params": lambda r: r.path_params,
    "cookies": lambda r: r.cookies,
    "client": lambda r: r.client,
    "mapping": lambda r: (sorted(r), len(r), r["path"], r.get("nothing"), dict(r)["raw_path"]),
    "scope": lambda r: dict(r.scope),
    "state": add_state,
    "header twice": header_twice,
    "other method": other_method,
    "session": lambda r: r.session,
    "auth": lambda r: r.auth,
    "user": lambda r: r.user,
    "app": lambda r: r.app,
    "url_for": lambda r: r.url_for("x"),
    "equality": lambda r: (r == r, hash(r) == hash(r), r in [object()]),
    "body": lambda r: r.body(),
    "json": lambda r: r.json(),
    "form": form_of,
    "stream": chunks_of,
    "after body": after_body,
    "half received": half_received,
    "reborn": reborn,
    "close": lambda r: r.close(),
    "push": lambda r: r.send_push_promise("/x"),
}


async def ask(request: StarletteRequest, question: str) -> tuple[str, Any]:
    try:
        answer = QUESTIONS[question](request)
        return "is", await answer if isinstance(answer, Awaitable) else answer
    except (Exception, ClientDisconnect) as error:
        return "raises", (type(error), str(error))


FILE = b'--b\r\nContent-Disposition: form-data; name="f"; filename="n.txt"\r\nContent-Type: text/plain\r\n\r\nhello\r\n'
FIELD = b'--b\r\nContent-Disposition: form-data; name="t"\r\n\r\nv\r\n--b--\r\n'
BODIES = [
    b"",
    b'{"a": [1, 2.5, null], "b": "\xc3\xa9"}',
    b"[123456789012345678901234567890]",
    b"NaN",
    b"{",
    b"a=1&b=%20&a=2",
    FILE + FIELD,
]
header_values = st.binary(max_size=12).map(lambda b: b.replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b""))
header_items = st.tuples(
    st.sampled_from([b"host", b"cookie", b"x-a", b"accept", b"x-request-id", b"content-type"]),
    header_values
    | st.sampled_from([b"a=1; b=2", b'q="x y"; z', b"caf\xe9", b"api.example.org:8443", b"[::1]:80", b"bad host/"])
    | st.sampled_from([b"multipart/form-data; boundary=b", b"application/x-www-form-urlencoded"]),
)
heads = st.builds(
    PlainHead,
    method=st.sampled_from(["GET", "POST", "HEAD", "PROPFIND"]),
    target=st.sampled_from([b"/", b"/x/y", b"/a%20b/%C3%A9", b"/%2f%3f%23", b"/p;q=1", b"//double", b"/%ff"]),
    query_string=st.sampled_from([b"", b"a=1", b"a=1&a=2&b=", b"q=%C3%A9+x&flag", b"x=\xe9"]) | st.binary(max_size=8),
    server_root=st.sampled_from(["", "/root"]),
    route=st.sampled_from(["/", "/x", "/a b"]),
    headers_in=st.lists(header_items, max_size=5).map(tuple),
    client=st.none() | st.just(("::1", 5)),
    server=st.none() | st.sampled_from([("127.0.0.1", 80), ("::1", 8000), ("/run/socket", None)]),
    scheme=st.sampled_from(["http", "https"]),
    http_version=st.sampled_from(["1.0", "1.1", "2"]),
    params=st.sampled_from([(), (("user_id", 123), ("number", 3.14))]),
    chunks=st.sampled_from(BODIES).map(lambda b: (b,)) | st.sampled_from(BODIES).map(lambda b: (b[:3], b[3:])),
)


@settings(max_examples=1500, deadline=None)
@given(heads, st.lists(st.sampled_from(list(QUESTIONS)), min_size=1, max_size=5))
@example(PlainHead(chunks=(b"x",)), ["stream", "stream", "body"])
@example(PlainHead(chunks=(b"x",)), ["body", "after body", "reborn"])
@example(PlainHead(chunks=(b"x", b"y")), ["body", "stream", "json"])
@example(PlainHead(chunks=(BODIES[-1],), headers_in=((b"content-type", b"multipart/form-data; boundary=b"),)), ["form"])
@example(PlainHead(), ["other method", "method", "headers", "header twice", "headers"])
def test_any_sequence_of_questions_is_answered_as_by_starlette(head: PlainHead, questions: list[str]) -> None:
    twin = dataclasses.replace(head)

    async def both() -> None:
        ours, theirs = Request(head), StarletteRequest(uvicorn_scope(twin), twin.receive)
        for question in questions:
            assert await ask(ours, question) == await ask(theirs, question), question

    asyncio.run(both())


def steps(coroutine: Any) -> int:
    """How often a coroutine suspends before it returns."""
    count = 0
    while True:
        try:
            coroutine.send(None)
        except StopIteration:
            return count
        count += 1


def test_is_a_starlette_request() -> None:
    assert isinstance(Request(PlainHead()), StarletteRequest)


def test_inline_body_and_json_never_suspend() -> None:
    request = Request(PlainHead(chunks=(b'{"a":1}',)))
    assert steps(request.body()) == steps(request.json()) == 0


def test_usual_parts_do_not_build_the_scope() -> None:
    request = Request(PlainHead(query_string=b"a=1", chunks=(b"1",)))
    assert (request.method, request.query_params["a"], request.headers["host"]) == ("GET", "1", "example.org")
    assert request.path_params == {}
    asyncio.run(request.json())
    assert "scope" not in request.__dict__


def test_is_disconnected_follows_the_head_and_takes_nothing_from_the_body() -> None:
    head = PlainHead(chunks=(b"x", b"y"))
    request = Request(head)

    async def look() -> None:
        assert not await request.is_disconnected()
        assert await request.body() == b"xy"
        head.disconnected = True
        assert await request.is_disconnected()

    asyncio.run(look())


def test_stream_of_a_client_that_leaves_raises_client_disconnect() -> None:
    head = PlainHead(chunks=(b"x", b"y"))
    head.receive = lambda: one_message({"type": "http.disconnect"})  # type: ignore[method-assign]
    with pytest.raises(ClientDisconnect):
        asyncio.run(Request(head).body())


async def one_message(message: dict[str, Any]) -> dict[str, Any]:
    return message


def test_scope_is_uvicorns() -> None:
    head = PlainHead(target=b"/a%20b", server_root="/root", route="/a b", query_string=b"q")
    assert scope_of(head) == uvicorn_scope(head)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@settings(deadline=None)
@given(
    json_values.map(lambda v: json.dumps(v).encode())
    | st.binary(max_size=12)
    | st.text("0123456789eE+-.[], ").map(str.encode)
)
@example(b"9" * 19)
@example(b"-9223372036854775809")
@example(b"1e400")
@example(b"\xef\xbb\xbf1")
@example('{"é": 1}'.encode("utf-16"))
@example(b'"\\ud800"')
@example(b'{"a": 1, "a": NaN}')
def test_loads_equals_the_standard_library(body: bytes) -> None:
    def outcome(parse: Callable[[bytes], Any]) -> Any:
        try:
            return repr(parse(body))
        except Exception as error:
            return type(error), str(error)

    assert outcome(loads) == outcome(json.loads)


def test_import_leaves_the_heavy_libraries_alone() -> None:
    import subprocess

    script = (
        "import sys, rayserve_fast.replica.responses as r; r.encode({'a': 1})\n"
        "first = {'starlette', 'fastapi', 'numpy', 'pandas', 'pydantic'} & set(sys.modules)\n"
        "import rayserve_fast.replica.request\n"
        "print(first, {'fastapi', 'numpy', 'pandas', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]
