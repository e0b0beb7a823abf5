"""What a raw-socket client sends arrives at the handler, and is answered, as with uvicorn inside Ray Serve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from http_pair import Address, Answer, exchange, ours, theirs
from hypothesis import HealthCheck, given, settings, strategies as st
from test_request import QUESTIONS, PlainHead, ask, heads

PREFIX, ROOT = "/app", "/root"


async def echo(request: Any) -> dict[str, Any]:
    """Everything that a handler can see of its request."""
    body = await request.body()
    return {
        "method": request.method,
        "url": str(request.url),
        "base_url": str(request.base_url),
        "path": request.scope["path"],
        "raw_path": request.scope["raw_path"].decode("latin-1"),
        "root_path": request.scope["root_path"],
        "query": request.scope["query_string"].decode("latin-1"),
        "params": request.query_params.multi_items(),
        "http_version": request.scope["http_version"],
        "scheme": request.url.scheme,
        "client": request.client.host,
        "headers": sorted((k.decode("latin-1"), v.decode("latin-1")) for k, v in request.scope["headers"]),
        "cookies": request.cookies,
        "body": body.decode("latin-1"),
        "keys": sorted(request.scope),
    }


@pytest.fixture(scope="module", params=["/", PREFIX])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Address, Address]]:
    with ours(echo, request.param) as here, theirs(echo, request.param) as there:
        yield here, there


@pytest.fixture(scope="module")
def rooted() -> Iterator[tuple[Address, Address]]:
    with ours(echo, PREFIX, ROOT) as here, theirs(echo, PREFIX, ROOT) as there:
        yield here, there


def seen(answer: Answer, address: Address) -> Any:
    """An answer without what may differ: who serves, how the body was framed, the port, a made request id."""
    body: Any = answer.body
    if body and answer.all("content-type") == ["application/json"]:
        body = json.loads(answer.body.replace(str(address[1]).encode(), b"PORT"))
        body["headers"] = [h if h[0] != "x-request-id" or h[1] == "given" else "made" for h in body["headers"]]
    framing = {"server", "date", "transfer-encoding", "content-length", "x-request-id", "connection"}
    return answer.status, [h for h in answer.headers if h[0] not in framing], body, answer.complete


HOST = "host: h\r\n"
CLOSE = HOST + "connection: close\r\n"
REQUESTS = {
    "plain": f"GET /app HTTP/1.1\r\n{CLOSE}\r\n",
    "query": f"GET /app/x?a=1&b=%20+%C3%A9&a=2&empty=&flag HTTP/1.1\r\n{CLOSE}\r\n",
    "empty query": f"GET /app/? HTTP/1.1\r\n{CLOSE}\r\n",
    "question marks": f"GET /app/?a?b=c?d HTTP/1.1\r\n{CLOSE}\r\n",
    "escaped path": f"GET /app/a%20b/%C3%A9%2F%3f%23%25 HTTP/1.1\r\n{CLOSE}\r\n",
    "escaped not utf-8": f"GET /app/%ff%zz HTTP/1.1\r\n{CLOSE}\r\n",
    "double slash": f"GET /app//x//y/ HTTP/1.1\r\n{CLOSE}\r\n",
    "dots": f"GET /app/../x/./y HTTP/1.1\r\n{CLOSE}\r\n",
    "special characters": f"GET /app/~!$&'()*+,;=:@|[]{{}}\"^\\ HTTP/1.1\r\n{CLOSE}\r\n",
    "special query": f"GET /app?~!$&'()*+,;=:@|[]{{}}^`\\/? HTTP/1.1\r\n{CLOSE}\r\n",
    "parameters": f"GET /app/;v=1/x HTTP/1.1\r\n{CLOSE}\r\n",
    "absolute form": f"GET http://other:81/app/x?a=1 HTTP/1.1\r\n{CLOSE}\r\n",
    "absolute form with user": f"GET http://u:p@other/app HTTP/1.1\r\n{CLOSE}\r\n",
    "post": f"POST /app HTTP/1.1\r\n{CLOSE}content-length: 5\r\n\r\nhello",
    "get with body": f"GET /app HTTP/1.1\r\n{CLOSE}content-length: 5\r\n\r\nhello",
    "delete with body": f"DELETE /app HTTP/1.1\r\n{CLOSE}content-length: 2\r\n\r\nok",
    "empty body": f"POST /app HTTP/1.1\r\n{CLOSE}content-length: 0\r\n\r\n",
    "chunked": f"POST /app HTTP/1.1\r\n{CLOSE}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n1;x=y\r\n!\r\n0\r\n\r\n",
    "large body": f"POST /app HTTP/1.1\r\n{CLOSE}content-length: 300000\r\n\r\n" + "x" * 300000,
    "head": f"HEAD /app HTTP/1.1\r\n{CLOSE}\r\n",
    "options": f"OPTIONS /app HTTP/1.1\r\n{CLOSE}\r\n",
    "patch": f"PATCH /app HTTP/1.1\r\n{CLOSE}content-length: 1\r\n\r\nx",
    "unusual method": f"PROPFIND /app HTTP/1.1\r\n{CLOSE}\r\n",
    "http/1.0": "GET /app HTTP/1.0\r\nhost: h\r\n\r\n",
    "http/1.0 post": "POST /app HTTP/1.0\r\nhost: h\r\ncontent-length: 2\r\n\r\nhi",
    "header case and space": f"GET /app HTTP/1.1\r\n{CLOSE}X-Mixed-Case: \t spaced out\r\nX-Empty:\r\n\r\n",
    "repeated headers": f"GET /app HTTP/1.1\r\n{CLOSE}x-a: 1\r\nx-b: 2\r\nX-A: 3\r\naccept: a, b\r\n\r\n",
    "latin-1 value": f"GET /app HTTP/1.1\r\n{CLOSE}x-name: caf\xe9 \xfc\r\n\r\n",
    "cookies": f"GET /app HTTP/1.1\r\n{CLOSE}cookie: a=1; b=\"x y\"\r\ncookie: c=3\r\n\r\n",
    "own request id": f"GET /app HTTP/1.1\r\n{CLOSE}x-request-id: given\r\n\r\n",
    "host with port": "GET /app HTTP/1.1\r\nhost: example.org:8443\r\nconnection: close\r\n\r\n",
    "many headers": f"GET /app HTTP/1.1\r\n{CLOSE}" + "".join(f"x-{i}: {i}\r\n" for i in range(90)) + "\r\n",
    "bare line ends before": f"\r\nGET /app HTTP/1.1\r\n{CLOSE}\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_request_is_seen_and_answered_as_by_uvicorn(pair: tuple[Address, Address], name: str) -> None:
    raw = REQUESTS[name].encode("latin-1")
    methods = raw.lstrip().split(b" ")[0].decode()
    here, there = (exchange(address, raw, methods) for address in pair)
    assert [seen(a, pair[0]) for a in here] == [seen(a, pair[1]) for a in there]


@pytest.mark.parametrize("name", ["plain", "query", "escaped path", "post", "absolute form"])
def test_root_path_stands_before_path_and_prefix(rooted: tuple[Address, Address], name: str) -> None:
    raw = REQUESTS[name].encode("latin-1")
    here, there = (exchange(address, raw) for address in rooted)
    assert [seen(a, rooted[0]) for a in here] == [seen(a, rooted[1]) for a in there]


def test_request_id_is_returned_and_one_is_made(pair: tuple[Address, Address]) -> None:
    (given,) = exchange(pair[0], REQUESTS["own request id"].encode())
    assert given.all("x-request-id") == ["given"]
    (made,) = exchange(pair[0], REQUESTS["plain"].encode())
    assert len(made.all("x-request-id")[0]) == 36
    assert made.all("x-request-id")[0].encode() in made.body


def test_pipelined_requests_are_answered_in_order(pair: tuple[Address, Address]) -> None:
    raw = b"".join(
        f"POST /app?n={n} HTTP/1.1\r\n{HOST}content-length: 1\r\n\r\n{n}".encode() for n in range(5)
    ) + REQUESTS["plain"].encode()  # fmt: skip
    here, there = (exchange(address, raw, "POST " * 5 + "GET") for address in pair)
    assert len(here) == 6
    assert [seen(a, pair[0]) for a in here] == [seen(a, pair[1]) for a in there]


def test_expect_continue_gets_its_interim_answer(pair: tuple[Address, Address]) -> None:
    raw = f"POST /app HTTP/1.1\r\n{CLOSE}expect: 100-continue\r\ncontent-length: 2\r\n\r\nhi".encode()
    here, there = (exchange(address, raw, "POST") for address in pair)
    assert [a.status for a in here] == [a.status for a in there] == [100, 200]
    assert seen(here[1], pair[0]) == seen(there[1], pair[1])


def test_http_1_0_keeps_no_connection_but_1_1_does(pair: tuple[Address, Address]) -> None:
    old = b"GET /app HTTP/1.0\r\nhost: h\r\n\r\n"
    assert [len(exchange(address, old + old)) for address in pair] == [1, 1]
    new = f"GET /app HTTP/1.1\r\n{HOST}\r\n".encode()
    assert [len(exchange(address, new + REQUESTS["plain"].encode())) for address in pair] == [2, 2]


def test_trailers_are_read_and_left_out(pair: tuple[Address, Address]) -> None:
    head = f"PUT /app HTTP/1.1\r\n{CLOSE}transfer-encoding: chunked\r\n\r\n"
    (answer,) = exchange(pair[0], f"{head}2\r\nhi\r\n0\r\nx-t: 1\r\n\r\n".encode(), "PUT")
    body = json.loads(answer.body)
    assert (body["body"], "x-t" in dict(body["headers"])) == ("hi", False)


@pytest.mark.parametrize("target", ["/app/<", "/app?a=<", '/app?a="', "/app/`"])
def test_target_that_a_uri_forbids_is_refused(pair: tuple[Address, Address], target: str) -> None:
    """A difference: uvicorn's parser lets these through."""
    raw = f"GET {target} HTTP/1.1\r\n{CLOSE}\r\n".encode()
    assert [[a.status for a in exchange(address, raw)] for address in pair] == [[400], [200]]


MALFORMED = {
    "no version": b"GET /app\r\n\r\n",
    "bad version": b"GET /app HTTP/9.9\r\nhost: h\r\n\r\n",
    "no method": b"/app HTTP/1.1\r\nhost: h\r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "header without colon": b"GET /app HTTP/1.1\r\nhost: h\r\nbroken\r\n\r\n",
    "space before colon": b"GET /app HTTP/1.1\r\nhost: h\r\nx-a : 1\r\n\r\n",
    "control in value": b"GET /app HTTP/1.1\r\nhost: h\r\nx-a: \x01\r\n\r\n",
    "zero in value": b"GET /app HTTP/1.1\r\nhost: h\r\nx-a: a\x00b\r\n\r\n",
    "negative length": b"POST /app HTTP/1.1\r\nhost: h\r\ncontent-length: -1\r\n\r\n",
    "length not a number": b"POST /app HTTP/1.1\r\nhost: h\r\ncontent-length: abc\r\n\r\n",
    "two lengths": b"POST /app HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "bad chunk size": b"POST /app HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nhost: h\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_refused_and_its_connection_closed(pair: tuple[Address, Address], name: str) -> None:
    assert [answer.status for answer in exchange(pair[0], MALFORMED[name])] == [400]


def test_oversized_head_is_refused(pair: tuple[Address, Address]) -> None:
    raw = b"GET /app HTTP/1.1\r\nhost: h\r\nx-a: " + b"x" * 100_000 + b"\r\n\r\n"
    assert [answer.status for answer in exchange(pair[0], raw)] == [431]


@pytest.mark.parametrize("path", ["/app", "/nowhere"])
@pytest.mark.parametrize("size", [1_000, 100_000, 5_000_000])
def test_unread_upload_neither_loses_the_answer_nor_the_connection(size: int, path: str) -> None:
    async def ignore(request: Any) -> str:
        return "ignored"

    with ours(ignore, "/app") as here:
        raw = f"POST {path} HTTP/1.1\r\n{HOST}content-length: {size}\r\n\r\n".encode() + b"x" * size
        status = 200 if path == "/app" else 404
        assert [a.status for a in exchange(here, raw + REQUESTS["plain"].encode(), "POST GET")] == [status, 200]


def test_upload_that_waits_for_its_permission_is_refused_without_asking_for_it(pair: tuple[Address, Address]) -> None:
    async def ignore(request: Any) -> str:
        return "ignored"

    with ours(ignore, "/app") as here:
        raw = f"POST /nowhere HTTP/1.1\r\n{HOST}expect: 100-continue\r\ncontent-length: 900000\r\n\r\n".encode()
        assert [a.status for a in exchange(here, raw)] == [404]


ASKED: list[str] = []
# Those that show ports or order, that confuse uvicorn, and that wait for the end.
UNASKABLE = {"scope", "mapping", "other method", "after body", "half received", "reborn"}


async def questioned(request: Any) -> list[str]:
    return [ascii(await ask(request, question)) for question in ASKED]


@pytest.fixture(scope="module")
def questioned_pair() -> Iterator[tuple[Address, Address]]:
    with ours(questioned, PREFIX, ROOT) as here, theirs(questioned, PREFIX, ROOT) as there:
        yield here, there


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(heads, st.lists(st.sampled_from(sorted(QUESTIONS.keys() - UNASKABLE)), min_size=1, max_size=5))
def test_native_request_answers_any_sequence_of_questions_as_starlette(
    questioned_pair: tuple[Address, Address], head: PlainHead, questions: list[str]
) -> None:
    """The property of test_request.py, for requests that really came."""
    ASKED[:] = questions
    body = b"".join(head.chunks)
    headers = sorted(head.headers_in, key=lambda header: header[0])  # ours come together by name
    lines = [b"%s: %s" % (name, value.strip()) for name, value in headers if is_sent(name, value)]
    target = b"/app" + (head.target if head.target != b"/" else b"") + b"?a=1&b=%C3%A9"
    sent = b"%s %s HTTP/1.1\r\nconnection: close\r\nx-request-id: i\r\ncontent-length: %d\r\n%s\r\n%s" % (
        head.method.encode(), target, len(body), b"".join(line + b"\r\n" for line in lines), body,
    )  # fmt: skip
    here, there = (exchange(address, sent, head.method) for address in questioned_pair)
    assert [neutral(a, questioned_pair[0]) for a in here] == [neutral(a, questioned_pair[1]) for a in there]


def is_sent(name: bytes, value: bytes) -> bool:
    return name != b"x-request-id" and not any(byte < 32 or byte == 127 for byte in value)


def neutral(answer: Answer, address: Address) -> Any:
    """Without the ports."""
    text = answer.body.replace(str(address[1]).encode(), b"PORT")
    return answer.status, re.sub(rb"port=\d+", b"port", text)
