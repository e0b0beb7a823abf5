"""Routes that are patterns: the proxy finds what Starlette's router finds, and handlers get it typed."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from http_pair import Address, ours
from starlette.requests import Request
from starlette.routing import compile_path

PATTERNS = [
    "/text/{name}",
    "/int/{n:int}",
    "/float/{n:float}",
    "/uuid/{id:uuid}",
    "/rest/{where:path}",
    "/two/{user_id:int}/{number:float}",
    "/part/v{major:int}.{minor:int}",
    "/greedy/{a}-{b}",
    "/dots/{a:float}.{b}",
    "/literal",
    "/braces/{1}/{a b}",
]
UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
PATHS = [
    "/text/ada", "/text/", "/text/a/b", "/text/%C3%A9%20x", "/text/a%2Fb", "/text/a%0A", "/text",
    "/int/0", "/int/007", "/int/123456789012345678901234567890", "/int/-1", "/int/1.0", "/int/x", "/int/",
    "/float/3.14", "/float/3", "/float/3.", "/float/.5", "/float/1e5",
    f"/uuid/{UUID}", f"/uuid/{UUID.replace('-', '').upper()}", f"/uuid/{UUID}0",
    "/rest/", "/rest/a/b/c", "/rest",
    "/two/123/3.14", "/two/123/x", "/two/123",
    "/part/v1.22", "/part/v1", "/part/1.2",
    "/greedy/1-2-3", "/greedy/-", "/greedy/--",
    "/dots/1.2.3", "/dots/1.2", "/dots/1.x",
    "/literal", "/literal/", "/literal/x",
    "/braces/%7B1%7D/%7Ba%20b%7D",
]  # fmt: skip


async def echo(request: Request) -> dict[str, Any]:
    """What both views of the parameters say, with types that JSON does not have."""
    params = request.path_params
    typed = {name: [type(value).__name__, str(value)] for name, value in params.items()}
    return {"typed": typed, "same": request.scope.get("path_params") is params, "root_path": request.scope["root_path"]}


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with ours(echo, routes=[{"prefix": pattern, "pattern": True} for pattern in PATTERNS]) as address:
        yield address


def ask(address: Address, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    return response, response.read()


def by_starlette(path: str) -> dict[str, list[str]] | None:
    for pattern in PATTERNS:
        regex, _, convertors = compile_path(pattern)
        if (match := regex.match(path)) is not None:
            found = {name: convertors[name].convert(text) for name, text in match.groupdict().items()}
            return {name: [type(value).__name__, str(value)] for name, value in found.items()}
    return None


@pytest.mark.parametrize("path", PATHS)
def test_a_path_has_the_parameters_that_starlettes_router_finds(address: Address, path: str) -> None:
    from urllib.parse import unquote

    expected = by_starlette(unquote(path))
    response, body = ask(address, path)
    if expected is None:
        assert response.status == 404, body
        return
    assert response.status == 200, body
    answer = json.loads(body)
    assert answer["typed"] == expected
    assert answer["root_path"] == ""
    assert answer["same"] == bool(expected)


def test_types_are_pythons() -> None:
    def types(request: Request) -> list[bool]:
        found = request.path_params
        return [found["i"] == 1, found["f"] == 2.5, found["u"] == uuid.UUID(UUID), found["s"] == "x"]

    with ours(types, routes=[{"prefix": "/{i:int}/{f:float}/{u:uuid}/{s}", "pattern": True}]) as address:
        assert json.loads(ask(address, f"/1/2.5/{UUID}/x")[1]) == [True] * 4


def test_an_asgi_application_finds_the_parameters_in_its_scope() -> None:
    from fastapi import FastAPI

    from rayserve_fast.ingress import ingress

    app = FastAPI()

    @app.get("/{rest:path}")
    def params(request: Request) -> dict[str, Any]:
        return request.path_params

    @ingress(app)
    class Ingress:
        pass

    with ours(Ingress, routes=[{"prefix": "/a/{n:int}", "pattern": True}]) as address:
        assert json.loads(ask(address, "/a/7")[1]) == {"n": 7, "rest": "a/7"}


def test_only_the_routes_methods_are_let_through() -> None:
    def method(request: Request) -> str:
        return request.method

    routes = [
        {"prefix": "/get", "pattern": True, "methods": ["GET"]},
        {"prefix": "/both/{n:int}", "pattern": True, "methods": ["GET", "POST"]},
        {"prefix": "/prefix", "methods": ["POST"]},
    ]
    with ours(method, routes=routes) as address:
        assert ask(address, "/get")[1] == b"GET"
        assert ask(address, "/get", "HEAD")[0].status == 200
        assert ask(address, "/both/1", "POST")[1] == b"POST"
        assert ask(address, "/prefix/x", "POST")[1] == b"POST"
        response, body = ask(address, "/both/1", "PUT")
        assert (response.status, response.headers["allow"]) == (405, "GET, POST")
        assert body == b"Methods PUT not allowed. Available HTTP methods are ['GET', 'POST']."
        assert ask(address, "/prefix", "HEAD")[0].status == 405


def test_the_table_of_routes_shows_labels_where_there_are_some() -> None:
    routes = [
        {"prefix": "/app"},
        {"prefix": "/simple", "pattern": True, "methods": ["GET"], "label": ["simple_endpoint", ["GET"]]},
    ]
    with ours(echo, routes=routes) as address:
        table = json.loads(ask(address, "/-/routes")[1])
    assert table == {"/app": "default", "/simple": ["simple_endpoint", ["GET"]]}
