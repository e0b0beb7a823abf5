"""Answers in pieces: windows, fairness, disconnect, ASGI rules."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
import wire_client as wire
from starlette.requests import Request as StarletteRequest
from starlette.responses import StreamingResponse
from worker_gate import fresh_gate, gate  # noqa: F401 - a fixture
from worker_replica import serving

WINDOW = 256 * 1024


def test_items_that_come_together_share_a_frame() -> None:
    async def handler() -> Any:
        async def items() -> Any:
            for number in range(200):
                yield b"%03d;" % number

        return StreamingResponse(items())

    with serving(handler) as replica:
        answer = replica.link().get()
        assert answer.body == b"".join(b"%03d;" % number for number in range(200))
        assert len(answer.frames) < 100


def test_an_item_that_took_long_to_make_is_not_held_back_for_the_next() -> None:
    async def handler() -> Any:
        async def items() -> Any:
            for number in range(3):
                time.sleep(0.002)  # without letting the loop go round
                yield b"%d;" % number

        return StreamingResponse(items())

    with serving(handler) as replica:
        chunks = [frame.payload for frame in replica.link().get().frames if frame.kind == wire.CHUNK]
        assert [chunk for chunk in chunks if chunk] == [b"0;", b"1;", b"2;"]


def test_an_error_behind_items_of_the_same_moment_comes_after_them() -> None:
    async def handler() -> Any:
        async def items() -> Any:
            yield b"one"
            raise ValueError("at once")

        return StreamingResponse(items())

    with serving(handler) as replica:
        answer = replica.link().get()
        assert (answer.status, answer.body) == (200, b"one")
        assert (answer.last.kind, answer.last.aux) == (wire.ERROR, wire.ABORTED)


def test_an_answer_stops_at_the_window_and_goes_on_with_credit() -> None:
    async def handler() -> bytes:
        return b"z" * (3 * WINDOW)

    with serving(handler) as replica:
        link = replica.link()
        link.request(1)
        got = 0
        while got < WINDOW:
            frame = link.frame()
            got += len(frame.payload if frame.kind == wire.CHUNK else b"")
            assert len(frame.payload) <= 32768
        assert got == WINDOW
        assert link.silent(0.05)
        link.send(wire.WINDOW, 1, aux=WINDOW)
        while got < 2 * WINDOW:
            got += len(link.frame().payload)
        assert link.silent(0.05)
        link.send(wire.WINDOW, 1, aux=WINDOW)
        assert got + len(link.answer(1).body) == 3 * WINDOW


def test_a_long_answer_does_not_block_a_short_one() -> None:
    async def handler(request: Any) -> bytes:
        return b"z" * 4_000_000 if request.query_params else b"short"

    with serving(handler) as replica:
        link = replica.link()
        link.request(1, query="long=1")
        link.request(2)
        assert link.answer(2).body == b"short"
        assert len(link.answer(1).body) == 4_000_000


def test_send_suspends_while_nobody_reads() -> None:
    class Streams:
        sent = 0

        async def __call__(self) -> Any:
            async def items() -> Any:
                for _ in range(100):
                    Streams.sent += 1
                    yield b"x" * 65536

            return StreamingResponse(items())

        async def count(self) -> int:
            return Streams.sent

    with serving(Streams) as replica:
        link = replica.link()
        link.request(1)
        while not link.silent(0.1):
            link._late.clear()
        link.call(2, "count")
        sent = wire.value(link.answer(2).last.payload)
        assert 4 <= sent <= 8  # type: ignore[operator]
        link.send(wire.WINDOW, 1, aux=WINDOW)
        assert len(link.answer(1).body) == 100 * 65536 - WINDOW


async def short_or_until_let_go(request: Any) -> Any:
    if request.query_params:
        return "short"

    async def items() -> Any:
        while not gate.release.is_set():
            time.sleep(0.0005)  # holds the loop's thread
            yield b"item"

    return StreamingResponse(items())


@pytest.mark.usefixtures("fresh_gate")
def test_a_generator_that_never_suspends_streams_and_lets_others_run() -> None:
    with serving(short_or_until_let_go) as replica:
        link = replica.link()
        link.request(1)
        assert link.frame().kind == wire.RESPONSE, "the first item waits for no other"
        link.request(2, query="short=1")
        while (frame := link.frame()).stream != 2:
            link.send(wire.WINDOW, 1, aux=len(frame.payload))
        gate.release.set()
        link.answer(1)


async def late_item() -> Any:
    async def items() -> Any:
        await asyncio.to_thread(gate.release.wait, 10)
        yield b"late"

    return StreamingResponse(items(), headers={"x-early": "1"})


@pytest.mark.usefixtures("fresh_gate")
def test_the_head_goes_out_before_the_first_item_exists() -> None:
    with serving(late_item) as replica:
        link = replica.link(timeout=5.0)
        link.request(1)
        head = link.frame()
        assert (head.kind, head.fin) == (wire.RESPONSE, False)
        gate.release.set()
        assert link.answer(1).body == b"late"


def test_a_disconnect_cancels_a_stream_where_it_is() -> None:
    class Streams:
        ended = ""

        async def __call__(self) -> Any:
            async def items() -> Any:
                try:
                    while True:
                        yield b"tick"
                        await asyncio.sleep(0.01)
                except BaseException as error:
                    Streams.ended = type(error).__name__
                    raise

            return StreamingResponse(items())

        async def how(self) -> str:
            return Streams.ended

    with serving(Streams) as replica:
        link = replica.link()
        link.request(1)
        assert link.frame().kind == wire.RESPONSE
        link.send(wire.CANCEL, 1)
        last = link.answer(1).last
        assert (last.kind, last.aux) == (wire.ERROR, wire.CANCELLED)
        link.call(2, "how")
        assert wire.value(link.answer(2).last.payload) in ("CancelledError", "GeneratorExit")
        assert replica.runtime.counters()["running"] == 0


def test_an_error_after_the_answer_has_begun_cuts_it() -> None:
    async def handler() -> Any:
        async def items() -> Any:
            yield b"one"
            await asyncio.sleep(0.01)
            raise ValueError("in the middle")

        return StreamingResponse(items())

    with serving(handler) as replica:
        answer = replica.link().get()
        assert answer.body == b"one"
        assert (answer.last.kind, answer.last.aux) == (wire.ERROR, wire.ABORTED)


class RawAsgi:
    """A bare ASGI application by what the query asks for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        what = scope["query_string"].decode()
        start = {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"1")]}
        if what == "scope":
            scope = {key: repr(value) for key, value in scope.items() if key != "headers"}
            await send(start)
            await send({"type": "http.response.body", "body": json.dumps(scope).encode()})
        elif what == "receive":
            first = await receive()
            try:
                await asyncio.wait_for(receive(), 0.02)
            except asyncio.TimeoutError:
                self.log.append("waits")
            await send(start)
            await send({"type": "http.response.body", "body": first["body"]})
            self.log.append((await receive())["type"])
            await self.show()
        elif what == "listen":
            await receive()
            listener = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            request = StarletteRequest(scope, receive)
            await send(start)
            await send({"type": "http.response.body", "body": b"1", "more_body": True})
            self.log.append(str([await request.is_disconnected() for _ in range(3)]))
            await send({"type": "http.response.body", "body": b"2"})
            self.log.append((await listener)["type"])
        elif what == "disconnect":
            await receive()
            try:
                message = await receive()
                self.log.append(message["type"])
            except asyncio.CancelledError:
                self.log.append("cancelled")
            try:
                await send(start)
            except OSError as error:
                self.log.append(type(error).__name__)
        elif what == "left":
            pieces = [await receive(), await receive()]
            self.log.append((await receive())["type"])
            await send(start)
            await send({"type": "http.response.body", "body": b"".join(piece["body"] for piece in pieces)})
        elif what == "twice":
            await send(start)
            await send(start)
        elif what == "nothing":
            pass
        elif what == "unfinished":
            await send(start)
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
        elif what == "injection":
            await send({**start, "headers": [(b"x-a", b"1\r\nset-cookie: a")]})
        elif what == "text":
            await send(start)
            await send({"type": "http.response.body", "body": "text"})
        elif what == "kinds":
            await send({**start, "headers": [[b"x-a", b"1"], (bytearray(b"x-b"), b"2")]})
            await send({"type": "http.response.body", "body": bytearray(b"a"), "more_body": True})
            await send({"type": "http.response.body", "body": memoryview(b"b")})
        elif what == "log":
            await send(start)
            await send({"type": "http.response.body", "body": json.dumps(self.log).encode()})

    async def show(self) -> None:
        await asyncio.sleep(0)


@pytest.fixture
def asgi(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A replica whose HTTP handler is the bare application."""
    from rayserve_fast.replica import runtime

    class Raw(RawAsgi):
        pass

    monkeypatch.setattr(
        runtime.ReplicaRuntime,
        "_http_handler",
        lambda self, user: runtime.HttpHandler("asgi", user.target.app, None),
    )
    with serving(Raw) as replica:
        yield replica


def test_the_scope_is_what_the_specification_says(asgi: Any) -> None:
    scope = json.loads(asgi.link().get(query="scope", path="/a%20b", root_path="/a").body)
    assert scope == {
        "type": "'http'",
        "asgi": "{'version': '3.0', 'spec_version': '2.4'}",
        "http_version": "'1.1'",
        "server": "('localhost', 8000)",
        "client": "('127.0.0.1', 5555)",
        "scheme": "'http'",
        "method": "'GET'",
        "root_path": "'/a'",
        "path": "'/a b'",
        "raw_path": "b'/a%20b'",
        "query_string": "b'scope'",
        "state": "{}",
    }


def test_receive_waits_after_the_body_until_the_response_is_complete(asgi: Any) -> None:
    link = asgi.link()
    assert link.get(1, b"hello", query="receive").body == b"hello"
    assert json.loads(link.get(2, query="log").body) == ["waits", "http.disconnect"]


def test_a_listener_for_the_disconnect_is_in_nobodys_way(asgi: Any) -> None:
    """What Server-Sent Events do: one task listens, another asks now and then."""
    link = asgi.link()
    assert link.get(1, query="listen").body == b"12"
    assert json.loads(link.get(2, query="log").body) == ["[False, False, False]", "http.disconnect"]


def test_after_a_disconnect_send_raises_oserror(asgi: Any) -> None:
    link = asgi.link()
    link.request(1, query="disconnect")
    link.send(wire.CANCEL, 1)
    assert link.answer(1).last.aux == wire.CANCELLED
    assert json.loads(link.get(2, query="log").body) == ["cancelled", "OSError"]


def test_a_request_that_goes_on_without_its_client_has_its_body_then_the_disconnect_and_may_answer(asgi: Any) -> None:
    link = asgi.link()
    link.request(1, fin=False, query="left")
    link.send(wire.BODY, 1, payload=b"he")
    link.send(wire.WINDOW, 1, flags=wire.LEFT)
    link.send(wire.BODY, 1, flags=wire.FIN, payload=b"llo")
    assert link.answer(1).body == b"hello"
    assert json.loads(link.get(2, query="log").body) == ["http.disconnect"]


@pytest.mark.parametrize("what", ["nothing", "injection", "twice"])
def test_an_application_that_breaks_the_rules_gets_500(asgi: Any, what: str) -> None:
    link = asgi.link()
    assert link.get(1, query=what).status == 500
    assert asgi.runtime.counters()["running"] == 0


@pytest.mark.parametrize("what", ["unfinished"])
def test_an_application_that_stops_half_way_cuts_its_answer(asgi: Any, what: str) -> None:
    last = asgi.link().get(1, query=what).last
    assert (last.kind, last.aux) == (wire.ERROR, wire.ABORTED)


def test_bytes_of_all_kinds_are_taken_and_text_is_not(asgi: Any) -> None:
    link = asgi.link()
    answer = link.get(1, query="kinds")
    assert (answer.body, answer.headers) == (b"ab", [(b"x-a", b"1"), (b"x-b", b"2")])
    assert link.get(2, query="text").status == 500
