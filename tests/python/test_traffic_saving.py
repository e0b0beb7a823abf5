"""Orders and decisions that cannot be saved change nothing, those that can are carried out once; and how the end of a
rollout is waited for. Without Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from deployed import wait_for
from test_traffic_state import app

from rayserve_fast.controlplane import client, store
from rayserve_fast.controlplane.rollout import Plan, RolloutStatus
from rayserve_fast.controlplane.rollout_orders import RolloutOrders
from rayserve_fast.controlplane.traffic import Traffic
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.traffic import Rollout

PLAN = Plan((0.5, 1.0), 0.05, 0.05, 1, 0.01, None, None)


class Failing:
    """Proxies that have counted ten failed requests more of `b` at each reading."""

    def __init__(self) -> None:
        self.requests = 0

    async def traffic(self) -> Any:
        self.requests += 10
        latency = [[1000, self.requests]]
        counted = {"requests": self.requests, "errors": self.requests, "latency": latency}
        return {"proxy": {"/x": {"targets": {"b": counted}, "shadows": {}}}}


class Orders(RolloutOrders):
    """What the controller has of them: an application at /x, two without a route, and a backend."""

    def __init__(self) -> None:
        self._apps = {a.name: a for a in (app("a", "/x"), app("b"), app("c"), app("old", era="backend"))}
        self._traffic = Traffic()
        self._recovered = asyncio.Event()
        self._recovered.set()
        self._news = asyncio.Event()
        self._driving = {}
        self._fleet = Failing()  # type: ignore[assignment]
        self.published: list[str] = []

    def publish(self) -> list[Any]:
        self.published.append(repr(self._traffic.splits))
        self._news.set()
        self._news = asyncio.Event()
        return []


class Store:
    """Keeps what is saved, unless it is `full`."""

    def __init__(self) -> None:
        self.full = False
        self.refused = 0
        self.saved: Traffic | None = None

    def save(self, traffic: Traffic) -> None:
        if self.full:
            self.refused += 1
            raise RuntimeError("the store is full")
        self.saved = pickle.loads(pickle.dumps(traffic))


class Calls:
    """Stands for Ray: each call has an id of its own, until one is told to be `repeated`."""

    def __init__(self) -> None:
        self.count = 0
        self.repeated = False

    def context(self) -> Any:
        self.count += not self.repeated
        return SimpleNamespace(get_task_id=lambda: f"call {self.count}")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Store:
    kept = Store()
    monkeypatch.setattr(store, "save_traffic", kept.save)
    return kept


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(ray, "get_runtime_context", calls.context)
    return calls


Order = Callable[[Orders], Coroutine[Any, Any, None]]


async def prepare(orders: Orders) -> None:
    await orders.set_traffic("/x", {"a": 0.5, "b": 0.5})
    await orders.shadow_traffic("/x", "c", 0.5)
    await orders.create_endpoint("e", "/e", ["GET"], {"old": 1.0})


@pytest.mark.parametrize(
    "order",
    [
        lambda o: o.set_traffic("/x", {"a": 1.0}),
        lambda o: o.set_traffic("/new", {"b": 1.0}),
        lambda o: o.shadow_traffic("/x", "c", 0),
        lambda o: o.delete_traffic("/x"),
        lambda o: o.create_endpoint("f", "/f"),
        lambda o: o.delete_endpoint("e"),
        lambda o: o.start_rollout("id", "/x", "b", Plan((1.0,), 60, 60, 1, 0.01, None, None)),
    ],
)
def test_an_order_that_cannot_be_saved_has_changed_nothing_and_may_be_given_again(
    kept: Store, calls: Calls, order: Order
) -> None:
    async def main() -> None:
        orders = Orders()
        await prepare(orders)
        before, published = repr(orders._traffic), len(orders.published)
        kept.full = True
        with pytest.raises(RuntimeError, match="the store is full"):
            await order(orders)
        assert repr(orders._traffic) == before
        assert len(orders.published) == published
        assert not orders._driving
        kept.full = False
        await order(orders)
        assert repr(orders._traffic) != before
        assert repr(kept.saved) == repr(orders._traffic)
        for driving in orders._driving.values():
            driving.cancel()

    asyncio.run(main())


@pytest.mark.parametrize(
    "order",
    [
        lambda o: o.delete_traffic("/x"),
        lambda o: o.create_endpoint("f", "/f"),
        lambda o: o.delete_endpoint("e"),
    ],
)
def test_an_order_that_ray_repeats_is_carried_out_once_and_published_again(
    kept: Store, calls: Calls, order: Order
) -> None:
    async def main() -> None:
        orders = Orders()
        await prepare(orders)
        await order(orders)
        restarted = Orders()
        restarted._traffic = kept.saved or Traffic()
        calls.repeated = True
        await order(restarted)
        assert restarted.published == orders.published[-1:]
        calls.repeated = False
        with pytest.raises((ValueError, RayServeException), match=r"registered|no traffic settings"):
            await order(restarted)  # a call of its own is judged by what there is now

    asyncio.run(main())


def test_a_decision_is_taken_again_until_it_is_saved(kept: Store, calls: Calls) -> None:
    async def main() -> None:
        orders = Orders()
        await orders.start_rollout("id", "/x", "b", PLAN)
        kept.full = True
        await asyncio.to_thread(wait_for, lambda: kept.refused)
        assert (await orders.rollout_status("/x", "id")).state == "RUNNING", "what is not in force is not told"
        assert orders._traffic.splits["/x"].weights == {"a": 0.5, "b": 0.5}
        kept.full = False
        status = await orders.rollout_over("/x", "id")
        assert [d.action for d in status.history] == ["start", "roll_back"]
        assert kept.saved is not None
        assert kept.saved.rollouts["/x"].state == "ROLLED_BACK"
        assert kept.saved.splits["/x"].weights == {"a": 1.0, "b": 0.0}
        assert orders.published[-1] == repr(kept.saved.splits)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_an_abort_that_cannot_be_saved_leaves_the_rollout_running(kept: Store, calls: Calls) -> None:
    async def main() -> None:
        orders = Orders()
        await orders.start_rollout("id", "/x", "b", Plan((0.5,), 60, 60, 1, 1, None, None))
        kept.full = True
        with pytest.raises(RuntimeError, match="the store is full"):
            await orders.order_rollout("/x", "id", "abort")
        assert (await orders.rollout_status("/x", "id")).state == "RUNNING"
        kept.full = False
        await orders.order_rollout("/x", "id", "abort")
        assert orders._traffic.splits["/x"].weights == {"a": 1.0, "b": 0.0}

    asyncio.run(asyncio.wait_for(main(), 20))


def test_who_waits_for_a_rollout_is_answered_in_time_and_leaves_nothing_behind(kept: Store, calls: Calls) -> None:
    async def main() -> None:
        orders = Orders()
        await orders.start_rollout("id", "/x", "b", Plan((0.5,), 60, 60, 1, 1, None, None))
        before = len(asyncio.all_tasks())
        status = await orders.rollout_over("/x", "id", 0.05)
        assert not status.over
        assert len(asyncio.all_tasks()) == before
        waiting = asyncio.ensure_future(orders.rollout_over("/x", "id"))
        await asyncio.sleep(0)
        await orders.order_rollout("/x", "id", "abort")
        assert (await waiting).state == "ABORTED"

    asyncio.run(asyncio.wait_for(main(), 9))


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_waiting_asks_again_until_the_rollout_is_over(monkeypatch: pytest.MonkeyPatch, timeout_s: float | None) -> None:
    states, given = ["RUNNING", "PAUSED", "COMPLETED"], []

    def ask(method: str, name: str, id: str, wait_s: float | None, *, timeout_s: float | None) -> RolloutStatus:
        assert (method, name, id, wait_s) == ("rollout_over", "/x", "id", timeout_s), "the controller waits no longer"
        given.append(wait_s)
        return RolloutStatus("/x", "b", states[len(given) - 1], 1, (1.0,), 1.0, None, ())

    monkeypatch.setattr(client, "ask", ask)
    assert Rollout("/x", "id").wait(timeout_s).state == "COMPLETED"
    assert given[0] == timeout_s
    assert given == sorted(given, key=lambda left: -(left or 0.0)), "no answer makes the time longer"


def test_waiting_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running = RolloutStatus("/x", "b", "RUNNING", 1, (1.0,), 1.0, None, ())
    monkeypatch.setattr(client, "ask", lambda *_, **__: running)
    with pytest.raises(TimeoutError, match="was not over after 0 s"):
        Rollout("/x", "id").wait(0)
