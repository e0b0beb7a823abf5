"""ASGI applications that use the protocol's corners, or break it, get what uvicorn gives them."""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from http_pair import Address, Answer, exchange, ours, theirs

from rayserve_fast.ingress import ingress

START = {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"1")]}
END = {"type": "http.response.body", "body": b"end"}


def sends(*messages: Any) -> Callable[..., Any]:
    async def app(receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


def piece(body: Any, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def fails_first(receive: Any, send: Any) -> None:
    raise ValueError


async def fails_after_start(receive: Any, send: Any) -> None:
    await send(START)
    raise ValueError


async def fails_after_piece(receive: Any, send: Any) -> None:
    await send(START)
    await send(piece(b"x"))
    await asyncio.sleep(0.01)
    raise ValueError


async def fails_after_end(receive: Any, send: Any) -> None:
    await send(START)
    await send(END)
    raise ValueError


async def is_cancelled_by_itself(receive: Any, send: Any) -> None:
    raise asyncio.CancelledError


async def reads_after_answering(receive: Any, send: Any) -> None:
    await send(START)
    await send(piece(b"a"))
    while (message := await receive()).get("more_body"):
        pass
    await send(piece(message["body"][:3], False))


async def receives_after_the_end(receive: Any, send: Any) -> None:
    await receive()
    await send(START)
    await send(END)
    assert (await receive())["type"] == "http.disconnect"


async def answers_in_another_task(receive: Any, send: Any) -> None:
    async def answer() -> None:
        await send(START)
        await send(END)

    await asyncio.create_task(answer())


async def sends_without_awaiting_in_between(receive: Any, send: Any) -> None:
    await asyncio.gather(send(START), send(piece(b"1")), send(piece(b"2")), send(piece(b"3", False)))


APPS: dict[str, Callable[..., Any]] = {
    "usual": sends(START, END),
    "no headers": sends({"type": "http.response.start", "status": 200}, END),
    "no body": sends(START, {"type": "http.response.body"}),
    "status enum": sends({**START, "status": http.HTTPStatus.CREATED}, END),
    "lists for pairs": sends({**START, "headers": [[b"x-b", b"2"], [b"X-Upper", b"3"]]}, END),
    "headers of a mapping": sends({**START, "headers": {b"x-1": b"v", b"x-2": b"v"}.items()}, END),
    "empty pieces": sends(START, piece(b""), piece(b"a"), piece(b""), piece(b"b"), piece(b"", False)),
    "bytearray": sends(START, piece(bytearray(b"ab")), piece(memoryview(b"cd"), False)),
    "latin-1 header": sends({**START, "headers": [(b"x-a", b"caf\xe9")]}, END),
    "fails first": fails_first,
    "fails after start": fails_after_start,
    "fails after a piece": fails_after_piece,
    "fails after the end": fails_after_end,
    "cancelled by itself": is_cancelled_by_itself,
    "returns without answering": sends(),
    "returns after start": sends(START),
    "returns after a piece": sends(START, piece(b"half")),
    "body first": sends(END),
    "two starts": sends(START, START, END),
    "unknown message": sends({"type": "http.response.nothing"}),
    "text for bytes": sends(START, {"type": "http.response.body", "body": "text"}),
    "header that splits": sends({**START, "headers": [(b"x-a", b"1\r\nx-b: 2")]}, END),
    "header name with blank": sends({**START, "headers": [(b"x a", b"1")]}, END),
    "reads after answering": reads_after_answering,
    "receives after the end": receives_after_the_end,
    "in another task": answers_in_another_task,
    "not one after the other": sends_without_awaiting_in_between,
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    await APPS[scope["path"][1:].replace("_", " ")](receive, send)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Address, Address]]:
    with ours(ingress(app)()) as here, theirs(app) as there:
        yield here, there


# A difference: nothing had been sent yet, so we can still say that it failed; uvicorn breaks off or says nothing.
WHOLE_FAILURES = {
    "fails after start",
    "returns after start",
    "two starts",
    "text for bytes",
    "header that splits",
    "header name with blank",
}
FRAMING = {"server", "date", "transfer-encoding", "content-length", "content-type", "connection", "x-request-id"}


def seen(answer: Answer) -> Any:
    return answer.status, [h for h in answer.headers if h[0] not in FRAMING], answer.body, answer.complete


@pytest.mark.parametrize("case", APPS)
def test_application_gets_what_uvicorn_gives_it(pair: tuple[Address, Address], case: str) -> None:
    target = case.replace(" ", "_")
    raw = f"POST /{target} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello".encode()
    here, there = (exchange(address, raw, "POST") for address in pair)
    if case in WHOLE_FAILURES:
        assert [(a.status, a.body, a.complete) for a in here] == [(500, b"Internal Server Error", True)]
        assert not any(a.complete for a in there)
    else:
        assert [seen(a) for a in here] == [seen(a) for a in there]


def test_connection_lives_on_after_a_failed_application(pair: tuple[Address, Address]) -> None:
    """A difference: uvicorn closes it."""
    raw = (
        b"GET /fails_first HTTP/1.1\r\nhost: h\r\n\r\n" + b"GET /usual HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
    )
    assert [answer.status for answer in exchange(pair[0], raw)] == [500, 200]
