"""The driver's side of the control plane: find or start the controller, ask it things.

The controller is looked up by name at each call, half a millisecond, so that there is no cache to go stale when Ray
or Serve is shut down and started again. Waits are Ray calls that return on the event; nothing polls. Works in
replicas as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rayserve_fast.controlplane.options import CONTROLLER_NAME, NAMESPACE, SHUTDOWN_WAIT_S, ClusterOptions
from rayserve_fast.controlplane.process import wait_gone
from rayserve_fast.controlplane.seen import Seen
from rayserve_fast.controlplane.spec import ApplicationSpec
from rayserve_fast.exceptions import RayServeException

logger = logging.getLogger("ray.serve")

#: A `serve.run` that takes longer than this says where the time went.
SLOW_RUN_S = 2.5


class NotRunningError(RayServeException):
    """Serve is not running."""


def find() -> Any:
    """The running controller, or None. Connects to a running Ray if this process is not connected; starts none."""
    if not ray.is_initialized():
        try:
            ray.init(address="auto", namespace=NAMESPACE)
        except ConnectionError:
            return None
    try:
        return ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def require() -> Any:
    """The running controller.

    Raises:
        NotRunningError: there is none.
    """
    if (controller := find()) is None:
        raise NotRunningError("There is no Serve instance running on this Ray cluster; start one with `serve.run`.")
    return controller


def ask(method: str, *args: Any, timeout_s: float | None = None) -> Any:
    """Call a method of the running controller and return its answer, or raise what it raised.

    Raises:
        NotRunningError: there is none.
        GetTimeoutError: no answer within `timeout_s` seconds.
    """
    return answer(getattr(require(), method).remote(*args), timeout_s)


def answer(coming: Any, timeout_s: float | None = None) -> Any:
    """The controller's answer; an error of its own is raised as it was, without Ray's remote traceback around it.

    Raises:
        GetTimeoutError: no answer within `timeout_s` seconds.
    """
    try:
        return ray.get(coming, timeout=timeout_s)
    except RayTaskError as e:
        raise (e.cause if isinstance(e.cause, (RayServeException, ValueError, TypeError)) else e) from None


def connect_ray() -> None:
    """Connect to Ray, or start it."""
    ray._private.worker.global_worker._filter_logs_by_job = False  # replicas are of the job that came first
    if not ray.is_initialized():
        ray.init(namespace=NAMESPACE)


def start(options: ClusterOptions, env_vars: Mapping[str, str] | None = None) -> Any:
    """Start a controller with these options. If another driver has just done so, that one is returned."""
    from rayserve_fast.controlplane.controller import Controller

    nodes = [n for n in ray.nodes() if n["Alive"]]
    head = next((n["NodeID"] for n in nodes if "node:__internal_head__" in n["Resources"]), nodes[0]["NodeID"])
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            max_task_retries=-1,  # a call that a crash interrupts is asked again; orders know a repetition by its id
            max_concurrency=10_000,
            enable_task_events=False,
            runtime_env={"env_vars": dict(env_vars)} if env_vars else None,
        )
        .remote(options, head)
    )


def ready(controller: Any) -> tuple[ClusterOptions, tuple[str, int] | None]:
    """Wait until the head's proxy listens; the options in force and its address.

    Raises:
        RuntimeError: its port is taken. The controller is gone then.
    """
    try:
        found: tuple[ClusterOptions, tuple[str, int] | None] = ray.get(controller.ready.remote())
    except RayTaskError as e:
        if not isinstance(e.cause, OSError):
            raise
        stop(controller)
        raise RuntimeError(f"Serve cannot start: {e.cause}") from None
    return found


def deploy(
    controller: Any, specs: Sequence[ApplicationSpec], wait: bool, began: float, seen: Seen | None = None
) -> None:
    """Deploy applications and, with `wait`, return when they all run and the proxies serve.

    Args:
        began: `time.monotonic()` when the caller was called, for the line that says where the time went.
        seen: of applications that may only be replaced as they were seen, their labels; see `seen.py`.

    Raises:
        RayServeException: a route prefix is taken.
        OvertakenError: an application is not as it was seen.
        RuntimeError: an application failed to deploy, with the user's traceback, or the HTTP port is taken.
    """
    sent = time.monotonic()
    accepted = controller.deploy.remote(list(specs), seen)
    options, address = ready(controller)
    answer(accepted)
    for spec in specs if wait else ():
        timings = _await_running(controller, spec.name)
        where = ""
        if address and spec.route_prefix is not None:
            where = f" at http://{address[0]}:{address[1]}{options.root_path}{spec.route_prefix}"
        logger.info(f"Application '{spec.name}' is ready{where}.")
        if (took := time.monotonic() - began) > SLOW_RUN_S:
            steps = ", ".join(f"{step} {at:.2f}" for step, at in sorted(timings.items(), key=lambda x: x[1]))
            logger.info(f"serve.run took {took:.1f} s: {sent - began:.2f} s before the deploy was sent, then {steps}.")


def stop(controller: Any) -> None:
    """Shut Serve down and wait until its processes are gone; what does not leave in time is killed."""
    place = ray.get(controller.place.remote())
    try:
        ray.get(controller.shutdown.options(max_task_retries=0).remote(), timeout=SHUTDOWN_WAIT_S + 20)
    except RayActorError:
        pass  # the end: its last act is to end its own process
    except GetTimeoutError:
        logger.warning("The controller did not shut down in time and is killed.")
        ray.kill(controller, no_restart=True)
    wait_gone(place, 5.0)


def snapshot() -> bytes:
    """The current snapshot (ARCHITECTURE.md) as JSON bytes."""
    found: bytes = _wait(require().snapshot.remote())
    return found


def next_snapshot(newer_than: tuple[int, int] | None, token: bytes) -> Future[bytes]:
    """A snapshot with a greater version than this, once there is one; None: the current one.

    Ends with `NotRunningError` if this is not the cluster with that token.
    """
    # Whoever waits asks again by himself; Ray would tell every driver about its retries.
    coming: Future[bytes] = require().snapshot.options(max_task_retries=0).remote(newer_than, token).future()
    return coming


def cluster_token() -> bytes:
    """The cluster's secret, for the handshake on links."""
    token: bytes = _wait(require().token.remote())
    return token


def _wait(answer: Any) -> Any:
    """`ray.get` for replicas too: Ray warns of it there on any thread, as their actor is an async one."""
    return answer.future().result()


def _await_running(controller: Any, name: str) -> dict[str, float]:
    seen = 0
    while True:
        progress = ray.get(controller.progress.remote(name, seen))
        for notice in progress.notices:
            logger.warning(notice)
        seen += len(progress.notices)
        if progress.status == "RUNNING":
            timings: dict[str, float] = progress.timings
            return timings
        if progress.status == "DEPLOY_FAILED":
            raise RuntimeError(f"Deploying application {name} failed: {progress.message}")
        if progress.status in ("NOT_STARTED", "DELETING"):
            raise RuntimeError(f"Application {name} was deleted while it was being deployed.")
