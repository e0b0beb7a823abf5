"""The controller's side of the replica actors: make one, follow it to its end, stop it.

Each replica has one task that lives as long as its process: placed, started, linked by the proxies, then a watch call
that fails when the process dies. What that means for its deployment is `reconcile`'s business; this module only makes
Ray calls and reports. Invariant: a replica leaves the controller's books only when its process is dead or killed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from rayserve_fast.controlplane import reconcile
from rayserve_fast.controlplane.options import NAMESPACE
from rayserve_fast.controlplane.process import Place, gone, wait_gone
from rayserve_fast.controlplane.proxies import PUBLISH_WAIT_S, Fleet, within
from rayserve_fast.controlplane.routing_stats import RoutingStats
from rayserve_fast.controlplane.spec import ReplicaID, ReplicaRank, ReplicaSpec
from rayserve_fast.controlplane.state import Application, Deployment, Replica
from rayserve_fast.replica.actor import ReplicaActor, StartFailure

logger = logging.getLogger("ray.serve")

#: So often a replica that is being replaced looks whether the proxies read again what its successor is told by.
REFUSAL_LOOK_S = 1.0
#: How long a killed process may take to end before the controller goes on without it.
KILL_WAIT_S = 5.0


class Publisher(Protocol):
    """What this module needs of the controller."""

    def changed(self) -> None: ...
    def publish(self) -> list[Any]: ...


class Replicas:
    """All replica actors of the cluster."""

    def __init__(
        self, fleet: Fleet, token: bytes, socket_dir: str, placement_notice_s: float, controller: Publisher
    ) -> None:
        self._fleet = fleet
        self._token = token
        self._socket_dir = socket_dir
        self._placement_notice_s = placement_notice_s
        self._controller = controller
        self._handles: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._routing_stats = RoutingStats(controller.publish)

    def start(self, app: Application, d: Deployment, r: Replica) -> None:
        """Make the actor; the replica is ready, or gone, some events later."""
        options = {
            "num_cpus": 1,
            "scheduling_strategy": "SPREAD",
            **d.spec.config.ray_actor_options,
            "name": _actor_name(d, r),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_concurrency": 1000,
            "enable_task_events": False,
        }
        try:
            made = ray.remote(ReplicaActor).options(**options).remote(f"ServeReplica:{app.name}:{d.spec.name}")
        except Exception as e:  # Ray refuses the options
            self._follow(self._lost(d, r, f"{type(e).__name__}: {e}"))
        else:
            self._handles[r.id] = made
            self._follow(self._live(app, d, r))

    def adopt(self, app: Application, d: Deployment, r: Replica) -> asyncio.Task[None]:
        """Find the actor again after a restart of the controller. The task ends when it is known whether it lives."""
        known = asyncio.Event()
        self._follow(self._recover(app, d, r, known))
        return asyncio.ensure_future(_wait(known))

    def stop(self, d: Deployment, r: Replica, graceful: bool) -> None:
        """Drain the replica if it has something to finish, then end its process."""
        r.state = "STOPPING"
        if graceful:
            self._follow(self._retire(d, r))
        else:
            r.idle = True
            self._kill(r)

    def reconfigure(self, d: Deployment, r: Replica) -> None:
        """Give a running replica the settings of the current target."""
        r.state, r.config = "UPDATING", d.config
        self._follow(self._reconfigure(d, r))

    async def kill_all(self) -> None:
        """End every process that is left, without asking it."""
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)
        await within(10, self._tasks)

    async def _live(self, app: Application, d: Deployment, r: Replica) -> None:
        """From the making of the actor to the end of its process."""
        handle = self._handles[r.id]
        try:
            r.place = await self._placed(app, d, handle)
            app.mark("placed")
            self._controller.changed()
            found = await handle.start.remote(self._spec(app, d, r))
            if isinstance(found, StartFailure):
                await self._lost(d, r, found.traceback)
                return
            r.address = found
            app.mark("constructed")
            await self._serve(app, d, r)
        except Exception as e:  # whatever it is, no replica stays in the books with nobody to follow it
            await self._lost(d, r, str(e) or repr(e))

    async def _recover(self, app: Application, d: Deployment, r: Replica, known: asyncio.Event) -> None:
        leaving = r.state == "STOPPING"
        r.state = "RECOVERING"
        try:
            handle = self._handles[r.id] = ray.get_actor(_actor_name(d, r), namespace=NAMESPACE)
            r.place, r.address = await handle.place.remote(), await handle.address.remote()
            known.set()
            if leaving or r.address is None:  # it was to go, or had not finished starting
                self.stop(d, r, graceful=r.address is not None)
                await _ended(handle, r.place)
            else:
                await self._serve(app, d, r)
        except Exception as e:
            known.set()
            await self._lost(d, r, str(e) or repr(e))

    async def _serve(self, app: Application, d: Deployment, r: Replica) -> None:
        """Publish the address, wait for the links, be ready; raises when the process dies, however far that came."""
        self._controller.publish()
        handle = self._handles[r.id]
        ended = asyncio.ensure_future(_ended(handle, r.place))
        linked = asyncio.ensure_future(self._fleet.linked(r.id))
        following: list[asyncio.Future[Any]] = [ended, linked]
        try:
            await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                if amiss := linked.result():
                    app.notices.append(amiss)
                app.mark("linked")
                reconcile.ready(d, r, time.time())
                self._controller.changed()
                if r.address is not None and r.address.has_routing_stats:
                    stats = self._routing_stats.follow(d, r, lambda: _resolve(handle.routing_stats.remote()))
                    following.append(self._follow(stats))
            await ended
        finally:
            for each in following:
                each.cancel()

    async def _retire(self, d: Deployment, r: Replica) -> None:
        """Drain, leave the snapshot, stop, die: in this order, so that no request is sent to a closed door.

        Not while every proxy refuses the snapshot, and so knows nobody else to send to.
        """
        handle, told = self._handles[r.id], ""
        while not d.deleting and (refusal := await self._fleet.refusal()):
            if refusal != told:
                logger.warning(f"Replica {r.id} of {d.key} stays, as every proxy refuses the routing table: {refusal}")
            told = refusal
            await asyncio.sleep(REFUSAL_LOOK_S)
        grace = r.grace_s
        deadline = time.monotonic() + grace
        try:
            if not await asyncio.wait_for(handle.drain.remote(grace), grace + 1):
                logger.warning(
                    f"Replica {r.id} of {d.key} still had requests or unsent calls after {grace} s; they are cut off."
                )
            r.idle = True
            await within(PUBLISH_WAIT_S, self._controller.publish())
            left = max(deadline - time.monotonic(), 0.1)
            await asyncio.wait_for(handle.drain.remote(left), left)  # what was sent before the proxies knew
            await asyncio.wait_for(handle.stop.remote(), max(deadline - time.monotonic(), 1.0))
        except (RayError, asyncio.TimeoutError) as e:
            if not isinstance(e, RayError):
                logger.warning(f"Replica {r.id} of {d.key} did not leave within {grace} s and is killed.")
        finally:
            r.idle = True
            self._kill(r)

    async def _reconfigure(self, d: Deployment, r: Replica) -> None:
        try:
            await self._handles[r.id].reconfigure.remote(d.spec.config)
        except RayError as e:  # the user's `reconfigure` failed: the replica cannot serve the new settings
            reconcile.reconfigure_failed(d, r, str(e), time.time())
            self.stop(d, r, graceful=True)
        else:
            reconcile.ready(d, r, time.time())
        self._controller.changed()

    async def _placed(self, app: Application, d: Deployment, handle: Any) -> Place:
        """Where the actor's process runs; tells whoever waits when Ray has found no room for long."""
        placing = asyncio.ensure_future(_resolve(handle.place.remote()))
        while True:
            done, _ = await asyncio.wait([placing], timeout=self._placement_notice_s)
            if done:
                d.cramped = False
                place: Place = placing.result()
                return place
            free = await asyncio.to_thread(ray.available_resources)
            waiting = sum(not x.node_id for x in d.among("STARTING"))
            text = (
                f"Deployment '{d.spec.name}' in application '{app.name}' has {waiting} replica(s) that Ray has not"
                f" started for {self._placement_notice_s:g} s. Each needs {_needs(d)}; free in the cluster:"
                f" {_plain(free)}. Waiting for room, or for its runtime environment."
            )
            logger.warning(text)
            d.message, d.cramped = text, True
            app.notices.append(text)
            self._controller.changed()

    def _spec(self, app: Application, d: Deployment, r: Replica) -> ReplicaSpec:
        return ReplicaSpec(
            replica_id=r.id,
            deployment=d.spec,
            token=self._token,
            socket_dir=self._socket_dir,
            route_prefix=app.spec.route_prefix if d.spec.name == app.spec.ingress else None,
            rank=_rank(d, r),
            world_size=d.target,
        )

    async def _lost(self, d: Deployment, r: Replica, error: str) -> None:
        """The process has ended, or is of no use."""
        handle = self._handles.pop(r.id, None)
        if handle is not None:
            ray.kill(handle, no_restart=True)
        if r.state == "STOPPING":
            await asyncio.to_thread(wait_gone, r.place, KILL_WAIT_S)
        if r.ready_at or r.state == "RECOVERING":
            if r.state != "STOPPING":
                logger.warning(f"Replica {r.id} of {d.key} died: {error}")
            reconcile.died(d, r, time.time())
        else:
            if r.state != "STOPPING":
                logger.error(f"Replica {r.id} of {d.key} {reconcile.told(d, error)}")
            reconcile.start_failed(d, r, error, time.time())
        self._controller.publish()
        self._controller.changed()

    def _kill(self, r: Replica) -> None:
        if r.id in self._handles:
            ray.kill(self._handles[r.id], no_restart=True)

    def _follow(self, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)
        return task


def _actor_name(d: Deployment, r: Replica) -> str:
    return ReplicaID(r.id, d.spec.id).to_full_id_str()


def _rank(d: Deployment, r: Replica) -> ReplicaRank:
    """Its place among the replicas of the deployment that are not leaving."""
    nodes = sorted({x.node_id for x in d.replicas.values() if x.node_id and x.state != "STOPPING"})
    local = [x.rank for x in d.replicas.values() if x.node_id == r.node_id and x.state != "STOPPING"]
    return ReplicaRank(r.rank, nodes.index(r.node_id or ""), sorted(local).index(r.rank))


def _needs(d: Deployment) -> str:
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    options = {"num_cpus": 1, **d.spec.config.ray_actor_options}
    needed = {names.get(k, k): v for k, v in options.items() if k in ("num_cpus", "num_gpus", "memory")}
    return _plain(needed | dict(options.get("resources") or {}))


def _plain(resources: dict[str, Any]) -> str:
    shown = {k: v for k, v in resources.items() if not k.startswith("node:") and k != "object_store_memory"}
    return ", ".join(f"{v:g} {k}" for k, v in sorted(shown.items())) or "nothing"


async def _ended(handle: Any, place: Place | None) -> None:
    """Raises when the replica's process has ended, by Ray's word or by the kernel's."""
    watches = [asyncio.ensure_future(_resolve(handle.watch.remote())), asyncio.ensure_future(gone(place))]
    try:
        await (await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED))[0].pop()
    finally:
        for watch in watches:
            watch.cancel()
    raise RuntimeError("Its process has ended.")


async def _resolve(ref: Any) -> Any:
    return await ref


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception():
        logger.error("A task of the controller failed", exc_info=task.exception())
