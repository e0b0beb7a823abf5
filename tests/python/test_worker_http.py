"""Requests and results over the wire: heads, bodies, responses, errors, hostile frames."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import time
from typing import Any

import pytest
import wire_client as wire
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from worker_replica import TOKEN, serving


class Values:
    """Returns what the query asks for, in a coroutine."""

    RESULTS = {  # noqa: RUF012
        "none": None,
        "bytes": b"\x00\xff",
        "text": "gr\u00fc\u00dfe",
        "json": {"a": [1, 2.5, None]},
        "plain": PlainTextResponse("hi", status_code=201, headers={"x-a": "b"}),
        "jsonresponse": JSONResponse({"a": 1}),
        "big": "x" * 300_000,
        "bigbytes": b"y" * 1_000_000,
    }

    async def __call__(self, request: Any) -> Any:
        return self.RESULTS[request.query_params["q"]]


class SyncValues(Values):
    def __call__(self, request: Any) -> Any:  # type: ignore[override]
        return self.RESULTS[request.query_params["q"]]


@pytest.mark.parametrize("deployment", [Values, SyncValues])
@pytest.mark.parametrize(
    ("query", "status", "content_type", "body"),
    [
        ("none", 200, b"text/plain", b""),
        ("bytes", 200, b"text/plain", b"\x00\xff"),
        ("text", 200, b"text/plain; charset=utf-8", "gr\u00fc\u00dfe".encode()),
        ("json", 200, b"application/json", b'{"a":[1,2.5,null]}'),
        ("plain", 201, b"text/plain; charset=utf-8", b"hi"),
        ("jsonresponse", 200, b"application/json", b'{"a":1}'),
        ("big", 200, b"text/plain; charset=utf-8", b"x" * 300_000),
        ("bigbytes", 200, b"text/plain", b"y" * 1_000_000),
    ],
)
def test_results_become_responses(deployment: type, query: str, status: int, content_type: bytes, body: bytes) -> None:
    with serving(deployment) as replica:
        answer = replica.link().get(query=f"q={query}")
        assert (answer.status, dict(answer.headers)[b"content-type"]) == (status, content_type)
        assert answer.body == body
        assert replica.runtime.counters()["streams"] == 0


def test_every_part_of_the_head_arrives() -> None:
    async def handler(request: Any) -> dict[str, Any]:
        return {
            "method": request.method,
            "url": str(request.url),
            "path": request.scope["path"],
            "raw_path": request.scope["raw_path"].decode(),
            "root_path": request.scope["root_path"],
            "headers": [[name, value] for name, value in request.headers.items()],
            "client": list(request.client),
            "body": (await request.body()).decode(),
            "again": (await request.body()).decode(),
        }

    with serving(handler) as replica:
        answer = replica.link().get(
            body=b"content",
            method="POST",
            path="/p/%C3%A4%2Fb",
            query="a=1&b=%20",
            root_path="/p",
            https=True,
            headers=[("host", "example.com"), ("x-a", "1"), ("x-a", "\xe9")],
        )
    assert json.loads(answer.body) == {
        "method": "POST",
        "url": "https://example.com/p/\u00e4/b?a=1&b=%20",
        "path": "/p/\u00e4/b",
        "raw_path": "/p/%C3%A4%2Fb",
        "root_path": "/p",
        "headers": [["host", "example.com"], ["x-a", "1"], ["x-a", "\xe9"]],
        "client": ["127.0.0.1", 5555],
        "body": "content",
        "again": "content",
    }


def test_a_failing_handler_is_logged_and_answered_500(caplog: pytest.LogCaptureFixture) -> None:
    async def handler() -> None:
        raise ValueError("secret reason")

    with serving(handler) as replica, caplog.at_level(logging.ERROR, "ray.serve"):
        logging.getLogger("ray").propagate = True
        answer = replica.link().get(request_id="the-id")
    assert (answer.status, answer.body) == (500, b"Internal Server Error")
    assert "secret reason" in caplog.text
    assert "the-id" in caplog.text


def test_a_result_that_cannot_be_encoded_is_an_error_of_its_request_only() -> None:
    async def handler(request: Any) -> Any:
        return object() if request.query_params else "fine"

    with serving(handler) as replica:
        link = replica.link()
        assert link.get(1, query="a=1").status == 500
        assert link.get(2).body == b"fine"


async def gives_items(request: Any) -> Response:
    async def items() -> Any:
        for number in range(3):
            yield f"{number};"

    return StreamingResponse(items(), headers={"x-n": "3"})


def gives_items_sync(request: Any) -> Response:
    return StreamingResponse((f"{number};" for number in range(3)), headers={"x-n": "3"})


@pytest.mark.parametrize("handler", [gives_items, gives_items_sync])
def test_streaming_responses_stream(handler: Any) -> None:
    with serving(handler) as replica:
        answer = replica.link().get()
        assert answer.body == b"0;1;2;"
        assert (b"x-n", b"3") in answer.headers
        head, *chunks = answer.frames
        assert head.kind == wire.RESPONSE
        assert not head.fin
        assert {chunk.kind for chunk in chunks} == {wire.CHUNK}


def test_a_background_task_runs_after_the_answer_and_holds_its_slot() -> None:
    class Background:
        def __init__(self) -> None:
            self.started, self.release, self.log = asyncio.Event(), asyncio.Event(), []

        async def __call__(self) -> Response:
            return PlainTextResponse("done", background=BackgroundTask(self.later))

        async def later(self) -> None:
            self.log.append("later")
            await self.release.wait()

        async def finish(self) -> list[str]:
            self.release.set()
            return self.log

    with serving(Background) as replica:
        link = replica.link()
        assert link.get(1).body == b"done"
        assert replica.runtime.counters()["running"] == 1
        link.call(2, "finish")
        assert wire.value(link.answer(2).last.payload) == ["later"]
        replica.runtime.drain()
        assert replica.runtime.wait_idle(5)


def test_a_generator_result_is_an_error_that_says_what_to_return(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> Any:
        yield b"a"

    logging.getLogger("ray").propagate = True
    with serving(handler) as replica:
        assert replica.link().get().status == 500
    assert "StreamingResponse" in caplog.text


def test_a_bare_class_without_call_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Nothing:
        async def other(self) -> int:
            return 1

    logging.getLogger("ray").propagate = True
    with serving(Nothing) as replica:
        assert replica.link().get().status == 500
    assert "does not exist" in caplog.text


@pytest.mark.parametrize(
    "bytes_",
    [
        wire.frame(99, 1),
        wire.frame(wire.REQUEST, 1, flags=1, payload=b"\xff" * 40),
        wire.frame(wire.RESPONSE, 1),
        wire.frame(wire.CALL, 1, payload=b"\xff" * 10),
        wire.frame(wire.HELLO, 0),
        struct.pack("<IBBHII", 0xFFFFFFFF, wire.REQUEST, 0, 0, 1, 0),
    ],
    ids=["kind", "head", "direction", "call", "hello", "length"],
)
def test_hostile_frames_close_their_link_and_disturb_nothing_else(bytes_: bytes) -> None:
    async def handler() -> str:
        return "fine"

    with serving(handler) as replica:
        bad, good = replica.link(), replica.link()
        bad.sock.sendall(bytes_)
        with pytest.raises(wire.Refused):
            bad.frame()
        assert good.get().body == b"fine"
        assert replica.runtime.counters()["links"] == 1


def test_a_stream_id_that_is_open_cannot_be_used_again() -> None:
    async def handler() -> None:
        await asyncio.sleep(60)

    with serving(handler) as replica:
        link = replica.link()
        link.request(1)
        link.request(1)
        with pytest.raises(wire.Refused):
            link.frame()


def test_strangers_get_no_link() -> None:
    async def handler() -> str:
        return "fine"

    with serving(handler) as replica:
        assert replica.address.unix is not None
        with pytest.raises((wire.Refused, AssertionError)):
            wire.Link(replica.address.unix, "r1", b"another token")
        with pytest.raises(wire.Refused):
            wire.Link(replica.address.unix, "another replica", TOKEN)
        assert replica.link().get().body == b"fine"
        assert os.stat(replica.address.unix)


def test_a_link_that_does_not_prove_itself_is_closed_in_time() -> None:
    async def handler() -> str:
        return "fine"

    with serving(handler) as replica, socket.socket(socket.AF_UNIX) as silent:
        busy = replica.link()
        while not 0.5 < time.monotonic() * 1000 % 1 < 0.6:  # uvloop's timers know whole milliseconds only
            pass
        silent.connect(replica.address.unix)
        end = time.monotonic() + 2.1
        while time.monotonic() < end:  # a loop that is awake runs such a timer early
            busy.get()
        silent.settimeout(2)
        assert silent.recv(1) == b""


def test_tcp_links_are_the_same() -> None:
    async def handler() -> str:
        return "fine"

    with serving(handler) as replica:
        assert replica.address.tcp is not None
        link = wire.Link(replica.address.tcp, "r1", TOKEN)
        assert link.get().body == b"fine"
        link.close()


def test_frames_may_come_in_any_pieces() -> None:
    async def handler(request: Any) -> bytes:
        return await request.body()  # type: ignore[no-any-return]

    with serving(handler) as replica:
        link = replica.link()
        data = b"".join(
            wire.frame(wire.REQUEST, number, flags=wire.FIN, payload=wire.request_head() + b"%d" % number)
            for number in range(1, 4)
        )
        for at in range(0, len(data), 7):
            link.sock.sendall(data[at : at + 7])
        assert [link.answer(number).body for number in range(1, 4)] == [b"1", b"2", b"3"]


def test_pings_are_answered_with_their_number() -> None:
    async def handler() -> str:
        return "fine"

    with serving(handler) as replica:
        link = replica.link()
        link.send(wire.PING, aux=77)
        pong = link.frame()
        assert (pong.kind, pong.aux) == (wire.PONG, 77)


def test_an_error_outside_the_users_code_ends_one_request_and_gives_its_slot_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rayserve_fast.replica import responses

    async def handler(request: Any) -> str:
        if request.query_params:
            raise ValueError("of the user")
        return "fine"

    def broken(error: BaseException) -> Any:
        raise RuntimeError("no answer for this")

    monkeypatch.setattr(responses, "failure", broken)
    monkeypatch.setattr("sys.unraisablehook", lambda info: None)
    with serving(handler, max_ongoing_requests=1) as replica:
        link = replica.link()
        for _ in range(3):
            last = link.get(1, query="a=1").last
            assert (last.kind, last.aux) == (wire.ERROR, 1)
        assert link.get(2).body == b"fine"
