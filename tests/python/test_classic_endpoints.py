"""Endpoints and backends on a running Serve: checks, texts of errors, and what acts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from classic_backends import Url, begun_by_init, text  # noqa: F401 - a fixture
from deployed import until_running, wait_for

from rayserve_fast import serve
from rayserve_fast.classic import backends, session
from rayserve_fast.exceptions import RayServeException

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def test_an_endpoint_without_traffic_answers_503_and_names_itself(flask: Url) -> None:
    serve.create_endpoint("lonely", "/lonely")
    answer = requests.get(f"{flask}/lonely", timeout=10)
    assert (answer.status_code, "lonely" in answer.text) == (503, True)


def test_a_route_is_matched_exactly_and_by_its_methods(flask: Url) -> None:
    serve.create_backend("exact", text("exact"))
    serve.create_endpoint("exact", "/exact", methods=["get", "post"])
    serve.link("exact", "exact")
    assert serve.list_endpoints()["exact"]["methods"] == ["GET", "POST"]
    assert requests.post(f"{flask}/exact", timeout=10).text == "exact"
    assert requests.get(f"{flask}/exact/below", timeout=10).status_code == 404
    answer = requests.put(f"{flask}/exact", timeout=10)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    assert answer.text == "Methods PUT not allowed. Available HTTP methods are ['GET', 'POST']."
    assert requests.get(f"{flask}/-/routes", timeout=10).json() == {"/exact": ["exact", ["GET", "POST"]]}


def test_routes_of_applications_and_endpoints_live_side_by_side(flask: Url) -> None:
    serve.run(serve.deployment(name="App")(text("app")).bind(), name="app", route_prefix="/")
    serve.create_backend("side", text("endpoint"))
    serve.create_endpoint("side", "/side", backend="side")
    assert requests.get(f"{flask}/side", timeout=10).text == "endpoint"
    assert requests.get(f"{flask}/side/below", timeout=10).text == "app"
    assert requests.get(f"{flask}/-/routes", timeout=10).json() == {"/": "app", "/side": ["side", ["GET"]]}
    with pytest.raises(RayServeException, match='used by application "app"'):
        serve.create_endpoint("root", "/")


def test_wrong_endpoints_are_refused(flask: Url) -> None:
    serve.create_endpoint("taken", "/taken")
    for wrong, error, match in [
        (("taken",), ValueError, "already registered"),
        (("other", "/taken"), ValueError, "Route '/taken' is already registered to endpoint 'taken'"),
        (("other", "relative"), TypeError, "route"),
        (("other", 5), TypeError, "route"),
        (("other", "/x", "GET"), TypeError, "methods"),
        (("other", "/x", [1]), TypeError, "methods"),
        (("other", "/{a:date}"), ValueError, 'unknown path convertor "date"'),
        (("other", "/{a}/{a}"), ValueError, '"a" stands twice'),
        ((5,), TypeError, "endpoint_name"),
    ]:
        with pytest.raises(error, match=match):
            serve.create_endpoint(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend 'nobody' that is not registered"):
        serve.create_endpoint("other", backend="nobody")
    with pytest.raises(ValueError, match="nothing"):
        serve.delete_endpoint("nothing")
    with pytest.raises(KeyError, match="Endpoint 'nothing' does not exist"):
        serve.get_handle("nothing")
    assert list(serve.list_endpoints()) == ["taken"]


def test_of_two_drivers_one_creates_a_backend(flask: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = backends._spec

    def overtaken(*args: Any) -> Any:
        monkeypatch.undo()
        serve.create_backend("raced", text("first"))  # between the other's look and its order
        return spec(*args)

    monkeypatch.setattr(backends, "_spec", overtaken)
    with pytest.raises(ValueError, match="Backend 'raced' is already registered"):
        serve.create_backend("raced", text("second"))
    serve.create_endpoint("raced", "/raced", backend="raced")
    assert requests.get(f"{flask}/raced", timeout=10).text == "first"


def test_of_two_drivers_that_change_a_configuration_neither_undoes_the_other_s(
    flask: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve.create_backend("raced", text("x"))
    options = backends._options

    def overtaken(*args: Any) -> Any:
        monkeypatch.undo()
        serve.update_backend_config("raced", {"max_concurrent_queries": 7})  # between the other's look and its order
        return options(*args)

    monkeypatch.setattr(backends, "_options", overtaken)
    serve.update_backend_config("raced", {"experimental_graceful_shutdown_timeout_s": 3.0})
    found = serve.get_backend_config("raced")
    assert (found.max_concurrent_queries, found.experimental_graceful_shutdown_timeout_s) == (7, 3.0)


def test_wrong_backends_are_refused_and_leave_nothing(flask: Url) -> None:
    serve.create_backend("taken", text("x"))
    serve.run(serve.deployment(name="App")(text("app")).bind(), name="app", route_prefix=None)
    for make, error, match in [
        (lambda: serve.create_backend("taken", text("y")), ValueError, "Backend 'taken' is already registered"),
        (lambda: serve.create_backend("app", text("y")), RayServeException, 'The name "app" is held by an application'),
        (lambda: serve.create_backend("new", 5), TypeError, "Backend must be a function or class, it is <class 'int'>"),
        (lambda: serve.create_backend("new", "module"), TypeError, "Backend must be a function or class"),
        (lambda: serve.create_backend(5, text("y")), TypeError, "backend_tag"),
        (lambda: serve.create_backend("new", text("y"), config=[1]), TypeError, "config must be a dictionary."),
        (lambda: serve.create_backend("new", text("y"), config={"replicas": 1}), ValueError, "replicas"),
        (lambda: serve.create_backend("new", text("y"), config={"num_replicas": 0}), ValueError, "num_replicas"),
        (lambda: serve.create_backend("new", text("y"), config={"max_batch_size": 2}), ValueError, "accept_batch"),
        (lambda: serve.update_backend_config("new", {}), ValueError, "Backend new is not registered."),
        (lambda: serve.update_backend_config("app", {}), ValueError, "Backend app is not registered."),
        (lambda: serve.get_backend_config("new"), ValueError, "Backend new is not registered."),
        (lambda: serve.delete_backend("new"), ValueError, "Backend new is not registered."),
        (lambda: serve.delete_backend("app"), ValueError, "Backend app is not registered."),
    ]:
        with pytest.raises(error, match=match):
            make()
    assert list(serve.list_backends()) == ["taken"]


def test_a_backend_that_cannot_start_says_why_and_frees_its_tag(flask: Url) -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no model here")

    with pytest.raises(RuntimeError, match="no model here"):
        serve.create_backend("broken", Broken)
    assert serve.list_backends() == {}
    serve.create_backend("broken", text("whole"))


def test_the_oldest_order_of_arguments_works(flask: Url) -> None:
    class Greeter:
        def __init__(self, greeting: str) -> None:
            self.greeting = greeting

        def __call__(self, flask_request: Any) -> str:
            return f"{self.greeting} {flask_request.args['name']}"

    serve.create_backend(Greeter, "greeter:v0", "hi", backend_config={"num_replicas": 1})  # type: ignore[arg-type]
    serve.create_endpoint("greeter", "/greeter")
    serve.split("greeter", {"greeter:v0": 1})
    assert requests.get(f"{flask}/greeter?name=ada", timeout=10).text == "hi ada"


def test_a_decorated_function_has_endpoint_and_backend(flask: Url) -> None:
    @serve.route("/square")
    def square(flask_request: Any) -> int:
        return int(flask_request.args["n"]) ** 2

    assert requests.get(f"{flask}/square?n=7", timeout=10).json() == 49
    assert serve.list_endpoints()["square"]["traffic"] == {"square:v0": 1.0}


def test_wrong_traffic_is_refused_and_the_old_stays(flask: Url) -> None:
    serve.create_backend("a", text("a"))
    serve.create_endpoint("e", "/e", backend="a")
    for traffic, error, match in [
        ({"a": -0.5, "b": 1.5}, ValueError, "weight of -0.5 to backend 'a'. Weights cannot be negative."),
        ({"a": 0.5}, ValueError, "must sum to 1, currently they sum to 0.5"),
        ({"b": 1.0}, ValueError, "Attempted to assign traffic to a backend 'b' that is not registered."),
        ([("a", 1.0)], TypeError, "dictionary"),
    ]:
        with pytest.raises(error, match=match):
            serve.set_traffic("e", traffic)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="endpoint 'nobody' that is not registered"):
        serve.set_traffic("nobody", {"a": 1.0})
    assert requests.get(f"{flask}/e", timeout=10).text == "a"


def test_a_client_with_a_shard_key_stays_at_one_backend(flask: Url) -> None:
    for tag in ("left", "right"):
        serve.create_backend(tag, text(tag))
    serve.create_endpoint("sides", "/sides")
    serve.set_traffic("sides", {"left": 0.5, "right": 0.5})

    def ask(key: str) -> str:
        return requests.get(f"{flask}/sides", headers={"X-SERVE-SHARD-KEY": key}, timeout=10).text

    sides = {key: {ask(key) for _ in range(4)} for key in map(str, range(12))}
    assert all(len(seen) == 1 for seen in sides.values())
    assert set.union(*sides.values()) == {"left", "right"}


def test_shadow_traffic_reaches_the_backend_and_nobody_else(flask: Url, tmp_path: Path) -> None:
    log = tmp_path / "shadowed"

    def shadow(flask_request: Any) -> str:
        with log.open("a") as out:
            out.write(flask_request.args["n"])
        return "shadow"

    serve.create_backend("main", text("main"))
    serve.create_backend("shadow", shadow)
    serve.create_endpoint("e", "/e", backend="main")
    serve.shadow_traffic("e", "shadow", 1.0)
    assert serve.list_endpoints()["e"]["shadows"] == {"shadow": 1.0}
    assert {requests.get(f"{flask}/e?n={n}", timeout=10).text for n in range(5)} == {"main"}
    wait_for(lambda: log.exists() and sorted(log.read_text()) == list("01234"))
    with pytest.raises(ValueError, match="Backend 'shadow' is used by endpoint 'e'"):
        serve.delete_backend("shadow")
    with pytest.raises(TypeError):
        serve.shadow_traffic("e", "shadow", 1.5)
    serve.shadow_traffic("e", "shadow", 0)
    serve.delete_backend("shadow")


def test_a_configuration_changes_without_new_processes(flask: Url) -> None:
    class Configured:
        def __init__(self) -> None:
            self.config = None

        def reconfigure(self, config: Any) -> None:
            self.config = config

        def __call__(self, flask_request: Any) -> Any:
            return [os.getpid(), self.config]

    serve.create_backend("c", Configured, config={"user_config": {"v": 1}, "max_concurrent_queries": 7})
    serve.create_endpoint("c", "/c", backend="c")
    pid, config = requests.get(f"{flask}/c", timeout=10).json()
    assert config == {"v": 1}
    serve.update_backend_config("c", {"user_config": {"v": 2}})
    assert requests.get(f"{flask}/c", timeout=10).json() == [pid, {"v": 2}]
    found = serve.get_backend_config("c")
    assert (found.user_config, found.max_concurrent_queries, found.num_replicas) == ({"v": 2}, 7, 1)
    serve.update_backend_config("c", {"num_replicas": 2})
    wait_for(lambda: len({requests.get(f"{flask}/c", timeout=10).json()[0] for _ in range(20)}) == 2)
    assert serve.list_backends()["c"] == {"accepts_batches": False, "num_replicas": 2, "max_batch_size": None}
    with pytest.raises(TypeError, match="config must be a dictionary"):
        serve.update_backend_config("c", 5)  # type: ignore[arg-type]


def test_a_forced_delete_does_not_wait_for_requests(flask: Url) -> None:
    def slow(flask_request: Any) -> None:
        time.sleep(60)

    serve.create_backend("slow", slow)
    serve.create_endpoint("slow", "/slow", backend="slow")
    with pytest.raises(requests.Timeout):
        requests.get(f"{flask}/slow", timeout=0.5)
    until_running(1)
    serve.delete_endpoint("slow")
    began = time.monotonic()
    serve.delete_backend("slow", force=True)
    assert time.monotonic() - began < 10
    assert serve.list_backends() == {}


def test_a_forced_delete_that_another_driver_forestalls_changes_nothing(
    flask: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, theirs = session.ask, []

    def forestalled(method: str, *args: Any) -> Any:
        if method in ("deploy", "delete"):
            monkeypatch.undo()
            serve.update_backend_config("used", {"max_concurrent_queries": 7})
            serve.create_endpoint("user", "/user", backend="used")
            theirs.append(ask("specification", "used"))
        return ask(method, *args)

    serve.create_backend("used", text("used"))
    monkeypatch.setattr(session, "ask", forestalled)
    with pytest.raises(ValueError, match="used"):
        serve.delete_backend("used", force=True)
    assert theirs == [ask("specification", "used")]
    assert requests.get(f"{flask}/user", timeout=10).text == "used"


def test_a_backend_knows_its_tags(flask: Url) -> None:
    def tags() -> list[str]:
        return [serve.get_current_backend_tag(), serve.get_current_replica_tag()]

    serve.create_backend("tagged", tags)
    serve.create_endpoint("tagged", "/tagged", backend="tagged")
    backend, replica = requests.get(f"{flask}/tagged", timeout=10).json()
    assert backend == "tagged"
    assert len(replica) == 8
    for ask in (serve.get_current_backend_tag, serve.get_current_replica_tag):
        with pytest.raises(RayServeException, match="within a Ray Serve backend"):
            ask()


def test_what_the_proxies_counted_is_told(flask: Url) -> None:
    serve.create_backend("counted", text("x"))
    serve.create_endpoint("counted", "/counted", backend="counted")
    for _ in range(3):
        requests.get(f"{flask}/counted", timeout=10)
    (found,) = [row["value"] for row in serve.stat() if row["info"]["name"] == "requests"]
    assert found == 3
