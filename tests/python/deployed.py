"""What the tests of the control plane deploy, and how they look at it from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import ray
import requests

from rayserve_fast import serve


def get(url: str, **kwargs: Any) -> tuple[int, str]:
    response = requests.get(url, timeout=30, **kwargs)
    return response.status_code, response.text


def code(version: str, name: str = "Code", **options: Any) -> Any:
    """An application that answers its version and its process."""

    @serve.deployment(name=name, **options)
    async def code(request: Any) -> str:
        return f"{version} {os.getpid()}"

    return code.bind()


def replica_states(app: str = "default") -> dict[str, int]:
    (deployment,) = serve.status().applications[app].deployments.values()
    return {state.value: n for state, n in deployment.replica_states.items() if n}


def actor_pid(name: str) -> int:
    actor = ray.get_actor(name, namespace="rayserve_fast")
    pid: int = ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid()))
    return pid


def proxy_counters() -> dict[str, int]:
    (node,) = serve.status().proxies
    proxy = ray.get_actor(f"SERVE_PROXY_ACTOR-{node}", namespace="rayserve_fast")
    counters: dict[str, int] = ray.get(proxy.counters.remote())
    return counters


def wait_for(
    holds: Callable[[], bool], seconds: float = 20, so_far: Callable[[], object] = lambda: "it never came to hold"
) -> None:
    """Return when it holds; what `so_far` gives is in the error if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"after {seconds} s: {so_far()}"
        time.sleep(0.02)  # no event tells
