"""A route whose target is a real replica, and what Python and a scraper read of it."""

from __future__ import annotations

import json
from typing import Any

import ray
from deployed import get, proxy_actor, wait_for
from http_pair import exchange, proxy_config
from worker_replica import TOKEN, serving

from rayserve_fast._core import Proxy


async def where(request: Any) -> str:
    if request.query_params.get("fail"):
        raise ValueError("on purpose")
    return f"{request.scope['root_path']} {request.url.path}"


def snapshot(unix: str | None) -> bytes:
    split = {"targets": [{"name": "a", "deployment": "a#D", "weight": 1}]}
    replica = {"id": "r1", "node_id": "n", "unix": unix, "tcp": None}
    return json.dumps(
        {
            "version": [1, 1],
            "routes": [{"prefix": "/x", "app": "a", "deployment": "", "split": "/x"}],
            "splits": {"/x": split},
            "deployments": {"a#D": {"app": "a", "name": "D", "max_ongoing_requests": 5, "replicas": [replica]}},
        }
    ).encode()


def test_a_target_sees_the_route_as_its_root_path_and_is_counted() -> None:
    proxy = Proxy(json.dumps({**proxy_config("/root"), "token": TOKEN.hex()}).encode())
    with serving(where) as replica:
        try:
            address = proxy.start()
            proxy.publish(snapshot(replica.address.unix))
            assert proxy.wait_linked(["r1"], 10) == []
            requests = b"".join(
                f"GET {path} HTTP/1.1\r\nhost: h\r\n{last}\r\n".encode()
                for path, last in [("/x/y", ""), ("/x?fail=1", "connection: close\r\n")]
            )
            answer, failed = exchange(address, requests, "GET GET")
            assert (answer.body, failed.status) == (b"/root/x /root/x/y", 500)

            def counted() -> Any:
                return json.loads(proxy.traffic())["/x"]["targets"]["a"]

            wait_for(lambda: counted()["requests"] == 2, so_far=counted)  # counted when the answer is on its way
            target = counted()
            assert target["errors"] == 1
            bounds = [bound for bound, _ in target["latency"]]
            assert bounds == sorted(bounds)
            assert sum(count for _, count in target["latency"]) == 2
            assert 'ray_serve_traffic_errors_total{route="/x",target="a"} 1\n' in proxy.metrics_text()
        finally:
            proxy.shutdown(5.0)


def test_the_proxy_actor_gives_traffic_and_its_port_the_metrics(serve_instance: str) -> None:
    assert isinstance(json.loads(ray.get(proxy_actor().traffic.remote())), dict)
    status, text = get(f"{serve_instance}/-/metrics")
    assert status == 200
    assert "# TYPE ray_serve_proxy_requests counter\n" in text
    assert text.endswith("# EOF\n")
