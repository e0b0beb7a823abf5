"""What backends are given, and what they make of it: without Ray, over a proxy and a replica in this process."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from classic_replica import backend
from http_pair import ours

from rayserve_fast import serve
from rayserve_fast.classic.backend import CALL_METHOD, AsyncBackend, Backend, Method, SyncBackend
from rayserve_fast.classic.requests import HandleRequest
from rayserve_fast.classic.session import FLASK, STARLETTE
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica.portable import rebuild


def test_the_client_apis_backends_get_starlettes_request() -> None:
    async def echo(request: Any) -> Any:
        return [await request.json(), request.query_params["a"]]

    with backend(echo, STARLETTE, kind=AsyncBackend) as url:
        assert requests.post(f"{url}?a=1", json=[2]).json() == [[2], "1"]


def test_handlers_without_a_parameter_are_called_without_the_request() -> None:
    def plain() -> str:
        return "plain"

    for flavour in (FLASK, STARLETTE):
        with backend(plain, flavour) as url:
            assert requests.get(url).text == "plain"


class Several:
    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def __call__(self, request: Any) -> str:
        return f"{self.greeting} call"

    def other(self, request: Any) -> str:
        return f"{self.greeting} other"

    async def later(self, request: Any) -> str:
        await asyncio.sleep(0)
        return f"{self.greeting} later {serve.context.web}"

    def _hidden(self, request: Any) -> str:
        return "hidden"


class SeveralAsync(Several):
    async def __call__(self, request: Any) -> str:  # type: ignore[override]
        return f"{self.greeting} call"


@pytest.mark.parametrize(
    ("user", "kind"), [(Several, SyncBackend), (SeveralAsync, AsyncBackend)], ids=["sync", "async"]
)
@pytest.mark.parametrize("flavour", [FLASK, STARLETTE])
def test_a_header_picks_the_method_whether_it_is_sync_or_async(user: Any, kind: type[Backend], flavour: str) -> None:
    with backend(user, flavour, "hi", kind=kind) as url:

        def call(method: str) -> requests.Response:
            return requests.get(url, headers={"X-SERVE-CALL-METHOD": method})

        assert requests.get(url).text == "hi call"
        assert call("other").text == "hi other"
        assert call("later").text == "hi later True"
        for unknown in ("_hidden", "__init__", "nothing", "greeting"):
            answer = call(unknown)
            assert answer.status_code == 400
            assert answer.text == (
                f"The backend has no method '{unknown}' to call. Available methods: ['later', 'other']."
            )


def test_an_error_is_a_500() -> None:
    def fails(request: Any) -> None:
        raise KeyError("x")

    with backend(fails, FLASK) as url:
        answer = requests.get(url)
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")


def run_on_loop(user: Callable[..., Any], flavour: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """What an async backend makes of a call, inside a loop."""

    async def call() -> Any:
        made = AsyncBackend(user, (), flavour)
        return await made._run_async(name, *args, **kwargs)

    return asyncio.run(call())


def test_flask_backends_get_the_keyword_arguments_of_a_call() -> None:
    async def both(flask_request: Any, x: int = 0) -> Any:
        return [flask_request.data, flask_request.args.to_dict(), x, serve.context.web]

    async def kwargs_only(x: int) -> Any:
        return x

    async def keyword(*, x: int) -> Any:
        return x

    async def request_only(flask_request: Any) -> Any:
        return [flask_request.args["x"], flask_request.json, flask_request.method, flask_request.headers.get("A")]

    call = HandleRequest("data", {"x": 5})
    assert run_on_loop(both, FLASK, "__call__", call) == ["data", {"x": 5}, 5, False]
    assert run_on_loop(kwargs_only, FLASK, "__call__", call) == 5
    call = HandleRequest({"k": 1}, {"x": 5}, "PUT", {"a": "b"})
    assert run_on_loop(request_only, FLASK, "__call__", call) == [5, {"k": 1}, "PUT", "b"]
    with pytest.raises(TypeError, match="unexpected keyword"):
        run_on_loop(keyword, FLASK, "__call__", HandleRequest(None, {"y": 1}))


def test_starlette_backends_get_a_request_of_a_call() -> None:
    async def echo(request: Any) -> Any:
        return [request.data, await request.json(), await request.body(), request.query_params, request.method]

    call = HandleRequest({"k": 1}, {"x": 5}, "POST")
    assert run_on_loop(echo, STARLETTE, "__call__", call) == [{"k": 1}, {"k": 1}, {"k": 1}, {"x": 5}, "POST"]


@pytest.mark.parametrize("flavour", [FLASK, STARLETTE])
def test_a_request_that_a_handle_of_today_passes_on_is_one_as_if_it_came_here(flavour: str) -> None:
    class Passed:
        async def __call__(self, request: Any) -> str:
            return "called"

        async def named(self, request: Any) -> str:
            return f"{request.method} {request.headers['x-one']}"

    def passed(*headers: tuple[bytes, bytes]) -> Any:
        parts = ["POST", "/", b"/", b"", "", [(b"x-one", b"1"), *headers], None, None, "http", "1.1", {}]
        return rebuild(parts, b"body")

    assert run_on_loop(Passed, flavour, "__call__", passed()) == "called"
    assert run_on_loop(Passed, flavour, "__call__", passed((CALL_METHOD, b"named"))) == "POST 1"


def test_todays_handles_pass_their_arguments_through() -> None:
    async def add(a: int, b: int = 0) -> int:
        return a + b

    assert run_on_loop(add, FLASK, "__call__", 1, b=2) == 3


@serve.accept_batch
def sizes(flask_requests: list[Any]) -> list[Any]:
    return [[request.data, serve.context.batch_size] for request in flask_requests]


@serve.accept_batch
def sums(flask_requests: list[Any], x: list[int]) -> list[int]:
    return [len(flask_requests) * value for value in x]


def test_a_batch_is_one_call_with_lists() -> None:
    batch = [HandleRequest(n, {}) for n in range(3)]
    assert run_on_loop(sizes, FLASK, "__call__", batch) == [[0, 3], [1, 3], [2, 3]]
    assert serve.context.batch_size is None
    assert run_on_loop(sums, FLASK, "__call__", [HandleRequest(None, {"x": n}) for n in range(3)]) == [0, 3, 6]


def test_requests_of_a_batch_go_to_their_methods_and_come_back_in_order() -> None:
    class Batched:
        @serve.accept_batch
        async def __call__(self, requests: list[Any]) -> list[Any]:
            return [[request.data, serve.context.batch_size] for request in requests]

        async def single(self, request: Any) -> Any:
            return [request.data, serve.context.batch_size]

    batch = [HandleRequest(n, {}) for n in range(2)]
    assert run_on_loop(Batched, STARLETTE, "__call__", batch) == [[0, 2], [1, 2]]
    assert run_on_loop(Batched, STARLETTE, "single", batch) == [[0, None], [1, None]]


@serve.accept_batch
async def sums_async(flask_requests: list[Any], x: list[int]) -> list[int]:
    return sums(flask_requests, x)


def run_on_thread(user: Callable[..., Any], flavour: str, name: str, *args: Any) -> Any:
    """What a sync backend makes of a call, on a thread beside the loop."""

    async def call() -> Any:
        return await asyncio.to_thread(SyncBackend(user, (), flavour)._run_sync, name, *args)

    return asyncio.run(call())


async def ref_of_a_failed_task() -> Any:
    raise KeyError("the task failed")


@pytest.mark.parametrize(("function", "run"), [(sums, run_on_thread), (sums_async, run_on_loop)], ids=["sync", "async"])
def test_an_argument_that_failed_fails_its_own_request(
    function: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayserve_fast.classic.backend.ObjectRef", types.CoroutineType)  # awaited as one is
    arguments = [1, ref_of_a_failed_task(), 3]
    first, failed, last = run(function, FLASK, "__call__", [HandleRequest(None, {"x": x}) for x in arguments])
    assert (first, last) == (2, 6)
    assert isinstance(failed, KeyError)


@pytest.mark.parametrize(("function", "run"), [(sums, run_on_thread), (sums_async, run_on_loop)], ids=["sync", "async"])
def test_other_keyword_arguments_are_another_call(function: Any, run: Any) -> None:
    calls = [HandleRequest(None, {"x": 1}), HandleRequest(None, {"y": 1}), HandleRequest(None, {"x": 2})]
    first, failed, last = run(function, FLASK, "__call__", calls)
    assert (first, last) == (2, 4)
    assert isinstance(failed, TypeError)


class Failing:
    def __call__(self, request: Any) -> Any:
        return 1 / request.data

    async def later(self, request: Any) -> Any:
        return 1 / request.data


@pytest.mark.parametrize("name", ["__call__", "later"])
@pytest.mark.parametrize("run", [run_on_thread, run_on_loop])
def test_a_method_that_takes_no_batch_fails_for_one_request_alone(run: Any, name: str) -> None:
    first, failed, last = run(Failing, STARLETTE, name, [HandleRequest(n, {}) for n in (1, 0, 2)])
    assert (first, last) == (1, 0.5)
    assert isinstance(failed, ZeroDivisionError)


class Sizes:
    @serve.accept_batch
    def __call__(self, flask_requests: list[Any]) -> list[Any]:
        return [len(request.data) for request in flask_requests]

    @serve.accept_batch
    def raising(self, flask_requests: list[Any]) -> list[Any]:
        raise KeyError("all of them")


class SizesAsync(Sizes):
    @serve.accept_batch
    async def __call__(self, flask_requests: list[Any]) -> list[Any]:  # type: ignore[override]
        return super().__call__(flask_requests)


@pytest.mark.parametrize(("user", "kind"), [(Sizes, SyncBackend), (SizesAsync, AsyncBackend)], ids=["sync", "async"])
def test_a_client_that_is_wrong_does_not_fail_the_batch(user: Any, kind: type[Backend]) -> None:
    batching = {"max_batch_size": 4, "batch_wait_timeout_s": 10.0}
    sent = [
        {"data": "good"},
        {"headers": {"X-SERVE-CALL-METHOD": "nonsense"}},
        {"headers": {"X-SERVE-CALL-METHOD": "raising"}},
        {"data": "no boundary in it", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    ]
    with ours(kind, "/", "", user, (), FLASK, **batching) as (host, port), ThreadPoolExecutor(4) as pool:
        url = f"http://{host}:{port}"
        answers = list(pool.map(lambda given: requests.post(url, timeout=30, **given), sent))
    assert [answer.status_code for answer in answers] == [200, 400, 500, 400]
    assert answers[0].text == "4"
    assert answers[3].text.startswith("The body of the request is not a multipart form: ")


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ([1], "input list has length 2 but the returned list has length 1"),
        ({1, 2}, "returned a set of length 2. Return a list"),
        ({"a": 1, "b": 2}, "returned a dict of length 2. Return a list"),
        ("ab", "returned a str of length 2. Return a list"),
        (5, "returned a int. Return a list"),
    ],
)
def test_a_batch_must_come_back_as_a_list_of_its_length(result: Any, text: str) -> None:
    @serve.accept_batch
    def wrong(requests: list[Any]) -> Any:
        return result

    with pytest.raises(RayServeException, match=text):
        Method(wrong).call_batch([((1,), {}), ((2,), {})])


def test_a_users_object_is_let_go_of_once() -> None:
    deleted = []

    class Leaving:
        def __call__(self) -> str:
            return "here"

        def __del__(self) -> None:
            deleted.append(time.monotonic())

    async def life() -> None:
        made = SyncBackend(Leaving, (), FLASK)
        assert made._run_sync("__call__", HandleRequest()) == "here"
        made.__del__()

    asyncio.run(life())
    assert len(deleted) == 1
