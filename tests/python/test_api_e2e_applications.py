"""Applications declared with the Python API and really run: composition, handles, what replicas and status tell."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import Any

import pytest
import ray
import requests

from rayserve_fast import RunTarget, serve
from rayserve_fast.handle import DeploymentHandle
from rayserve_fast.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ProxyStatus,
    ReplicaState,
    ServeStatus,
)

pytestmark = pytest.mark.usefixtures("serve_instance")


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Adder:
    """Adds to what it is called with; says where it runs."""

    def __init__(self, increment: int = 1) -> None:
        self.increment = increment

    def __call__(self, value: int, *, times: int = 1) -> int:
        return value + self.increment * times

    async def later(self, value: int) -> int:
        return value + self.increment

    def where(self) -> dict[str, Any]:
        context = serve.get_replica_context()
        return {
            "app": context.app_name,
            "deployment": context.deployment,
            "tag": context.replica_tag,
            "id": str(context.replica_id),
            "rank": asdict(context.rank),
            "world_size": context.world_size,
            "own": context.servable_object is self,
            "pid": os.getpid(),
        }


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Holder:
    """Tells what was bound to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.bound = (args, kwargs)

    def __call__(self) -> Any:
        return self.bound


@serve.deployment(ray_actor_options={"num_cpus": 0})
async def shout(text: str) -> str:
    return text.upper()


def test_run_returns_a_handle_to_the_ingress() -> None:
    handle = serve.run(Adder.bind(10))
    assert isinstance(handle, DeploymentHandle)
    assert handle.remote(1).result() == 11
    assert handle.remote(1, times=2).result() == 21
    assert handle.later.remote(5).result() == 15


def test_a_function_is_called_by_handle() -> None:
    assert serve.run(shout.bind()).remote("abc").result() == "ABC"


def test_run_many_gives_the_handles_in_order() -> None:
    targets = [RunTarget(Adder.bind(n), f"app{n}", f"/{n}") for n in (3, 1, 2)]
    handles = serve.run_many(targets)
    assert [handle.app_name for handle in handles] == ["app3", "app1", "app2"]
    assert [handle.remote(0).result() for handle in handles] == [3, 1, 2]


def test_bound_applications_arrive_as_handles() -> None:
    adder = Adder.bind(2)
    handle = serve.run(Holder.bind(adder, {"nested": [adder, Adder.bind(3)]}, text="plain"))
    args, kwargs = handle.remote().result()
    direct, (same, other) = args[0], args[1]["nested"]
    assert kwargs == {"text": "plain"}
    assert [(h.deployment_name, h.app_name) for h in (direct, same, other)] == [
        ("Adder", "default"),
        ("Adder", "default"),
        ("Adder_1", "default"),
    ]
    assert [h.remote(0).result() for h in (direct, same, other)] == [2, 2, 3]
    assert set(serve.status().applications["default"].deployments) == {"Adder", "Adder_1", "Holder"}


def test_a_replica_knows_where_it_is() -> None:
    handle = serve.run(Adder.options(name="Here", num_replicas=2).bind(), name="there")
    seen = {}
    for _ in range(200):
        found = handle.where.remote().result()
        seen[found.pop("pid")] = found
        if len(seen) == 2:
            break
    assert sorted(found["rank"]["rank"] for found in seen.values()) == [0, 1]
    for found in seen.values():
        assert (found["app"], found["deployment"], found["world_size"], found["own"]) == ("there", "Here", 2, True)
        assert found["id"] == f"Replica(id='{found['tag']}', deployment='Here', app='there')"
    assert len({found["tag"] for found in seen.values()}) == 2


def test_status_is_made_of_the_references_dataclasses() -> None:
    serve.run(Adder.options(num_replicas=2).bind(), name="a", route_prefix="/a")
    serve.run(shout.bind(), name="b", route_prefix="/b")
    status = serve.status()
    assert isinstance(status, ServeStatus)
    assert status.target_capacity is None
    assert list(status.proxies.values()) == [ProxyStatus.HEALTHY]
    assert set(status.applications) == {"a", "b"}
    application = status.applications["a"]
    assert isinstance(application, ApplicationStatusOverview)
    assert application.status is ApplicationStatus.RUNNING
    assert 0 < application.last_deployed_time_s <= status.applications["b"].last_deployed_time_s
    deployment = application.deployments["Adder"]
    assert isinstance(deployment, DeploymentStatusOverview)
    assert deployment.status is DeploymentStatus.HEALTHY
    assert deployment.status_trigger is DeploymentStatusTrigger.CONFIG_UPDATE_COMPLETED
    assert {state: n for state, n in deployment.replica_states.items() if n} == {ReplicaState.RUNNING: 2}


def test_without_a_route_prefix_only_handles_reach_an_application(serve_instance: str) -> None:
    handle = serve.run(Adder.bind(), route_prefix=None)
    assert handle.remote(1).result() == 2
    assert requests.get(serve_instance, timeout=10).status_code == 404
    assert requests.get(f"{serve_instance}/-/routes", timeout=10).json() == {}


def test_user_config_is_given_at_the_start_and_with_a_redeploy() -> None:
    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Tuned:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        async def reconfigure(self, config: Any) -> None:
            self.seen.append(config)

        def __call__(self) -> list[Any]:
            return self.seen

    assert serve.run(Tuned.options(user_config={"a": [1, None]}).bind()).remote().result() == [{"a": [1, None]}]
    assert serve.run(Tuned.options(user_config="other").bind()).remote().result() == ["other"]
    assert serve.run(Tuned.bind()).remote().result() == []


@pytest.mark.parametrize("target", [Holder.options(user_config=1).bind(), shout.options(user_config=1).bind()])
def test_user_config_for_what_cannot_take_it_fails_the_deployment(target: Any) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Deploying application default failed.*user_config"):
        serve.run(target)


def test_an_object_reference_may_be_bound() -> None:
    """It arrives as a reference, as in Ray Serve."""

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Reader:
        def __init__(self, reference: Any) -> None:
            self.reference = reference

        def __call__(self) -> Any:
            return ray.get(self.reference)

    assert serve.run(Reader.bind(ray.put([1, 2]))).remote().result() == [1, 2]


def test_an_async_constructor_is_awaited() -> None:
    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Slow:
        async def __init__(self, value: int) -> None:  # type: ignore[misc]
            self.value = value

        def __call__(self) -> int:
            return self.value

    assert serve.run(Slow.bind(4)).remote().result() == 4


def test_autoscaling_runs_its_first_number_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    scaling = {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 5}
    with caplog.at_level(logging.WARNING, "ray.serve"):
        serve.run(Adder.options(autoscaling_config=scaling, health_check_period_s=3).bind())
    states = serve.status().applications["default"].deployments["Adder"].replica_states
    assert states[ReplicaState.RUNNING] == 2
    warned = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert [text.split("'")[3] for text in warned] == ["autoscaling_config", "health_check_period_s"]


def test_auto_runs_one_replica() -> None:
    serve.run(Adder.options(num_replicas="auto").bind())
    states = serve.status().applications["default"].deployments["Adder"].replica_states
    assert states[ReplicaState.RUNNING] == 1


def test_start_names_options_without_an_effect(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        serve.start(
            http_options={"ssl_keyfile": "k", "ssl_certfile": "c"},
            grpc_options={"port": 9001},
            logging_config={"log_level": "DEBUG"},
            tracing_config={"enabled": True},
        )
    named = {r.getMessage().split("'")[1] for r in caplog.records if "has no effect" in r.getMessage()}
    http = {"http_options.ssl_certfile", "http_options.ssl_keyfile"}
    assert named == {"grpc_options", "logging_config", "tracing_config"} | http


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"http_options": {"port": "x"}}, ValueError),
        ({"grpc_options": {"port": "x"}}, ValueError),
        ({"logging_config": {"level": "DEBUG"}}, ValueError),
        ({"tracing_config": {"sampling_ratio": 2}}, ValueError),
        ({"controller_options": {"runtime_env": {"pip": []}}}, ValueError),
        ({"proxy_location": "Nowhere"}, ValueError),
        ({"http_host": "0.0.0.0"}, ValueError),
        ({"prot": 1}, TypeError),
    ],
)
def test_start_refuses_wrong_options(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        serve.start(**options)
