"""Traffic split over real replicas through a real proxy: shares, changes under load, rules, sticky users, shadows."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections import Counter
from typing import Any

import pytest
import requests
from deployed import code, crash_proxy, get, wait_for
from load import Load

from rayserve_fast import serve


@pytest.fixture
def route() -> str:
    """One that no test has used: counters stay as long as the proxy runs."""
    return f"/{secrets.token_hex(4)}"


def deploy(*names: str, **options: Any) -> None:
    """Applications without a route that answer their name."""
    for name in names:
        serve.run(code(name, max_ongoing_requests=100, **options), name=name, route_prefix=None)


def answers(url: str, n: int, **kwargs: Any) -> Counter[str]:
    """Who answered n requests of one connection."""
    with requests.Session() as session:
        return Counter(session.get(url, timeout=10, **kwargs).text.split()[0] for _ in range(n))


def test_each_target_gets_its_share_exactly_and_the_figures_say_so(serve_instance: str, route: str) -> None:
    deploy("a", "b", "c")
    serve.set_traffic(route, {"a": 0.6, "b": 0.3, "c": 0.1})
    counted = answers(serve_instance + route, 500)
    assert counted == {"a": 300, "b": 150, "c": 50}
    traffic = serve.get_traffic(route)
    assert {name: t.requests for name, t in traffic.targets.items()} == counted
    assert {name: t.weight for name, t in traffic.targets.items()} == {"a": 0.6, "b": 0.3, "c": 0.1}
    for t in traffic.targets.values():
        assert (t.errors, t.ready_replicas) == (0, 1)
        assert t.p50_ms is not None
        assert t.p95_ms is not None
        assert t.p99_ms is not None
        assert 0 < t.p50_ms <= t.p95_ms <= t.p99_ms
    assert serve.get_traffic().keys() == {route}
    page = get(f"{serve_instance}/-/metrics")[1]
    told = re.findall(rf'^ray_serve_traffic_requests_total{{route="{route}",target="(\w+)"}} (\d+)$', page, re.M)
    assert {name: int(n) for name, n in told} == counted


def test_a_target_sees_the_route_as_its_root_path(serve_instance: str) -> None:
    @serve.deployment
    async def path(request: Any) -> list[str]:
        return [request.scope["root_path"], request.url.path]

    serve.run(path.bind(), name="path", route_prefix=None)
    serve.set_traffic("/deep/er", {"path": 1.0})
    assert requests.get(f"{serve_instance}/deep/er/leaf", timeout=10).json() == ["/deep/er", "/deep/er/leaf"]
    serve.delete_traffic("/deep/er")
    assert get(f"{serve_instance}/deep/er/leaf")[0] == 404


def test_the_owner_of_a_route_has_it_again_when_the_traffic_is_deleted(serve_instance: str, route: str) -> None:
    deploy("b")
    serve.run(code("a", max_ongoing_requests=100), name="a", route_prefix=route)
    serve.set_traffic(route, {"a": 0.0, "b": 1.0})
    assert answers(serve_instance + route, 10) == {"b": 10}
    serve.delete_traffic(route)
    assert answers(serve_instance + route, 10) == {"a": 10}


def test_weights_change_under_load_and_no_request_is_lost(serve_instance: str, route: str) -> None:
    deploy("a", "b")
    serve.set_traffic(route, {"a": 1.0, "b": 0.0})
    with Load(serve_instance + route, rate=500) as load:
        for i in range(20):
            share = (i % 11) / 10
            serve.set_traffic(route, {"a": 1 - share, "b": share})
            load.wait(50)
    assert load.failures == {}
    assert load.total >= 1000
    assert {body.split()[0] for _, body in load.answers} == {"a", "b"}


def test_a_redeploy_of_a_target_loses_no_request(serve_instance: str, route: str) -> None:
    deploy("a", "b")
    serve.set_traffic(route, {"a": 0.5, "b": 0.5})
    with Load(serve_instance + route, rate=200) as load:
        deploy("b")
    assert load.failures == {}


def test_a_rule_sends_a_canary_where_the_weights_would_not(serve_instance: str, route: str) -> None:
    deploy("a", "b")
    serve.set_traffic(
        route,
        {"a": 1.0},
        rules=[{"header": "X-Canary", "value": "1", "target": "b"}, {"cookie": "beta", "target": "b"}],
    )
    url = serve_instance + route
    assert answers(url, 10) == {"a": 10}
    assert answers(url, 10, headers={"x-canary": "1"}) == {"b": 10}
    assert answers(url, 10, headers={"x-canary": "2"}) == {"a": 10}
    assert answers(url, 10, cookies={"beta": "any"}) == {"b": 10}


def test_a_growing_share_only_moves_users_to_it(serve_instance: str, route: str) -> None:
    deploy("a", "b")

    def homes() -> dict[int, str]:
        found = {}
        for user in range(100):
            (found[user],) = answers(serve_instance + route, 2, cookies={"session": f"user{user}"})
        return found

    serve.set_traffic(route, {"a": 0.8, "b": 0.2}, sticky_cookie="session")
    before = homes()
    serve.set_traffic(route, {"a": 0.4, "b": 0.6}, sticky_cookie="session")
    after = homes()
    assert {before[user] for user in before if after[user] == "a"} == {"a"}
    assert 5 < Counter(before.values())["b"] < 40
    assert 40 < Counter(after.values())["b"] < 80


def test_a_shadow_gets_copies_and_a_hung_one_is_no_burden(serve_instance: str, route: str) -> None:
    @serve.deployment(graceful_shutdown_timeout_s=0.5)
    async def hung(request: Any) -> str:
        await asyncio.sleep(3600)
        return ""

    deploy("a", "c")
    serve.run(hung.bind(), name="hung", route_prefix=None)
    serve.set_traffic(route, {"a": 1.0})
    serve.shadow_traffic(route, "c", 0.5)
    serve.shadow_traffic(route, "hung", 1.0)
    assert answers(serve_instance + route, 200) == {"a": 200}

    def shadow(name: str) -> Any:
        return serve.get_traffic(route).shadows[name]

    wait_for(lambda: shadow("c").answered == 100)
    assert (shadow("c").copied, shadow("c").errors, shadow("c").dropped) == (100, 0, 0)
    assert shadow("hung").answered == 0
    for name in ("c", "hung"):
        serve.shadow_traffic(route, name, 0)
    assert answers(serve_instance + route, 10) == {"a": 10}
    assert serve.get_traffic(route).shadows == {}


def test_errors_are_counted_of_the_target_that_made_them(serve_instance: str, route: str) -> None:
    @serve.deployment
    async def broken(request: Any) -> str:
        raise ValueError("broken")

    deploy("a")
    serve.run(broken.bind(), name="broken", route_prefix=None)
    serve.set_traffic(route, {"a": 0.75, "broken": 0.25})
    with requests.Session() as session:  # one connection is one thread of the proxy, which is exact
        statuses = Counter(session.get(serve_instance + route, timeout=10).status_code for _ in range(40))
    assert statuses == {200: 30, 500: 10}
    targets = serve.get_traffic(route).targets
    assert (targets["a"].requests, targets["a"].errors) == (30, 0)
    assert (targets["broken"].requests, targets["broken"].errors) == (10, 10)


def test_a_target_whose_replicas_are_gone_gets_no_share_until_they_are_back(serve_instance: str, route: str) -> None:
    deploy("a", "b")
    serve.set_traffic(route, {"a": 0.5, "b": 0.5})
    pid = next(body.split()[1] for body in (get(serve_instance + route)[1] for _ in range(4)) if body.startswith("b"))
    os.kill(int(pid), 9)
    wait_for(lambda: serve.get_traffic(route).targets["b"].ready_replicas == 0)
    wait_for(lambda: serve.get_traffic(route).targets["b"].ready_replicas == 1)
    assert answers(serve_instance + route, 100).keys() == {"a", "b"}


def test_a_crashed_proxy_splits_as_before_and_counts_anew(serve_instance: str, route: str) -> None:
    deploy("a", "b")
    serve.set_traffic(route, {"a": 0.5, "b": 0.5})
    assert answers(serve_instance + route, 20) == {"a": 10, "b": 10}
    crash_proxy(serve_instance + route)
    before = sum(t.requests for t in serve.get_traffic(route).targets.values())
    assert before < 20
    assert answers(serve_instance + route, 20) == {"a": 10, "b": 10}
    assert sum(t.requests for t in serve.get_traffic(route).targets.values()) == before + 20


@pytest.mark.parametrize("route", ["/", "/x/y"])
def test_any_route_can_be_split(serve_instance: str, route: str) -> None:
    deploy("a", "b")
    serve.set_traffic(route, {"a": 0.5, "b": 0.5})
    assert answers(serve_instance + route, 10) == {"a": 5, "b": 5}
