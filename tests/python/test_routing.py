"""Routers and what goes past them, against real replicas: built-in rules, routers of one's own, broadcast, dispatch."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from typing import Any

import pytest
import ray
from deployed import until_running, wait_for

from rayserve_fast import caller, serve
from rayserve_fast.config import RequestRouterConfig
from rayserve_fast.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from rayserve_fast.handle import DeploymentHandle
from rayserve_fast.importing import import_attr
from rayserve_fast.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)


@serve.deployment(num_replicas=3, max_ongoing_requests=2)
class Group:
    def __init__(self) -> None:
        self.me = serve.get_replica_context().replica_tag
        self.cache = 0

    async def __call__(self, request: Any = None) -> str:
        return self.me

    async def add(self, value: int) -> tuple[str, int]:
        self.cache += value
        return self.me, self.cache

    async def fail_at(self, replica: str) -> str:
        if replica == self.me:
            raise KeyError(replica)
        return self.me

    async def sleep(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return self.me

    async def items(self) -> Any:
        yield self.me
        yield 2


def linked(handle: DeploymentHandle, count: int = 3) -> list[str]:
    """The ids of the replicas, once this process is linked to all."""
    deadline = time.monotonic() + 10
    while len(found := set(handle.broadcast("__call__").results())) < count:
        assert time.monotonic() < deadline
    return sorted(found)


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
        return str(response.read().decode())


@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter", "power_of_two"),
        ("ray.serve.experimental.consistent_hash_router:ConsistentHashRouter", "consistent_hash"),
        ("ray.serve.experimental.round_robin_router.RoundRobinRouter", "round_robin"),
        ("ray.serve._private.request_router.pow_2_router:PowerOfTwoChoicesRequestRouter", "power_of_two"),
        ("rayserve_fast.request_router:LeastLoadedRequestRouter", "least_loaded"),
    ],
)
def test_built_in_routers_are_rules_of_the_engine_by_either_name(router: str, policy: str) -> None:
    own = router.replace("ray.serve.", "rayserve_fast.")
    for given in (router, own, import_attr(own)):
        plain = RequestRouterConfig(request_router_class=given).plain()
        assert (plain["policy"], plain["custom"]) == (policy, None)
    assert RequestRouterConfig().plain()["policy"] == "least_loaded"


@pytest.mark.usefixtures("serve_instance")
class TestBroadcast:
    def test_every_replica_gets_the_call_once(self) -> None:
        handle = serve.run(Group.bind())
        replicas = linked(handle)
        assert sorted(handle.broadcast("add", 1).results()) == [(replica, 1) for replica in replicas]
        assert sorted(handle.broadcast("add", value=2).results(timeout_s=10)) == [(replica, 3) for replica in replicas]

    def test_it_waits_for_a_slot_of_each(self) -> None:
        handle = serve.run(Group.options(max_queued_requests=1).bind())
        replicas = linked(handle)
        busy = [handle.broadcast("sleep", 0.5) for _ in range(2)]
        assert sorted(handle.broadcast("__call__").results()) == replicas
        for broadcast in busy:
            assert sorted(broadcast.results()) == replicas

    def test_an_error_is_raised_or_returned(self) -> None:
        handle = serve.run(Group.bind())
        replicas = linked(handle)
        with pytest.raises(KeyError):
            handle.broadcast("fail_at", replicas[0]).results()
        answers = handle.broadcast("fail_at", replicas[0]).results(return_exceptions=True)
        assert sorted(answer for answer in answers if isinstance(answer, str)) == replicas[1:]
        assert [type(answer).__name__ for answer in answers if not isinstance(answer, str)] == [
            "RayTaskError(KeyError)"
        ]
        with pytest.raises(TimeoutError):
            handle.broadcast("sleep", 5).results(timeout_s=0.05)

    def test_from_within_a_replica(self, serve_instance: str) -> None:
        @serve.deployment
        class Front:
            def __init__(self, group: DeploymentHandle) -> None:
                self.group = group

            async def __call__(self, request: Any) -> list[str]:
                first = self.group.broadcast("add", 1)  # this process has never called the group before
                with pytest.raises(RuntimeError):
                    first.results()
                return sorted(name for name, _ in await first.results_async(timeout_s=10))

        serve.run(Front.bind(Group.bind()))
        assert len(json.loads(get(serve_instance))) == 3

    def test_of_a_deployment_that_does_not_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rayserve_fast.selection.KNOWN_S", 0.3)
        with pytest.raises(DeploymentUnavailableError, match="does not exist"):
            DeploymentHandle("Nobody", "nowhere").broadcast("x").results()


@pytest.mark.usefixtures("serve_instance")
class TestSelection:
    def test_the_chosen_replica_answers_and_its_slot_is_kept_meanwhile(self) -> None:
        handle = serve.run(Group.bind())
        replicas = linked(handle)

        async def main() -> None:
            chosen = []
            for _ in range(6):
                context = handle.add.choose_replica()
                chosen.append((context, await context.__aenter__()))
            ids = [selection.replica_id for _, selection in chosen]
            assert sorted(ids) == sorted(2 * replicas), "all slots of all replicas"
            waiting = handle.remote()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(later(waiting))), 0.2)
            for _, selection in chosen:
                assert (await handle.dispatch(selection, 1))[0] == selection.replica_id
            for context, _ in chosen:
                await context.__aexit__(None, None, None)
            assert await waiting in replicas
            async with handle.choose_replica() as selection:
                pass  # not used: the slot comes back
            assert [await handle.remote() for _ in range(6)]

        asyncio.run(main())

    def test_what_it_says_and_refuses(self) -> None:
        handle = serve.run(Group.bind(), name="one", route_prefix="/one")
        other = serve.run(Group.bind(), name="two", route_prefix="/two")

        async def main() -> None:
            async with handle.items.options(stream=True).choose_replica() as selection:
                assert selection.to_dict().keys() == {
                    "replica_id", "node_ip", "port", "node_id", "availability_zone", "replica_metadata"
                }  # fmt: skip
                assert selection.address == f"{selection.node_ip}:{selection.port}"
                with pytest.raises(ValueError, match="one"):
                    other.dispatch(selection)
                streamed = handle.options(stream=True).dispatch(selection)
                assert [item async for item in streamed] == [selection.replica_id, 2]
                with pytest.raises(RuntimeError, match="already been dispatched"):
                    handle.dispatch(selection)
            async with handle.choose_replica() as unused:
                pass
            with pytest.raises(RuntimeError, match=f"block that chose {unused.replica_id} has ended"):
                handle.dispatch(unused)

        asyncio.run(main())

    def test_a_replica_that_has_gone_is_not_replaced(self) -> None:
        handle = serve.run(Group.bind())

        async def main() -> None:
            async with handle.choose_replica() as selection:
                await asyncio.to_thread(serve.run, Group.options(num_replicas=1).bind())
                with pytest.raises(ReplicaUnavailableError):
                    await handle.dispatch(selection)

        asyncio.run(main())


class Picky(FIFOMixin, MultiplexMixin, RequestRouter):
    """Sends what asks for it to the first replica in alphabetical order; notes what it is told."""

    def initialize_state(self, *, favourite: str) -> None:
        self.favourite = favourite
        self.routed: list[str] = []
        self.done: list[str] = []

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        assert pending_request is not None
        ordered = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        meta = pending_request.metadata
        if meta.call_method == "fail_at":
            raise OSError("the router fails")
        if meta.session_id == self.favourite or pending_request.args == [self.favourite]:
            return [ordered[:1]]
        return [ordered]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        self.routed.append(replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.done.append(internal_request_id)


class InOrder(RequestRouter):
    """Each replica is a rank of its own, in alphabetical order."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [[one] for one in sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)]


PICKY = RequestRouterConfig(request_router_class=Picky, request_router_kwargs={"favourite": "first"})


@pytest.mark.usefixtures("serve_instance")
def test_a_session_is_at_its_replica_from_the_first_call_of_a_process() -> None:
    handle = serve.run(Group.options(num_replicas=4).bind())
    linked(handle, 4)
    sessions = [f"session-{i}" for i in range(4)]
    homes = {name: handle.options(session_id=name).remote().result() for name in sessions}

    @ray.remote(max_calls=1, num_cpus=0)
    def fresh(handle: DeploymentHandle, name: str) -> list[str]:
        return [handle.options(session_id=name).remote().result(timeout_s=20) for _ in range(8)]

    for name, home in homes.items():
        assert ray.get(fresh.remote(handle, name)) == [home] * 8


@pytest.mark.usefixtures("serve_instance")
class TestCustomRouters:
    def test_it_chooses_for_handles_and_http(self, serve_instance: str) -> None:
        handle = serve.run(Group.options(request_router_config=PICKY).bind())
        replicas = linked(handle)
        for _ in range(4):
            assert handle.options(session_id="first").remote().result() == replicas[0]
            assert handle.remote("first").result() == replicas[0], "by its argument"
            assert get(serve_instance, x_session_id="first") == replicas[0]
        spread = [handle.sleep.remote(0.3) for _ in range(6)]
        assert {response.result() for response in spread} == set(replicas)
        router = caller.current().routers._customs["default#Group"].router
        assert isinstance(router, Picky)
        assert len(router.routed) == 14
        wait_for(lambda: len(router.done) == 14, 10)

    def test_what_finds_no_room_is_tried_again(self) -> None:
        handle = serve.run(Group.options(request_router_config=PICKY).bind())
        replicas = linked(handle)
        mine = handle.options(session_id="first", method_name="sleep")
        began = time.monotonic()
        assert {response.result() for response in [mine.remote(0.3) for _ in range(4)]} == {replicas[0]}
        assert time.monotonic() - began >= 0.6, "two at once, though the other replicas were idle"

    def test_a_lower_rank_with_a_free_slot_is_taken_before_a_backlog(self) -> None:
        in_order = RequestRouterConfig(request_router_class=InOrder)
        handle = serve.run(Group.options(request_router_config=in_order).bind())
        replicas = linked(handle)
        for _ in range(50):  # so short that a backlog is allowed
            assert handle.remote().result() == replicas[0]
        responses = [handle.sleep.remote(0.5) for _ in range(6)]
        assert sorted(response.result() for response in responses) == sorted(2 * replicas)

    def test_its_failure_costs_no_request(self) -> None:
        handle = serve.run(Group.options(request_router_config=PICKY).bind())
        replicas = linked(handle)
        assert handle.fail_at.remote("nobody").result() in replicas

    def test_a_cancelled_call_is_not_routed_any_more(self) -> None:
        handle = serve.run(Group.options(request_router_config=PICKY, max_queued_requests=2).bind())
        linked(handle)
        mine = handle.options(session_id="first", method_name="sleep")
        busy = [mine.remote(1) for _ in range(2)]
        until_running(2)
        waiting = [mine.remote(0) for _ in range(2)]
        with pytest.raises(BackPressureError):
            mine.remote(0).result()
        for response in waiting:
            response.cancel()
        assert [response.result() for response in busy]
        assert mine.remote(0).result()

    def test_it_is_asked_by_choose_replica_too(self) -> None:
        handle = serve.run(Group.options(request_router_config=PICKY).bind())
        replicas = linked(handle)

        async def main() -> None:
            async with handle.options(session_id="first").choose_replica() as selection:
                assert selection.replica_id == replicas[0]
                assert await handle.dispatch(selection) == replicas[0]

        asyncio.run(main())


async def later(response: Any) -> Any:
    return await response
