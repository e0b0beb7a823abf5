"""Requests' bodies in pieces: windows, one bytes object of many frames, readers that give up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import pytest
import wire_client as wire
from worker_gate import fresh_gate, gate  # noqa: F401 - a fixture
from worker_replica import serving

WINDOW = 512 * 1024


async def echo(request: Any) -> bytes:
    return await request.body()  # type: ignore[no-any-return]


async def counts(request: Any) -> list[int]:
    sizes = [len(chunk) async for chunk in request.stream()]
    return [sum(sizes), sum(1 for size in sizes if size)]


def send_body(link: wire.Link, stream: int, body: bytes, largest: int = 32768) -> None:
    """Sends BODY frames as the window allows."""
    window = WINDOW
    for at in range(0, len(body), largest):
        piece = body[at : at + largest]
        while window < len(piece):
            got = link.frame()
            assert got.kind == wire.WINDOW, got
            window += got.aux
        link.send(wire.BODY, stream, payload=piece)
        window -= len(piece)
    link.send(wire.BODY, stream, flags=wire.FIN)


@pytest.mark.parametrize("handler", [echo, counts])
def test_a_long_body_arrives_within_the_window(handler: Any) -> None:
    body = bytes(range(256)) * 8192  # 2 MiB
    with serving(handler) as replica:
        link = replica.link()
        link.request(1, fin=False, method="POST")
        send_body(link, 1, body)
        answer = link.answer(1)
        while answer.last.kind == wire.WINDOW:
            answer = link.answer(1)
        got = answer.body
        assert got == body if handler is echo else json.loads(got)[0] == len(body)


@pytest.mark.parametrize("largest", [32768, 256 * 1024])
@pytest.mark.parametrize("declared", [None, "right", "a lie"])
@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 5 * 1024 * 1024])
def test_a_body_in_pieces_is_one_bytes_object(size: int, declared: str | None, largest: int) -> None:
    """5 MiB is more than the memory that a declared length is believed for."""
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    length = str(size if declared == "right" else 10**13)
    with serving(echo) as replica:
        link = replica.link()
        link.request(1, fin=False, method="POST", headers=[("content-length", length)] if declared else [])
        send_body(link, 1, body, largest)
        answer = link.answer(1)
        while answer.last.kind == wire.WINDOW:
            answer = link.answer(1)
        assert answer.body == body


def test_bodies_of_several_requests_may_take_turns_frame_by_frame() -> None:
    bodies = {number: bytes([number]) * 200_000 for number in (1, 2, 3)}
    with serving(echo) as replica:
        link = replica.link()
        for number in bodies:
            link.request(number, fin=False, method="POST", headers=[("content-length", "200000")])
        for at in range(0, 200_000, 50_000):
            for number, body in bodies.items():
                link.send(wire.BODY, number, payload=body[at : at + 50_000])
        for number in bodies:
            link.send(wire.BODY, number, flags=wire.FIN)
        assert {number: link.answer(number).body for number in bodies} == bodies


def test_body_frames_may_be_split_anywhere() -> None:
    body = bytes(range(40))
    sent = wire.frame(wire.BODY, 1, payload=body[:25]) + wire.frame(wire.BODY, 1, payload=body[25:], flags=wire.FIN)
    with serving(echo) as replica:
        link = replica.link()
        for cut in range(1, len(sent)):
            link.request(1, fin=False, method="POST")
            link.sock.sendall(sent[:cut])
            time.sleep(0.001)
            link.sock.sendall(sent[cut:])
            assert link.answer(1).body == body


async def gives_up(request: Any) -> list[Any]:
    """Stops waiting for the body, then reads it in the way that the query says."""
    first = "nothing"
    with contextlib.suppress(asyncio.TimeoutError):
        first = len(await asyncio.wait_for(request.body(), 0.1))  # type: ignore[assignment]
    match request.url.query:
        case "again":
            return [first, len(await request.body())]
        case "both":
            return [first, *map(len, await asyncio.gather(request.body(), request.body()))]
        case _:
            return [first, sum([len(piece) async for piece in request.stream()])]


@pytest.mark.parametrize("cut", [30016, 40000], ids=["between frames", "within one"])
@pytest.mark.parametrize("how", ["again", "both", "stream"])
def test_a_body_that_one_stopped_waiting_for_is_whole_for_the_next(how: str, cut: int) -> None:
    with serving(gives_up) as replica:
        link = replica.link()
        link.request(1, fin=False, method="POST", query=how)
        sent = wire.frame(wire.BODY, 1, payload=b"x" * 30000) + wire.frame(wire.BODY, 1, payload=b"y" * 20000)
        link.sock.sendall(sent[:cut])
        assert link.silent(0.3)
        link.sock.sendall(sent[cut:])
        link.send(wire.BODY, 1, payload=b"z" * 1, flags=wire.FIN)
        assert json.loads(link.answer(1).body) == ["nothing"] + [50001] * (2 if how == "both" else 1)


async def gives_up_for_good(request: Any) -> None:
    try:
        await asyncio.wait_for(request.body(), 0.05)
    except asyncio.TimeoutError:
        gate.entered.set()
        await asyncio.sleep(60)


@pytest.mark.usefixtures("fresh_gate")
def test_a_body_that_nobody_waits_for_any_more_stops_at_the_window() -> None:
    with serving(gives_up_for_good) as replica:
        link = replica.link()
        link.request(1, fin=False, method="POST")
        assert gate.entered.wait(10)
        for _ in range(WINDOW // 32768):
            link.send(wire.BODY, 1, payload=bytes(32768))
        assert link.silent(0.1), "no window is given back"


def test_a_sender_that_exceeds_the_window_loses_its_link() -> None:
    async def handler() -> None:
        await asyncio.sleep(60)

    with serving(handler) as replica:
        link = replica.link()
        link.request(1, fin=False)
        link.sock.sendall(wire.frame(wire.BODY, 1, payload=bytes(32768)) * 17)
        with pytest.raises(wire.Refused):
            link.frame()
