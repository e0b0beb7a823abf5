"""Handles of endpoints, batches and the Client API on a running Serve; how it begins and ends by the older APIs."""

from __future__ import annotations

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import requests
from classic_backends import Url, begun_by_init, text  # noqa: F401 - a fixture
from deployed import wait_for

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


@pytest.fixture
def client(serve_instance: Url) -> Any:
    return serve.connect()


def test_handles_call_backends_by_keyword_after_init(flask: Url) -> None:
    class Adder:
        def __call__(self, flask_request: Any, x: int = 0) -> Any:
            return [serve.context.web, x]

        def other(self, flask_request: Any) -> Any:
            return [flask_request.method, flask_request.headers["a"], flask_request.args["x"], flask_request.data]

    serve.create_backend("adder", Adder)
    serve.create_endpoint("adder", "/adder", backend="adder")
    handle = serve.get_handle("adder")
    ref = handle.remote(x=5)
    assert isinstance(ref, ray.ObjectRef)
    assert ray.get(ref) == [False, 5]
    assert requests.get(f"{flask}/adder", timeout=10).json() == [True, 0]
    put = handle.options(method_name="other", http_method="PUT", http_headers={"A": "b"})
    assert ray.get(put.remote([1], x=6)) == ["PUT", "b", 6, [1]]
    assert ray.get(handle.remote(x=ray.put(7))) == [False, 7]
    with pytest.raises(TypeError, match="at most one positional argument"):
        handle.remote(1, 2)


def test_handles_reach_endpoints_without_a_route_and_split_their_calls(client: Any) -> None:
    for tag in ("left", "right"):
        client.create_backend(tag, text(tag))
    client.create_endpoint("both", backend="left")
    client.set_traffic("both", {"left": 0.5, "right": 0.5})
    handle = client.get_handle("both")
    wait_for(lambda: len({ray.get(handle.remote()) for _ in range(2)}) == 2)  # one link may be up before the other
    answers = ray.get([handle.remote() for _ in range(10)])
    assert answers.count("left") == answers.count("right") == 5
    kept = handle.options(shard_key="user")
    assert len(set(ray.get([kept.remote() for _ in range(6)]))) == 1
    copy = pickle.loads(pickle.dumps(handle))
    assert ray.get(copy.remote()) in ("left", "right")
    with pytest.raises(KeyError, match="Endpoint 'nothing' does not exist"):
        client.get_handle("nothing")


def test_handlers_that_accept_batches_get_lists(flask: Url) -> None:
    @serve.accept_batch
    def sizes(flask_requests: list[Any]) -> list[Any]:
        seen = [serve.context.batch_size, serve.context.web]
        return [[*seen, request.args["n"]] for request in flask_requests if request.args["n"] != "lost"]

    serve.create_backend("sizes", sizes, config={"max_batch_size": 4, "batch_wait_timeout": 5})
    serve.create_endpoint("sizes", "/sizes", backend="sizes")
    assert serve.list_backends()["sizes"] == {"accepts_batches": True, "num_replicas": 1, "max_batch_size": 4}

    def ask(n: object) -> Any:
        return requests.get(f"{flask}/sizes?n={n}", timeout=30)

    with ThreadPoolExecutor(4) as pool:
        assert [answer.json() for answer in pool.map(ask, range(4))] == [[4, True, str(n)] for n in range(4)]
        assert {answer.status_code for answer in pool.map(ask, [1, 2, 3, "lost"])} == {500}  # one result is missing
    handle = serve.get_handle("sizes")
    assert ray.get([handle.remote(n=n) for n in range(4)]) == [[4, False, n] for n in range(4)]
    serve.update_backend_config("sizes", {"max_batch_size": 1})
    assert ask(5).json() == [1, True, "5"]

    serve.create_backend("alone", sizes)
    serve.set_traffic("sizes", {"alone": 1.0})
    assert ask(6).json() == [1, True, "6"]


def test_the_client_api_makes_starlette_backends_also_after_init(flask: Url) -> None:
    async def kind(request: Any) -> Any:
        return [type(request).__module__, request.query_params.get("a"), (await request.body()).decode()]

    client = serve.connect()
    serve.init()
    client.create_backend("kind", kind)
    client.create_endpoint("kind", backend="kind", route="/kind", methods=["POST"])
    answer = requests.post(f"{flask}/kind?a=1", data="body", timeout=10)
    assert answer.json() == ["rayserve_fast.replica.request", "1", "body"]


def test_the_client_api_says_what_is_wrong(client: Any) -> None:
    with pytest.raises(TypeError, match="backend must be specified when creating an endpoint"):
        client.create_endpoint("e", route="/e")
    with pytest.raises(TypeError, match="config must be a BackendConfig or a dictionary"):
        client.create_backend("b", text("b"), config=5)
    with pytest.raises(RayServeException, match="cannot be serialized"):
        pickle.dumps(client)
    client.create_backend("b", text("b"), config=serve.BackendConfig(max_concurrent_queries=3))
    assert client.list_backends()["b"].max_concurrent_queries == 3
    client.create_endpoint("e", backend="b", route="/e")
    assert client.list_endpoints() == {"e": {"route": "/e", "methods": ["GET"], "traffic": {"b": 1.0}, "shadows": {}}}
    client.delete_endpoint("e")
    client.delete_backend("b")
    assert (client.list_endpoints(), client.list_backends()) == ({}, {})


def test_a_backend_can_connect_and_call_another(client: Any, serve_instance: Url) -> None:
    def doubled(request: Any) -> int:
        return 2 * int(request.data)

    async def caller(request: Any) -> Any:
        handle = serve.connect().get_handle("doubled", sync=False)
        return await (await handle.remote(request.query_params["n"]))

    client.create_backend("doubled", doubled)
    client.create_endpoint("doubled", backend="doubled")
    client.create_backend("caller", caller)
    client.create_endpoint("caller", backend="caller", route="/caller")
    assert requests.get(f"{serve_instance}/caller?n=21", timeout=20).json() == 42


def test_older_spellings_are_silent_unless_asked(flask: Url) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        serve.list_backends()
    assert [(w.category, w.filename) for w in seen] == [(PendingDeprecationWarning, __file__)]


BEFORE = """
import ray
from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException

ray.init(address="local", num_cpus=4, include_dashboard=False)
for call in (
    lambda: serve.create_endpoint("e"),
    lambda: serve.create_backend("b", lambda: None),
    serve.list_endpoints,
    serve.list_backends,
    lambda: serve.get_handle("e"),
    lambda: serve.link("e", "b"),
    lambda: serve.get_backend_config("b"),
    serve.connect,
):
    try:
        call()
    except RayServeException as error:
        assert "serve." in str(error), error
    else:
        raise AssertionError("Serve is not running")
"""

INIT = """
import ray
import requests
from rayserve_fast import serve

options = {"address": "local", "num_cpus": 3, "include_dashboard": False}
serve.init(blocking=True, http_port={port}, ray_init_kwargs=options)
assert ray.cluster_resources()["CPU"] == 3
assert requests.get("http://127.0.0.1:{port}/-/routes").text == "{}"
serve.init()
try:
    serve.init(http_hots="x")
except TypeError as error:
    assert "http_hots" in str(error)
else:
    raise AssertionError("no version had that argument")
serve.create_backend("b", lambda request: request.args["a"])
serve.create_endpoint("e", "/e", backend="b")
assert requests.get("http://127.0.0.1:{port}/e?a=1").text == "1"
print("the end")
"""

CLIENTS = """
# Only an explicit detached=False ties the instance to the client.
serve.start(http_options={"port": {port}})
assert serve.connect() is not None
serve.shutdown()
import requests
serve.start(detached=False, http_options={"port": {port}}).shutdown()
try:
    serve.connect()
except RayServeException as error:
    assert "no instance running" in str(error)
else:
    raise AssertionError("it outlived shutdown()")
import atexit, gc
from rayserve_fast.controlplane.client import find
atexit.register(lambda: print("the end" if find() is None else "it outlived the program"))  # after what is tied ends
serve.start(detached=False, http_options={"port": {port}})  # nobody keeps the client
serve.start(detached=False)  # did not start it
gc.collect()
assert requests.get("http://127.0.0.1:{port}/-/routes").status_code == 200
"""


@pytest.mark.parametrize("source", [INIT, BEFORE + CLIENTS], ids=["init", "clients"])
def test_serve_begins_and_ends_as_the_older_apis_say(source: str, run_script, free_port: int) -> None:
    ran = run_script(source.replace("{port}", str(free_port)), timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("the end\n")
