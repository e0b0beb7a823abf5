"""`.deploy()` and what belongs to it: versions, routes, names, and deployments that another driver has made."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import ray
import requests

from rayserve_fast import serve
from rayserve_fast.application import RunTarget, build_target
from rayserve_fast.classic import deploy
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.handle import RayServeHandle, RayServeSyncHandle

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


@serve.deployment
class Greeter:
    def __init__(self, greeting: str = "Hello", name: str = "world") -> None:
        self.text = f"{greeting} {name}"
        self.config: Any = None

    def reconfigure(self, config: Any) -> None:
        self.config = config

    def __call__(self, *_: Any) -> str:
        return self.text

    def state(self) -> tuple[str, Any, int]:
        return self.text, self.config, os.getpid()

    def limit(self) -> int:
        return serve.get_replica_context()._deployment_config.max_ongoing_requests


@serve.deployment
def function(_request: Any) -> str:
    return "from a function"


def text(url: str) -> str:
    answer = requests.get(url, timeout=20)
    return answer.text if answer.status_code == 200 else f"{answer.status_code}"


def state(name: str) -> tuple[str, Any, int]:
    found: tuple[str, Any, int] = ray.get(serve.get_deployment(name).get_handle().state.remote(), timeout=60)
    return found


def test_deploy_serves_at_the_name_and_by_handles(serve_instance: str) -> None:
    Greeter.deploy("Hi", name="you")
    assert text(f"{serve_instance}/Greeter") == text(f"{serve_instance}/Greeter/below") == "Hi you"
    handle = Greeter.get_handle()
    assert type(handle) is RayServeSyncHandle
    assert ray.get(handle.remote(), timeout=60) == "Hi you"
    assert ray.get(handle.limit.remote(), timeout=60) == 100
    assert type(Greeter.get_handle(sync=False)) is RayServeHandle
    assert serve.status().applications["Greeter"].status == "RUNNING"
    assert serve.get_app_handle("Greeter").remote().result(timeout_s=20) == "Hi you"  # today's API sees it too


def test_functions_routes_and_names(serve_instance: str) -> None:
    function.options(route_prefix="/f").deploy()
    Greeter.options(name="hidden", route_prefix=None, init_args=("Psst",), max_concurrent_queries=7).deploy()
    assert text(f"{serve_instance}/f") == "from a function"
    assert text(f"{serve_instance}/function") == text(f"{serve_instance}/hidden") == "404"
    assert ray.get(serve.get_deployment("hidden").get_handle().limit.remote(), timeout=60) == 7
    assert {name: repr(found) for name, found in serve.list_deployments().items()} == {
        "function": "Deployment(name=function,version=None,route_prefix=/f)",
        "hidden": "Deployment(name=hidden,version=None,route_prefix=None)",
    }
    with pytest.raises(ValueError, match="init_args not supported for function deployments"):
        function.deploy("argument")


def test_versions_decide_what_a_redeploy_replaces(serve_instance: str) -> None:
    first = Greeter.options(name="v", version="1", user_config="a")
    first.deploy("one")
    text_before, config, process = state("v")
    assert (text_before, config) == ("one world", "a")
    first.options(user_config="b").deploy("two")  # the same version: the options only
    assert state("v") == ("one world", "b", process)
    with pytest.raises(ValueError, match=r"prev_version '7' is not the version .* which is '1'"):
        first.options(version="2", prev_version="7").deploy("two")
    first.options(version="2", prev_version="1").deploy("two")
    assert state("v")[:2] == ("two world", "a")
    assert serve.get_deployment("v").version == "2"
    with pytest.raises(ValueError, match="there is no deployment 'new' yet"):
        first.options(name="new", prev_version="1").deploy()
    unversioned = Greeter.options(name="v")
    unversioned.deploy()
    before = state("v")[2]
    unversioned.deploy()
    assert state("v")[2] != before


def test_of_two_drivers_one_replaces_a_version(serve_instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Greeter.options(name="v", version="1")
    first.deploy("one")
    labels = deploy._labels

    def overtaken(deployment: Any) -> dict[str, Any]:
        monkeypatch.undo()
        first.options(version="2", prev_version="1").deploy("two")  # between the other's look and its order
        return labels(deployment)

    monkeypatch.setattr(deploy, "_labels", overtaken)
    with pytest.raises(ValueError, match=r"prev_version '1' is not the version .* which is '2'"):
        first.options(version="3", prev_version="1").deploy("three")
    assert state("v")[0] == "two world"


def test_a_name_or_route_of_another_era_is_refused(serve_instance: str) -> None:
    serve.run(Greeter.bind(), name="today", route_prefix="/taken")
    with pytest.raises(RayServeException, match='"today" is held by an application'):
        Greeter.options(name="today").deploy()
    with pytest.raises(RayServeException, match="Prefix /taken is being used"):
        Greeter.options(name="other", route_prefix="/taken").deploy()
    Greeter.options(name="today").delete()  # what it did not make it does not delete
    assert text(f"{serve_instance}/taken") == "Hello world"
    Greeter.deploy()
    with pytest.raises(RayServeException, match=r'"Greeter" is held by a deployment made by .deploy\(\)'):
        serve.run(Greeter.bind(), name="Greeter", route_prefix=None)
    with pytest.raises(KeyError, match=r"Deployment today was not found. Did you call Deployment.deploy\(\)?"):
        serve.get_deployment("today")
    with pytest.raises(KeyError, match="Deployment nothing was not found"):
        Greeter.options(name="nothing").get_handle()


def test_deleting(serve_instance: str) -> None:
    Greeter.deploy()
    serve.get_deployment("Greeter").delete()
    assert text(f"{serve_instance}/Greeter") == "404"
    assert serve.list_deployments() == {}
    Greeter.deploy()
    serve.delete("Greeter")
    assert serve.list_deployments() == {}
    Greeter.delete()


def test_without_blocking_it_comes_later(serve_instance: str) -> None:
    Greeter.deploy(_blocking=False)
    assert ray.get(Greeter.get_handle().remote(), timeout=60) == "Hello world"


def test_what_was_deployed_is_redeployed_by_name(serve_instance: str) -> None:
    Greeter.options(user_config=1).deploy("Good", name="morning")
    before = state("Greeter")
    found = serve.get_deployment("Greeter")
    assert (found.func_or_class.__name__, found.init_args, found.init_kwargs) == (
        "Greeter",
        ("Good",),
        {"name": "morning"},
    )
    found.deploy()
    again = state("Greeter")
    assert again[:2] == before[:2]
    assert again[2] != before[2]
    found.options(user_config=2, name="Copy").deploy()
    assert state("Copy")[:2] == ("Good morning", 2)
    assert serve.get_deployment("Copy").route_prefix == "/Copy"
    found.deploy("Good", name="night")
    assert state("Greeter")[:2] == ("Good night", 1)


@serve.deployment
class Composed:
    """As deployments called each other then: by name, in the constructor."""

    def __init__(self) -> None:
        self.waiting = serve.get_deployment("Greeter").get_handle()
        self.awaiting = serve.get_deployment("Greeter").get_handle(sync=False)

    async def __call__(self, _request: Any = None) -> str:
        ref = await self.awaiting.remote()
        return f"awaited {await ref}"

    def blocking(self) -> str:
        return f"got {ray.get(self.waiting.remote())}"


def test_deployments_call_each_other_by_name(serve_instance: str) -> None:
    Greeter.deploy()
    Composed.deploy()
    assert text(f"{serve_instance}/Composed") == "awaited Hello world"
    assert ray.get(Composed.get_handle().blocking.remote(), timeout=60) == "got Hello world"


FIRST_DRIVER = """
import sys, ray
from rayserve_fast import serve
import only_here
ray.init(address="local", num_cpus=4, include_dashboard=False)
serve.start(http_options={"port": 0})
only_here.Model.deploy(only_here.Weights(2))
import subprocess
address = ray.get_runtime_context().gcs_address
second = subprocess.run([sys.executable, "-c", sys.argv[1], address], cwd="/", capture_output=True, text=True)
print(second.stdout, second.stderr)
assert ray.get(only_here.Model.get_handle().remote(3)) == 6
"""
MODULE = """
from rayserve_fast import serve
class Weights:
    def __init__(self, factor): self.factor = factor
@serve.deployment
class Model:
    def __init__(self, weights): self.weights = weights
    def __call__(self, x): return self.weights.factor * x
    def replicas(self): return serve.get_replica_context()._deployment_config.num_replicas
"""
SECOND_DRIVER = """
import sys
import ray
from rayserve_fast import serve
ray.init(address=sys.argv[1])
print(serve.list_deployments())
model = serve.get_deployment("Model")
model.options(num_replicas=2).deploy()
print(ray.get(model.get_handle().replicas.remote()), ray.get(model.get_handle().remote(21)))
try:
    model.func_or_class
except ModuleNotFoundError as error:
    print(error)
"""


def test_another_driver_redeploys_code_that_it_cannot_import(run_script: Any, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text(MODULE)
    ran = run_script(FIRST_DRIVER, SECOND_DRIVER, timeout=110)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "{'Model': Deployment(name=Model,version=None,route_prefix=/Model)}" in ran.stdout
    assert "2 42\n" in ran.stdout, ran.stdout
    assert "No module named 'only_here'" in ran.stdout


def built_route(target: Any, **route: Any) -> str | None:
    return build_target(RunTarget(target, "app", **route)).route_prefix


def test_serve_run_takes_the_route_it_is_given_then_the_deployment_s() -> None:
    at = Greeter.options(route_prefix="/decorated")
    assert built_route(at.bind()) == "/decorated"
    assert built_route(at.bind(), route_prefix="/given") == "/given"
    assert built_route(at.bind(), route_prefix="/") == "/"
    assert built_route(at.bind(), route_prefix=None) is None
    assert built_route(Greeter.options(route_prefix=None).bind()) is None
    assert built_route(Greeter.bind()) == "/"


def test_serve_run_refuses_a_version() -> None:
    with pytest.raises(ValueError, match=r"`version` in `@serve.deployment` has been removed."):
        build_target(RunTarget(Greeter.options(version="1").bind()))
    with pytest.raises(ValueError, match="has been removed"):
        build_target(RunTarget(Greeter.bind(serve.deployment(version="1")(Greeter.func_or_class).bind())))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"route_prefix": "x"}, ValueError, "route_prefix"),
        ({"route_prefix": "/x/"}, ValueError, "route_prefix"),
        ({"route_prefix": "/{x}"}, ValueError, "route_prefix"),
        ({"route_prefix": 3}, TypeError, "route_prefix"),
        ({"version": 3}, TypeError, "version"),
        ({"prev_version": 3}, TypeError, "prev_version"),
        ({"max_concurrent_queries": 3, "max_ongoing_requests": 3}, ValueError, "max_concurrent_queries"),
        ({"max_concurrent_queries": 0}, ValueError, "max_ongoing_requests"),
    ],
)
def test_wrong_older_options_are_refused_by_name(options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        Greeter.options(**options)
    with pytest.raises(error, match=named):
        serve.deployment(**options)(Greeter.func_or_class)


def test_older_names_mean_todays_options_and_warn_only_who_asks() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        older = serve.deployment(max_concurrent_queries=3, _autoscaling_config={"max_replicas": 2})
        deployment = older(Greeter.func_or_class)
    assert {w.category for w in heard} == {PendingDeprecationWarning}
    assert heard[0].filename == __file__
    assert (deployment.max_ongoing_requests, deployment.max_concurrent_queries) == (3, 3)
    assert deployment._options.autoscaling_config.max_replicas == 2
    assert Greeter.max_ongoing_requests == 5
    assert Greeter.max_concurrent_queries == 100
    assert serve.deployment(init_args=(1,), init_kwargs={"a": 2})(Greeter.func_or_class).init_kwargs == {"a": 2}
