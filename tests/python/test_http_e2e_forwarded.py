"""A client that came through a reverse proxy is who that proxy says, where uvicorn inside Ray Serve believes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from http_pair import Address, exchange, ours, theirs


async def who(request: Any) -> list[Any]:
    forwarded = [h[1].decode().strip() for h in request.scope["headers"] if h[0].startswith(b"x-forwarded")]
    return [request.url.scheme, list(request.client), forwarded, str(request.base_url).split(":")[0]]


@pytest.fixture(scope="module", params=[None, "*", "10.0.0.0/8,127.0.0.0/8", "10.0.0.1", "lb,127.0.0.1", ""])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Address, Address]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FORWARDED_ALLOW_IPS", raising=False)
        if request.param is not None:
            patch.setenv("FORWARDED_ALLOW_IPS", request.param)
        with ours(who) as here, theirs(who) as there:
            yield here, there


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["X-Forwarded-Proto: https"],
        ["X-Forwarded-Proto: HTTPS"],
        ["X-Forwarded-Proto: http"],
        ["X-Forwarded-Proto: gopher"],
        ["X-Forwarded-Proto: http", "X-Forwarded-Proto: https"],
        ["X-Forwarded-For: 1.2.3.4"],
        ["X-Forwarded-For: 6.6.6.6, 1.2.3.4:99, 10.0.0.1,127.0.0.1", "X-Forwarded-Proto: https"],
        ["X-Forwarded-For: 6.6.6.6, 1.2.3.4", "X-Forwarded-For: 10.0.0.1"],
        ["X-Forwarded-For: 127.0.0.1, 10.0.0.1"],
        ["X-Forwarded-For: [2001:db8::1]:443", "X-Forwarded-Proto: https"],
        ["X-Forwarded-For: 2001:db8::1"],
        ["X-Forwarded-For: unknown, lb"],
        ["X-Forwarded-For:"],
        ["X-Forwarded-For: , "],
        ["X-Forwarded-Host: example.com", "X-Forwarded-Prefix: /p"],
    ],
)
def test_scheme_and_client_are_those_that_uvicorn_finds(pair: tuple[Address, Address], headers: list[str]) -> None:
    sent = "\r\n".join(["GET / HTTP/1.1", "host: h", "connection: close", *headers, "", ""]).encode()
    here, there = ([*json.loads(exchange(address, sent)[0].body)] for address in pair)
    for seen in (here, there):
        if seen[1][0] == "127.0.0.1":
            seen[1][1] = "any port"
    assert here == there
