"""One bad value in one application never keeps the others from being deployed, served and redeployed."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
import ray
from deployed import code, get, until_running, wait_for

from rayserve_fast import serve
from rayserve_fast._core import check_snapshot
from rayserve_fast.api import _cluster_options
from rayserve_fast.application import RunTarget, build_target
from rayserve_fast.controlplane import client, replicas
from rayserve_fast.controlplane.proxies import Fleet, _Proxy
from rayserve_fast.controlplane.spec import ApplicationSpec
from rayserve_fast.exceptions import RayServeException


@pytest.mark.parametrize(
    "options",
    [
        {"max_ongoing_requests": 2**32},
        {"max_ongoing_requests": 2**64, "max_queued_requests": 2**64},
        {"max_queued_requests": 2**63},
        {"max_batch_size": 4, "max_concurrent_batches": sys.maxsize},
    ],
)
def test_a_limit_that_nobody_meets_is_none(serve_instance: str, options: dict[str, Any]) -> None:
    @serve.deployment(**options)
    async def limited(request: Any) -> Any:
        return ["limited"] * len(request) if isinstance(request, list) else "limited"

    serve.run(limited.bind(), name="limited", route_prefix="/limited")
    assert get(f"{serve_instance}/limited") == (200, "limited")
    serve.run(code("other"), name="other", route_prefix="/other")
    assert get(f"{serve_instance}/other")[1].startswith("other")
    config = specification("limited").deployments[0].config
    assert {name: getattr(config, name) for name in options} == options, "what the user gave is kept"


def test_a_batched_function_takes_limits_that_nobody_meets(serve_instance: str) -> None:
    @serve.deployment
    class Batched:
        @serve.batch(max_batch_size=2**64, batch_wait_timeout_s=0, max_concurrent_batches=2**64)
        async def __call__(self, items: list[Any]) -> list[Any]:
            return items

    assert serve.run(Batched.bind(), route_prefix=None).remote("item").result() == "item"


@pytest.mark.parametrize("grace", [float("inf"), 1e300])
def test_a_replica_that_has_for_ever_to_finish_does(serve_instance: str, grace: float) -> None:
    @serve.deployment(graceful_shutdown_timeout_s=grace)
    async def slow(request: Any) -> str:
        await asyncio.sleep(2)
        return "slow"

    serve.run(slow.bind())
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(get(serve_instance)))
    asking.start()
    until_running(1)
    serve.run(code("new"))
    asking.join(20)
    assert answers == [(200, "slow")]


def test_ids_of_models_and_sessions_are_text_that_travels(serve_instance: str) -> None:
    @serve.deployment
    class Models:
        @serve.multiplexed
        async def load(self, model_id: str) -> str:
            return f"model {model_id}"

        async def __call__(self, name: str) -> str:
            return await self.load(chr(0xD800) if name == "bad" else name)

    handle = serve.run(Models.bind(), route_prefix=None)
    for option in ("multiplexed_model_id", "session_id", "method_name"):
        with pytest.raises(ValueError, match=f"{option}: .* cannot be encoded as UTF-8"):
            handle.options(**{option: "\ud800"}).remote("a")
    with pytest.raises(ValueError, match=r"model_id: .* cannot be encoded as UTF-8"):
        handle.remote("bad").result()
    assert handle.options(multiplexed_model_id="good").remote("good").result() == "model good"


@pytest.mark.parametrize(
    ("name", "prefix"), [(3, "/bad"), ("\ud800", "/bad"), ("bad", "/\ud800"), ("bad", "/bad")], ids=repr
)
def test_what_proxies_cannot_read_is_refused_and_nothing_else_is_touched(
    serve_instance: str, name: Any, prefix: str
) -> None:
    """The controller asks the proxies' own parser, whatever let the value through before it."""
    serve.run(code("old"), name="old", route_prefix="/old")
    spec = build_target(RunTarget(code("bad"), "bad", "/bad"), {})
    deployments = [replace(each, app=name) for each in spec.deployments]
    if (name, prefix) == ("bad", "/bad"):
        deployments = [replace(each, config=replace(each.config, max_queued_requests=0.5)) for each in deployments]
    bad = replace(spec, name=name, route_prefix=prefix, deployments=tuple(deployments))
    with pytest.raises(RayServeException, match=r"(?s)^The application .* is refused, as no proxy could read"):
        client.ask("deploy", [bad])
    assert list(serve.status().applications) == ["old"]
    serve.run(code("new"), name="old", route_prefix="/old")
    assert get(f"{serve_instance}/old")[1].startswith("new")


def test_traffic_that_proxies_cannot_read_is_refused(serve_instance: str) -> None:
    serve.run(code("a"), name="a", route_prefix="/a")
    with pytest.raises(RayServeException, match="The change of the traffic of '/a' is refused"):
        client.ask("set_traffic", "/a", {"a": 1.0}, {"header": "\ud800"})
    assert serve.get_traffic() == {}
    serve.run(code("b"), name="a", route_prefix="/a")
    assert get(f"{serve_instance}/a")[1].startswith("b")


@pytest.fixture(params=["controller", "proxies"])
def unreadable(serve_instance: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Two functions: from now on the snapshot is unreadable, as the controller or only proxies tell; and no more."""

    def spoil(controller: Any, unchecked: bool) -> None:
        from rayserve_fast.controlplane import snapshot

        build = snapshot.build
        controller._spared = build, snapshot.check_snapshot, snapshot.check
        snapshot.build = lambda *args: build(*args).replace(b'"routes":', b'"routes":1,"spared":')
        snapshot.check = lambda *args: None
        if unchecked:
            snapshot.check_snapshot = lambda json: None

    def mend(controller: Any) -> None:
        from rayserve_fast.controlplane import snapshot

        if hasattr(controller, "_spared"):
            snapshot.build, snapshot.check_snapshot, snapshot.check = controller._spared
            del controller._spared
            controller._loop.get_loop().call_soon_threadsafe(controller.publish)

    controller = client.require()
    yield (
        lambda: ray.get(controller.__ray_call__.remote(spoil, request.param == "proxies")),
        lambda: ray.get(controller.__ray_call__.remote(mend)),
    )
    ray.get(controller.__ray_call__.remote(mend))


def test_a_refused_snapshot_is_told_and_leaves_the_old_replica_serving(
    serve_instance: str, unreadable: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, mend = unreadable
    serve.run(code("old"))
    spoil()
    redeploy = threading.Thread(target=serve.run, args=[code("new")], daemon=True)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        redeploy.start()
        wait_for(lambda: "refuses the routing table: snapshot cannot be read" in caplog.text, 30)
    assert get(serve_instance)[1].startswith("old")
    assert redeploy.is_alive(), "it is not ready"
    mend()
    redeploy.join(30)
    assert get(serve_instance)[1].startswith("new")


def test_neither_a_late_answer_nor_a_new_proxy_hides_that_nobody_could_read_the_last_snapshot() -> None:
    async def main() -> None:
        fleet = Fleet(_cluster_options("Disabled", None), b"", "", lambda: None)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        handle = SimpleNamespace(publish=SimpleNamespace(remote=lambda snapshot: answer))
        fleet._proxies["a"] = _Proxy("a", handle, "HEALTHY", address=("a", 1))
        sent = fleet.publish(b"{}")
        fleet.refuse("it is nonsense")
        answer.set_result(None)
        await asyncio.gather(*sent)
        assert await fleet.refusal() == "it is nonsense"
        fleet._proxies["b"] = _Proxy("b", handle, "HEALTHY", address=("b", 1))
        assert await fleet.refusal() == "it is nonsense"
        fleet.publish(b"{}")
        assert await fleet.refusal() == ""

    asyncio.run(main())


def test_that_a_replica_stays_is_told_once_for_each_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas, "REFUSAL_LOOK_S", 0)
    fleet: Any = SimpleNamespace(refusal=AsyncMock(side_effect=["bad", "bad", "worse", "worse"]))
    staying = replicas.Replicas(fleet, b"", "", 30, SimpleNamespace(publish=None))  # type: ignore[arg-type]
    staying._handles["r"] = None
    deployment: Any = SimpleNamespace(deleting=False, key="app#D")
    with pytest.raises(StopAsyncIteration):  # nobody is asked any more
        asyncio.run(staying._retire(deployment, SimpleNamespace(id="r")))  # type: ignore[arg-type]
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == ["bad", "worse"]


def test_the_parser_says_what_is_wrong() -> None:
    check_snapshot(b'{"version": [0, 0]}')
    with pytest.raises(ValueError, match="snapshot cannot be read: invalid type"):
        check_snapshot(b'{"version": [0, 0], "routes": 1}')


def specification(app: str) -> ApplicationSpec:
    found: ApplicationSpec = client.ask("specification", app)
    return found
