"""What the tests of the control plane deploy, and how they look at it from outside."""

from __future__ import annotations

import os
import signal
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


@ray.remote
def plus_one(value: Any) -> Any:
    return value + 1


@ray.remote
def failing() -> None:
    raise ValueError("in the task")


def replica_states(app: str = "default") -> dict[str, int]:
    (deployment,) = serve.status().applications[app].deployments.values()
    return {state.value: n for state, n in deployment.replica_states.items() if n}


def actor_pid(name: str) -> int:
    return pid_of(ray.get_actor(name, namespace="rayserve_fast"))


def pid_of(actor: Any) -> int:
    pid: int = ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid()))
    return pid


def replica_actors() -> list[Any]:
    """The actors of all replicas that run or stop."""
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace="rayserve_fast") for name in names if name.startswith("SERVE_REPLICA")]


def until_running(calls: int) -> None:
    """Return when user code works on so many calls, in all replicas together."""
    wait_for(lambda: sum(counters_of(replica)["running"] for replica in replica_actors()) == calls)


def proxy_actor() -> Any:
    (node,) = serve.status().proxies
    return ray.get_actor(f"SERVE_PROXY_ACTOR-{node}", namespace="rayserve_fast")


def crash_proxy(url: str) -> None:
    """Kill the proxy, and return when its successor answers `url` by 200."""

    def serves() -> bool:
        try:
            return get(url)[0] == 200
        except requests.ConnectionError:
            return False

    os.kill(pid_of(proxy_actor()), signal.SIGKILL)
    wait_for(lambda: not serves(), 15)
    wait_for(serves, 15)


def proxy_counters() -> dict[str, int]:
    return counters_of(proxy_actor())


def counters_of(actor: Any) -> dict[str, int]:
    counters: dict[str, int] = ray.get(actor.counters.remote())
    return counters


def wait_for(
    holds: Callable[[], object], seconds: float = 20, so_far: Callable[[], object] = lambda: "it never came to hold"
) -> None:
    """Return when it holds; what `so_far` gives is in the error if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"after {seconds} s: {so_far()}"
        time.sleep(0.01)  # no event tells
