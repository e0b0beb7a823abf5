"""What replicas tell routers about themselves, how often they are asked, and who hears of it."""

from __future__ import annotations

import asyncio
import base64
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from deployed import get, proxy_actor, replica_actors, wait_for
from test_routing import PICKY, Group, linked

from rayserve_fast import caller, serve
from rayserve_fast.config import RequestRouterConfig
from rayserve_fast.controlplane import routing_stats
from rayserve_fast.controlplane.routing_stats import RoutingStats
from rayserve_fast.controlplane.spec import DeploymentConfig
from rayserve_fast.handle import DeploymentHandle
from rayserve_fast.replica.facts import Facts, read
from rayserve_fast.request_router import PendingRequest, RequestRouter, RunningReplica


class Object:
    """Stands for the user's object; says what it is given."""

    def __init__(self, says: Any) -> None:
        self.says = says

    def hook(self, name: str) -> Any:
        return self.says if name == "record_routing_stats" else None

    def call_hook(self, name: str) -> Any:
        return self.says


def test_a_text_stays_the_same_as_long_as_the_dicts_are_equal() -> None:
    one, other = "a" * 3, "".join(["a", "aa"])
    said = {"x": one, "y": one, "z": {3, 1}}
    facts = Facts(Object(said))  # type: ignore[arg-type]
    text = facts.routing_stats()
    assert read(text) == said
    facts._user.says = {"x": one, "y": other, "z": {1, 3}}  # type: ignore[attr-defined]
    assert pickle.dumps(facts._user.says) != pickle.dumps(said)  # type: ignore[attr-defined]
    assert facts.routing_stats() == text
    said["x"] = "b"  # the user may return the same dict each time
    facts._user.says = said  # type: ignore[attr-defined]
    assert read(facts.routing_stats())["x"] == "b"
    facts._user.says = None  # type: ignore[attr-defined]
    assert read(facts.routing_stats())["x"] == "b", "nothing said is nothing changed"


def test_what_cannot_be_compared_has_changed_if_its_pickle_has() -> None:
    np = pytest.importorskip("numpy")
    facts = Facts(Object({"x": np.zeros(2)}))  # type: ignore[arg-type]
    text = facts.routing_stats()
    assert facts.routing_stats() == text
    facts._user.says = {"x": np.ones(2)}  # type: ignore[attr-defined]
    assert list(read(facts.routing_stats())["x"]) == [1, 1]


def test_what_is_no_dict_is_refused_and_what_cannot_be_read_is_empty() -> None:
    with pytest.raises(TypeError, match="record_replica_metadata must return a dict, got int"):
        Facts(Object(3)).metadata()  # type: ignore[arg-type]
    assert Facts(Object(None)).metadata() is None  # type: ignore[arg-type]
    assert read(None) == {}
    assert read(base64.b64encode(b"cnowhere\nNobody\n.").decode()) == {}


class Asked:
    """A replica that is asked for its stats, and how often that was published."""

    def __init__(self, *replicas: str, period: float = 0.01, timeout: float = 5.0) -> None:
        router = RequestRouterConfig(
            request_routing_stats_period_s=period, request_routing_stats_timeout_s=timeout
        ).plain()
        config = DeploymentConfig(request_router_config=router)
        self.d: Any = SimpleNamespace(key="app#D", spec=SimpleNamespace(config=config))
        self.replicas: list[Any] = [SimpleNamespace(id=id, state="RUNNING", routing_stats=None) for id in replicas]
        self.published: list[list[str | None]] = []
        self.stats = RoutingStats(lambda: self.published.append([r.routing_stats for r in self.replicas]))
        self.says: Any = None
        self.asked = self.running = self.most = 0
        self.began = asyncio.Semaphore(0)

    async def ask(self) -> Any:
        self.asked, self.running = self.asked + 1, self.running + 1
        self.began.release()
        self.most = max(self.most, self.running)
        try:
            return await self.says() if callable(self.says) else self.says
        finally:
            self.running -= 1

    async def until(self, asked: int) -> None:
        asked += self.asked
        while self.asked < asked:
            await asyncio.wait_for(self.began.acquire(), 20)

    def run(self, story: Any) -> None:
        async def main() -> None:
            follow = [asyncio.ensure_future(self.stats.follow(self.d, r, self.ask)) for r in self.replicas]
            await story(self)
            for r in self.replicas:
                r.state = "STOPPING"
            await asyncio.wait_for(asyncio.gather(*follow), 5)

        asyncio.run(main())


def test_what_several_say_is_published_together_and_only_when_it_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_stats, "TOGETHER_S", 0.2)  # both are asked meanwhile, also by a loop that is held up

    async def published(it: Asked, times: int) -> None:
        while len(it.published) < times:
            await it.until(1)
        while it.stats._publishing is not None:
            await it.until(1)
        await it.until(10)

    async def story(it: Asked) -> None:
        await it.until(10)
        assert it.published == [], "nothing was said"
        it.says = "1"
        await published(it, 1)
        assert it.published == [["1", "1"]]
        it.says = "2"
        await published(it, 2)
        assert it.published == [["1", "1"], ["2", "2"]]

    Asked("r", "s").run(story)


def test_a_failure_changes_nothing_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise OSError("no stats today")

    async def story(it: Asked) -> None:
        it.says = "1"
        await it.until(2)
        it.says = fails
        await it.until(3)
        assert it.replicas[0].routing_stats == "1"
        it.says = "2"
        await it.until(2)
        assert it.replicas[0].routing_stats == "2"

    with caplog.at_level("WARNING", logger="ray.serve"):
        Asked("r").run(story)
    assert "record_routing_stats of replica r of app#D failed: no stats today" in caplog.text


def test_one_that_takes_too_long_is_waited_for_but_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    async def late() -> str:
        await asyncio.sleep(0.15)
        return "late"

    async def story(it: Asked) -> None:
        it.says = late
        await it.until(3)
        assert (it.replicas[0].routing_stats, it.most) == (None, 1)

    with caplog.at_level("WARNING", logger="ray.serve"):
        Asked("r", timeout=0.05).run(story)
    assert "takes longer than 0.05 s" in caplog.text


class Coolest(RequestRouter):
    """Sends everything to the replica that says that it is the coolest."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        known = [r for r in candidate_replicas if "heat" in r.routing_stats and r.replica_metadata]
        return [[min(known, key=lambda r: r.routing_stats["heat"])]] if known else []

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self.told = {r.replica_metadata.get("me", ""): r.routing_stats.get("heat") for r in replicas}


COOLEST = RequestRouterConfig(request_router_class=Coolest, request_routing_stats_period_s=0.1)


@serve.deployment(num_replicas=2)
class Warm:
    def __init__(self) -> None:
        self.me = serve.get_replica_context().replica_tag
        self.heat, self.asked = 0.5, 0

    async def __call__(self, request: Any = None) -> str:
        return self.me

    async def warm(self, who: str, heat: float) -> None:
        if self.me == who:
            self.heat = heat

    async def count(self) -> int:
        return self.asked

    def record_routing_stats(self) -> dict[str, float]:
        self.asked += 1
        return {"heat": self.heat}

    async def record_replica_metadata(self) -> dict[str, str]:
        return {"me": self.me}


def version() -> Any:
    return caller.current().client.version()


@pytest.mark.usefixtures("serve_instance")
class TestFacts:
    def test_a_router_goes_by_them_for_handles_and_http(self, serve_instance: str) -> None:
        handle = serve.run(Warm.options(request_router_config=COOLEST).bind())
        ids = linked(handle, 2)
        for coolest in (*ids, ids[0]):
            handle.broadcast("warm", coolest, 0.1).results()
            wait_for(lambda coolest=coolest: handle.remote().result() == coolest)  # type: ignore[misc]
            wait_for(lambda coolest=coolest: get(serve_instance)[1] == coolest)  # type: ignore[misc]
            handle.broadcast("warm", coolest, 0.9).results()
        router = caller.current().routers._customs["default#Warm"].router
        assert isinstance(router, Coolest)
        wait_for(lambda: bool(handle.remote().result()) and router.told == dict.fromkeys(ids, 0.9))

    def test_nothing_is_published_while_nothing_changes(self) -> None:
        handle = serve.run(Warm.options(request_router_config=COOLEST).bind())
        linked(handle, 2)
        wait_for(lambda: min(handle.broadcast("count").results()) > 2)
        before, asked = version(), min(handle.broadcast("count").results())
        wait_for(lambda: min(handle.broadcast("count").results()) > asked + 5)
        assert version() == before

    def test_metadata_is_part_of_a_selection(self) -> None:
        handle = serve.run(Warm.bind())

        async def main() -> None:
            async with handle.choose_replica() as selection:
                assert selection.replica_metadata == {"me": selection.replica_id}
                assert selection.to_dict()["replica_metadata"] == {"me": selection.replica_id}

        asyncio.run(main())

    def test_metadata_that_is_no_dict_fails_the_deployment(self) -> None:
        @serve.deployment(max_constructor_retry_count=1)
        class Wrong:
            def record_replica_metadata(self) -> Any:
                return ["no", "dict"]

        with pytest.raises(RuntimeError, match="record_replica_metadata must return a dict, got list"):
            serve.run(Wrong.bind())

    def test_who_has_no_such_method_is_not_asked(self) -> None:
        linked(serve.run(Group.bind()))
        addresses = ray.get([replica.address.remote() for replica in replica_actors()])
        assert [(a.has_routing_stats, a.metadata) for a in addresses] == 3 * [(False, None)]


def at_proxy(router: str) -> tuple[list[str], list[str]]:
    """Where a router in the proxy has sent requests, and which it has been told to have ended."""

    def look(self: Any) -> tuple[list[str], list[str]]:
        found = self._routing._routers._customs[router].router
        return found.routed, found.done

    told: tuple[list[str], list[str]] = ray.get(proxy_actor().__ray_call__.remote(look))
    return told


def test_a_router_hears_of_the_end_of_each_http_request(serve_instance: str) -> None:
    handle = serve.run(Group.options(name="Heard", request_router_config=PICKY).bind())
    linked(handle)
    ids = [f"request-{i}" for i in range(5)]
    for request_id in ids:
        assert get(serve_instance, headers={"x-request-id": request_id})[0] == 200
    wait_for(lambda: at_proxy("default#Heard")[1] == ids, so_far=lambda: at_proxy("default#Heard"))
    assert len(at_proxy("default#Heard")[0]) == 5


@serve.deployment
class Patient:
    def __init__(self) -> None:
        self.told = asyncio.Event()

    async def items(self) -> Any:
        yield 1
        await self.told.wait()
        yield 2

    async def hello(self) -> None:
        pass

    async def go_on(self) -> None:
        self.told.set()


@pytest.mark.usefixtures("serve_instance")
def test_a_router_hears_of_the_end_of_a_stream_and_not_of_its_first_item() -> None:
    handle = serve.run(Patient.options(request_router_config=PICKY).bind())
    items = handle.options(stream=True).items.remote()
    assert next(items) == 1
    hello = handle.hello.remote()
    hello.result()
    router: Any = caller.current().routers._customs["default#Patient"].router
    wait_for(lambda: hello.request_id in router.done)
    assert items.request_id not in router.done
    handle.go_on.remote().result()
    assert list(items) == [2]
    wait_for(lambda: items.request_id in router.done)


TWO_NODES = """
import os, sys
os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = sys.argv[1]
import ray, requests
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"slot": 1}})
cluster.add_node(num_cpus=4, resources={"slot": 1})
ray.init(address=cluster.address)
from rayserve_fast import serve
from rayserve_fast.controlplane.options import proxy_name

@serve.deployment(num_replicas=2, ray_actor_options={"resources": {"slot": 1}})
class Where:
    async def __call__(self, request=None):
        return ray.get_runtime_context().get_node_id()

serve.start(proxy_location="EveryNode", http_options={"port": 0})
handle = serve.run(Where.bind())
while len(set(handle.broadcast("__call__").results())) < 2:
    pass
here = ray.get_runtime_context().get_node_id()
near = handle.options(_prefer_local_routing=True)
print("HERE", {near.remote().result() for _ in range(20)} == {here})
print("ANYWHERE", len({handle.remote().result() for _ in range(20)}))
for node in serve.status().proxies:
    proxy = ray.get_actor(proxy_name(node), namespace="rayserve_fast")
    host, port = ray.get(proxy.__ray_call__.remote(lambda self: self._address))
    print("PROXY", {requests.get(f"http://{host}:{port}/", timeout=30).text for _ in range(20)} == {node})
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.parametrize(("prefer", "proxies"), [("1", "True"), ("0", "False")])
def test_of_two_nodes_the_callers_own_comes_first(run_script: Any, prefer: str, proxies: str) -> None:
    done = run_script(TWO_NODES, prefer)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("HERE", "ANYWHERE", "PROXY"))]
    assert told == ["HERE True", "ANYWHERE 2", f"PROXY {proxies}", f"PROXY {proxies}"]


def test_a_handle_keeps_the_preference_when_it_travels() -> None:
    handle = DeploymentHandle("D", "a").options(_prefer_local_routing=True)
    assert pickle.loads(pickle.dumps(handle))._options._prefer_local_routing
    other = DeploymentHandle("D", "a")
    other._init(_prefer_local_routing=True)
    assert other._options == handle._options
