"""`DAGDriver` over HTTP: adapters, routes, what is answered to whom."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from fastapi import Header, HTTPException
from pydantic import BaseModel
from ray import cloudpickle
from starlette.requests import Request

from rayserve_fast import http_adapters, serve
from rayserve_fast.classic.driver import _direct
from rayserve_fast.dag import InputNode
from rayserve_fast.drivers import DAGDriver
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica.portable import PortableHead, rebuild

light = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=20)


@light
async def look(request: Any) -> dict[str, Any]:
    assert isinstance(request, Request)
    return {
        "method": request.method,
        "path": request.url.path,
        "query": dict(request.query_params),
        "header": request.headers.get("x-test"),
        "client": request.client is not None,
        "user": request.path_params.get("user"),
        "size": len(await request.body()),
        "sum": sum(await request.body()),
    }


@light
def describe(value: Any) -> Any:
    return {"type": type(value).__name__, "value": value}


@light
def same(value: Any) -> Any:
    return value


class Item(BaseModel):
    name: str
    size: int = 1


def by_query(size: int, x_user: str = Header("nobody")) -> Any:
    if size > 9:
        raise HTTPException(418, "too large")
    return [size, x_user]


async def refusing(request: Request) -> Any:
    raise HTTPException(409, "not now", {"x-why": "tests"})


@pytest.fixture(scope="module")
def base(serve_url: str) -> Iterator[str]:
    with InputNode() as inp:
        looked, described, echoed = look.bind(inp), describe.bind(inp), same.bind(inp)
        twice = same.bind(same.bind(inp))
    driver = DAGDriver.options(ray_actor_options={"num_cpus": 0})
    graphs = {
        "request": driver.bind(looked),
        "json": driver.bind(described, http_adapter="ray.serve.http_adapters.json_request"),
        "echo": driver.bind(echoed, http_adapter=http_adapters.json_request),
        "array": driver.bind(described, http_adapter=http_adapters.json_to_ndarray),
        "query": driver.bind(described, http_adapter=by_query),
        "model": driver.bind(described, http_adapter=Item),
        "refusing": driver.bind(described, http_adapter=refusing),
        "routes": driver.bind({"/a": described, "/b/c": twice}, http_adapter=http_adapters.json_request),
        "patterns": driver.bind({"/users/{user}": looked}),
    }
    serve.run_many([serve.RunTarget(graph, name, f"/{name}") for name, graph in graphs.items()])
    yield serve_url
    for name in graphs:
        serve.delete(name)


def test_without_an_adapter_the_request_itself_travels(base: str) -> None:
    answer = requests.post(f"{base}/request/below?a=1", data=b"\x01\x02", headers={"x-test": "yes"}, timeout=20)
    assert answer.json() == {
        "method": "POST",
        "path": "/request/below",
        "query": {"a": "1"},
        "header": "yes",
        "client": True,
        "user": None,
        "size": 2,
        "sum": 3,
    }
    large = requests.post(f"{base}/request", data=b"\x01" * 3_000_000, timeout=20).json()
    assert (large["size"], large["sum"]) == (3_000_000, 3_000_000)


def test_answers_are_json_whatever_they_are(base: str) -> None:
    for value in ("text", None, 1.5, {"a": [1, None]}, [], True):
        answer = requests.post(f"{base}/echo", data=json.dumps(value), timeout=20)
        assert answer.json() == value
        assert answer.headers["content-type"] == "application/json"


def test_json_request_takes_any_json_and_refuses_what_is_none(base: str) -> None:
    assert requests.post(f"{base}/json", json=[1], timeout=20).json() == {"type": "list", "value": [1]}
    answer = requests.post(f"{base}/json", data=b"{", timeout=20)
    assert answer.status_code == 400
    assert "The body is no JSON" in answer.json()["detail"]


def test_only_get_and_post_are_answered(base: str) -> None:
    answer = requests.put(f"{base}/json", json=1, timeout=20)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")


def test_fastapi_fills_the_parameters_of_an_adapter(base: str) -> None:
    answer = requests.get(f"{base}/query", params={"size": 3}, headers={"x-user": "me"}, timeout=20)
    assert answer.json() == {"type": "list", "value": [3, "me"]}
    assert requests.get(f"{base}/query", params={"size": "x"}, timeout=20).status_code == 422
    assert requests.get(f"{base}/query", params={"size": 10}, timeout=20).status_code == 418
    item = requests.post(f"{base}/model", json={"name": "n"}, timeout=20)
    assert item.json() == {"type": "Item", "value": {"name": "n", "size": 1}}
    array = requests.post(f"{base}/array/any/path", json={"array": [1, 2], "dtype": "float32"}, timeout=20)
    assert array.json() == {"type": "ndarray", "value": [1.0, 2.0]}


def test_an_adapter_may_refuse(base: str) -> None:
    answer = requests.get(f"{base}/refusing", timeout=20)
    assert (answer.status_code, answer.json(), answer.headers["x-why"]) == (409, {"detail": "not now"}, "tests")


def test_several_routes(base: str) -> None:
    assert requests.post(f"{base}/routes/a", json=1, timeout=20).json() == {"type": "int", "value": 1}
    assert requests.post(f"{base}/routes/b/c", json=2, timeout=20).json() == 2
    for path in ("", "/b", "/a/below"):
        assert requests.post(f"{base}/routes{path}", json=2, timeout=20).status_code == 404
    found = requests.post(f"{base}/patterns/users/7", timeout=20).json()
    assert (found["path"], found["user"]) == ("/patterns/users/7", "7")
    assert requests.post(f"{base}/patterns/users", timeout=20).status_code == 404
    handle = serve.get_app_handle("routes")
    assert handle.predict_with_route.remote("/b/c", "x").result(timeout_s=20) == "x"
    with pytest.raises(RayServeException, match=r"call predict_with_route.* '/a', '/b/c'\."):
        handle.predict.remote(1).result(timeout_s=20)
    with pytest.raises(RayServeException, match="'/c' does not exist in dags routes: there are '/a', '/b/c'"):
        handle.predict_with_route.remote("/c", 1).result(timeout_s=20)


def test_adapters_that_need_no_fastapi_do_without() -> None:
    def typed(request: Request) -> None: ...
    def nothing() -> None: ...
    def query(request: int) -> None: ...
    def untyped(request) -> None: ...  # type: ignore[no-untyped-def]

    direct = [typed, nothing, http_adapters.json_request, http_adapters.pandas_read_json]
    assert all(_direct(adapter) is not None for adapter in direct)
    through = [query, untyped, Item, http_adapters.json_to_ndarray, http_adapters.image_to_ndarray]
    assert all(_direct(adapter) is None for adapter in through)


def test_a_sync_adapter_does_not_hold_up_the_loop() -> None:
    seen: list[bool] = []

    def blocking(request: Request) -> Any:
        seen.append(asyncio._get_running_loop() is None)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(timeout=10)  # which the loop runs meanwhile
        return request.method

    def nothing() -> str:
        seen.append(asyncio._get_running_loop() is None)
        return "nothing"

    async def inputs() -> list[Any]:
        nonlocal loop
        loop = asyncio.get_running_loop()
        adapters = [_direct(blocking), _direct(nothing), _direct(http_adapters.json_request)]
        return [await adapter(request_of(b"[1]")) for adapter in adapters if adapter is not None]

    loop: Any = None
    assert asyncio.run(inputs()) == ["POST", "nothing", [1]]
    assert seen == [True, True]


def test_adapters_are_plain_functions_too() -> None:
    arrays = http_adapters.json_to_multi_ndarray({"a": http_adapters.NdArray(array=[[1]], dtype="int8")})
    assert (arrays["a"].dtype, arrays["a"].tolist()) == (np.int8, [[1]])
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (3, 2), (255, 0, 0)).save(file, "PNG")
    pixels = http_adapters.image_to_ndarray(file.getvalue())
    assert (pixels.shape, pixels[0, 0].tolist()) == ((2, 3, 3), [255, 0, 0])


def test_pandas_read_json_takes_its_options_from_the_query() -> None:
    pytest.importorskip("pandas")
    request = request_of(b'[{"a": 1}, {"a": 2}]', b"orient=records")
    table = asyncio.run(http_adapters.pandas_read_json(request))
    assert table["a"].tolist() == [1, 2]


def request_of(body: bytes, query: bytes = b"") -> Request:
    parts = ["POST", "/x", b"/x", query, "", [(b"a", b"b")], ("c", 1), None, "http", "1.1", {"n": 7}]
    return rebuild(parts, body)


def test_a_request_that_was_sent_on_is_a_request() -> None:
    async def pieces(request: Request) -> list[bytes]:
        return [piece async for piece in request.stream()]

    request = cloudpickle.loads(cloudpickle.dumps(request_of(b"[1]", b"q=1")))
    assert (request.method, request.url.path, request.query_params["q"]) == ("POST", "/x", "1")
    assert (request.headers["a"], request.path_params) == ("b", {"n": 7})
    assert asyncio.run(request.json()) == [1]
    again = cloudpickle.loads(cloudpickle.dumps(request))  # its scope has been built meanwhile
    assert (again.url.path, again.path_params, asyncio.run(again.body())) == ("/x", {"n": 7}, b"[1]")
    assert asyncio.run(pieces(request_of(b"body"))) == [b"body", b""]
    assert not asyncio.run(request.is_disconnected())


def test_a_damaged_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="malformed request head"):
        _ = rebuild(b"no head", b"").method


def test_a_request_whose_body_is_not_there_cannot_be_sent() -> None:
    from rayserve_fast.replica.request import Request as Ours

    class Arriving(PortableHead):
        body = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"await request.body\(\)"):
        pickle.dumps(Ours(Arriving(b"", b"")))


def test_the_driver_is_a_deployment_with_options() -> None:
    assert DAGDriver.name == "DAGDriver"
    changed = DAGDriver.options(name="Other", num_replicas=2, route_prefix="/other")
    assert type(changed) is type(DAGDriver)
    assert (changed.name, changed.num_replicas, changed.route_prefix) == ("Other", 2, "/other")
