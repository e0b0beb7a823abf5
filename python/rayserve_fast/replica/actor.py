"""The replica actor: a thin Ray actor around `ReplicaRuntime`, which owns the sockets and the user's code.

Its methods run on the actor's own event loop, never on the user's, and block only threads: the controller can always
ask, drain and stop. Before anything of the user's is unpickled the process becomes one of the driver that deployed
it: Ray has set it up for the driver that happened to start the controller. Nothing heavy is imported before `start`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from rayserve_fast.controlplane.process import Place, serve_at_normal_priority
from rayserve_fast.replica.memory import keep_freed_memory, spare_what_is_loaded

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import DeploymentConfig, DriverEnv, ReplicaAddress, ReplicaSpec


@dataclass(frozen=True)
class StartFailure:
    """Why the replica could not start, as text: the user's exception may not be importable where this is read."""

    traceback: str


class ReplicaActor:
    """One replica of one deployment."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._runtime: Any = None
        self._address: ReplicaAddress | None = None

    def __repr__(self) -> str:
        """What Ray prints in front of each line of this process's log."""
        return self._label

    async def place(self) -> Place:
        """Where this process runs; answered as soon as there is one."""
        return Place.here()

    async def start(self, spec: ReplicaSpec) -> ReplicaAddress | StartFailure:
        """Construct the user's object and listen."""
        try:
            self._address = await asyncio.to_thread(self._start, spec)
        except BaseException as error:  # the user's constructor may raise anything, SystemExit included
            from rayserve_fast.tracebacks import format_error

            return StartFailure(format_error(error))
        return self._address

    async def address(self) -> ReplicaAddress | None:
        """Where it listens; None while it has not started. For a restarted controller."""
        return self._address

    async def reconfigure(self, config: DeploymentConfig) -> None:
        """Give the user's object its new `user_config`, and the runtime its new limits."""
        await asyncio.to_thread(self._runtime.reconfigure, config)

    async def check_health(self) -> None:
        """Raises what the user's `check_health` raises."""
        await asyncio.to_thread(self._runtime.check_health)

    async def routing_stats(self) -> str | None:
        """What the user's object tells routers now; raises what its `record_routing_stats` raises."""
        stats: str | None = await asyncio.to_thread(self._runtime.routing_stats)
        return stats

    async def counters(self) -> dict[str, int]:
        """What the runtime counts."""
        counters: dict[str, int] = self._runtime.counters()
        return counters

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests; whether within `timeout_s` the old ones have ended and their calls have left."""
        self._runtime.drain()
        idle: bool = await asyncio.to_thread(self._runtime.wait_idle, timeout_s)
        return idle

    async def stop(self) -> None:
        """Let the user's object clean up, close everything. The controller kills the process after this."""
        if self._runtime is not None:
            await asyncio.to_thread(self._runtime.stop)

    async def watch(self) -> None:
        """Never returns; fails when this process dies."""
        ray._raylet.setproctitle(f"ray::{self._label}")  # Ray's would be this method's name for ever
        await asyncio.Event().wait()

    def _start(self, spec: ReplicaSpec) -> ReplicaAddress:
        from rayserve_fast.controlplane import sockets

        become(spec.deployment.driver, spec.deployment.config.ray_actor_options.get("runtime_env") or {})
        serve_at_normal_priority()
        keep_freed_memory()
        self._lock = sockets.prepare(spec.socket_dir)
        from rayserve_fast import caller
        from rayserve_fast.replica.runtime import ReplicaRuntime

        caller.introduce(ray.get_runtime_context().get_node_id(), spec.token)  # the constructor may call others
        self._runtime = ReplicaRuntime(spec, loaded=spare_what_is_loaded)
        address: ReplicaAddress = self._runtime.start()
        self._runtime.check_health()
        return address


def become(driver: DriverEnv, runtime_env: Mapping[str, Any]) -> None:
    """Make this process one of `driver`, instead of one of the driver that started the controller.

    That one's job gives every actor its paths and runtime environment; `runtime_env` is the deployment's own. The
    driver's paths come before those of this interpreter, and a `working_dir`, which Ray has made the current directory,
    before them all. An inherited `pip`, `conda` or `container` cannot be undone here: the interpreter itself is theirs.
    """
    inherited = ray.get_runtime_context().runtime_env
    for name in set(inherited.get("env_vars") or ()).difference(runtime_env.get("env_vars") or ()):
        os.environ.pop(name, None)
    strangers = set(ray._private.worker.global_worker.core_worker.get_job_config().py_driver_sys_path)
    for option in ("working_dir", "py_modules"):
        if option not in runtime_env:
            strangers.update(p for p in sys.path if f"/runtime_resources/{option}_files/" in p)
    first = [os.getcwd()] if "working_dir" in runtime_env else []
    theirs = [path for p in driver.sys_path if (path := os.path.join(driver.cwd, p)) not in first]
    if not first and os.path.isdir(driver.cwd):
        os.chdir(driver.cwd)
    strangers.difference_update(first, theirs)
    mine = [p for p in sys.path if p not in strangers and p not in first]
    _forget_modules(strangers, [*first, *mine])
    sys.path[:] = [*first, *(p for p in theirs if p not in mine), *mine]


def _forget_modules(strangers: Iterable[str], kept: Iterable[str]) -> None:
    """Drop modules that an earlier task in this process imported from a path that is gone."""
    roots = sorted([*strangers, *kept], key=len, reverse=True)
    gone = set(strangers)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        root = next((r for r in roots if file and file.startswith(r.rstrip("/") + "/")), None)
        if root in gone and name != "__main__":
            del sys.modules[name]
