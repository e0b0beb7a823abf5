"""The controller: one detached actor that makes what exists equal to what was asked for.

Every event (a deploy, a replica placed, ready or dead, a proxy up or down) ends in `changed()`, which wakes the one
loop that decides (`reconcile`) and executes (`replicas`, `proxies`); a slow tick is only there for back-offs.
Everything runs on the actor's event loop, so no state is shared between threads. Targets and replica names are
persisted before they act: a restarted controller finds the live actors and goes on, under a higher epoch. The data
plane never waits for this process.
"""

from __future__ import annotations

import asyncio
import logging
import random
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rayserve_fast.controlplane import reconcile, snapshot, sockets, store
from rayserve_fast.controlplane.client import NotRunningError
from rayserve_fast.controlplane.options import SHUTDOWN_WAIT_S, ClusterOptions
from rayserve_fast.controlplane.process import Place
from rayserve_fast.controlplane.proxies import Fleet, within
from rayserve_fast.controlplane.replicas import Replicas
from rayserve_fast.controlplane.rollout_orders import RolloutOrders
from rayserve_fast.controlplane.seen import Seen
from rayserve_fast.controlplane.spec import ApplicationSpec
from rayserve_fast.controlplane.state import Application, Deployment
from rayserve_fast.controlplane.status import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ProxyStatus,
    ReplicaState,
    ServeStatus,
)
from rayserve_fast.exceptions import RayServeException

logger = logging.getLogger("ray.serve")

TICK_S = 1.0
RECOVERY_WAIT_S = 10.0  # nothing is published before the old replicas are found again, at most this long


@dataclass(frozen=True)
class Progress:
    """How far an application is, for a driver that waits."""

    status: str  # NOT_STARTED: there is no such application
    message: str
    notices: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)


class Controller(RolloutOrders):
    """Desired state in, actors and snapshots out; traffic is `TrafficOrders`' part, rollouts are `RolloutOrders`'."""

    async def __init__(self, options: ClusterOptions, head: str) -> None:  # type: ignore[misc]  # Ray awaits it
        self._options = options
        self._wake = asyncio.Event()
        self._news = asyncio.Event()  # replaced at every change; who waits for one holds the old object
        self._recovered = asyncio.Event()
        self._closing = False
        meta = store.open_epoch()
        self._token = meta.token
        self._version = (meta.epoch, 0)
        self._apps = store.load()
        self._traffic = store.load_traffic()
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._snapshot = b""
        self._fleet = Fleet(options, self._token, head, self.changed)
        self._socket_dir = sockets.directory(self._token)
        self._replicas = Replicas(self._fleet, self._token, self._socket_dir, options.placement_notice_s, self)
        self._loop = asyncio.ensure_future(self._run())

    def __repr__(self) -> str:
        """What Ray prints in front of each line of this process's log."""
        return "ServeController"

    # -- asked by drivers ---------------------------------------------------------------------------------------

    async def ready(self) -> tuple[ClusterOptions, tuple[str, int] | None]:
        """The options in force and the address of the head's proxy. Raises OSError if its port is taken."""
        return self._options, await self._fleet.ready()

    async def deploy(self, specs: Sequence[ApplicationSpec], seen: Seen | None = None) -> None:
        """Take new targets, if applications are still as they were `seen`; what follows is told by `progress`.

        Raises:
            RayServeException: a name or a route prefix belongs to another, or proxies could not read what an
                application leads to. Then nothing has changed.
            OvertakenError: one that was seen is another by now. Then nothing has changed.
        """
        await self._recovered.wait()
        if self._closing:
            raise RayServeException("Serve is being shut down.")
        self._traffic.check_deploy(specs, self._apps, seen)
        self._check_readable(specs)
        for spec in specs:
            self._target(spec)
        self.publish()
        self.changed()

    async def progress(self, name: str, seen: int = 0) -> Progress:
        """Wait until the application runs, has failed, is gone, or there are more than `seen` notices."""
        await self._recovered.wait()
        while True:
            news = self._news
            app = self._apps.get(name)
            if app is None:
                return Progress("NOT_STARTED", "")
            status, message = app.status()
            settled = status in ("DEPLOY_FAILED", "DELETING") or (status == "RUNNING" and self._fleet.head_settled)
            if settled or len(app.notices) > seen:
                return Progress(status, message, app.notices[seen:], app.timings)
            await news.wait()

    async def delete(self, names: Sequence[str], wait: bool = True, force: bool = False) -> None:
        """Delete applications; with `wait`, returns when their processes are gone. Unknown names are ignored.

        With `force` their replicas finish nothing.

        Raises:
            RayServeException, ValueError: the traffic of a route or an endpoint uses one. Then nothing has changed.
        """
        await self._recovered.wait()
        apps = [self._apps[n] for n in names if n in self._apps]
        for app in apps:
            self._traffic.check_unused(app)
        self._leave(apps, force)
        if wait:
            await self._gone(apps)

    def _leave(self, apps: Sequence[Application], force: bool = False) -> None:
        for app in apps:
            if self._traffic.forget(app.name):
                store.save_traffic(self._traffic)
            app.deleting = True
            for d in app.deployments.values():
                reconcile.delete(d, force)
            store.save_application(app)
        if force:
            store.save_replicas(self._apps)  # whose time to leave it has taken
        self.publish()
        self.changed()

    async def _gone(self, apps: Sequence[Application]) -> None:
        while any(self._apps.get(app.name) is app and app.deleting for app in apps):
            await self._news.wait()

    async def shutdown(self) -> None:
        """Delete everything, stop the proxies, forget the cluster, end this process."""
        self._closing = True
        await self._recovered.wait()
        apps = list(self._apps.values())
        self._leave(apps)
        for rolling in self._driving.values():
            rolling.cancel()
        await within(SHUTDOWN_WAIT_S, [self._gone(apps)])
        self._loop.cancel()  # it would start a proxy again
        await self._replicas.kill_all()
        await self._fleet.shutdown(timeout_s=1.0)
        sockets.remove(self._socket_dir)
        store.clear()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def status(self) -> ServeStatus:
        """The reference's status dataclasses."""
        await self._recovered.wait()
        proxies = {node: ProxyStatus(s) for node, s in self._fleet.statuses().items()}
        return ServeStatus(proxies, {name: _overview(app) for name, app in self._apps.items()})

    async def ingress(self, name: str) -> str | None:
        """The ingress deployment of an application, None if there is no such application."""
        await self._recovered.wait()
        return self._apps[name].spec.ingress if name in self._apps else None

    async def specification(self, name: str) -> ApplicationSpec | None:
        """What an application was last deployed as, None if there is no such application."""
        await self._recovered.wait()
        return self._apps[name].spec if name in self._apps else None

    async def applications(self, era: str) -> dict[str, dict[str, Any]]:
        """The labels of each application that the API of this era made; those that are being deleted are not among."""
        await self._recovered.wait()
        return {
            name: dict(app.spec.labels) for name, app in self._apps.items() if app.spec.era == era and not app.deleting
        }

    async def exists(self, app: str, deployment: str) -> bool:
        """Whether there is such a deployment."""
        await self._recovered.wait()
        return app in self._apps and deployment in self._apps[app].deployments

    async def snapshot(self, newer_than: tuple[int, int] | None = None, token: bytes | None = None) -> bytes:
        """The current snapshot; with `newer_than`, waits for one that is. With `token`, of that cluster only."""
        if token not in (None, self._token):
            raise NotRunningError("The cluster that was asked for is gone, and another one is there.")
        await self._recovered.wait()
        while newer_than is not None and self._version <= tuple(newer_than):
            await self._news.wait()
        return self._snapshot

    async def token(self) -> bytes:
        """The secret that both sides of a link prove to know."""
        return self._token

    async def place(self) -> Place:
        """Where this process runs."""
        return Place.here()

    # -- what the parts report ----------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something happened: decide again."""
        self._wake.set()

    def publish(self) -> list[Any]:
        """Build a new snapshot and send it to the proxies; the futures end when they have it.

        Not before the recovery is over: a snapshot that lacks replicas which are still to be found would drop them.
        """
        if not self._recovered.is_set():
            return []
        version = (self._version[0], self._version[1] + 1)
        try:
            fresh = snapshot.readable(version, self._apps, self._traffic)
        except (ValueError, TypeError) as e:  # orders are checked: this is what a replica has said, or our own mistake
            logger.error(f"The routing table is not published, as no proxy could read it: {e}")
            self._fleet.refuse(str(e))
            return []
        self._version, self._snapshot = version, fresh
        self._tell()
        return self._fleet.publish(fresh)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # -- the loop -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        await self._recover()
        while True:
            try:
                self._step()
            except Exception:
                logger.exception("A step of the controller failed; it goes on.")
            try:
                await asyncio.wait_for(self._wake.wait(), TICK_S)
            except asyncio.TimeoutError:
                continue
            self._wake.clear()

    async def _recover(self) -> None:
        """Find the replicas of the controller before this one, then speak to the proxies."""
        found = [
            self._replicas.adopt(app, d, r)
            for app in self._apps.values()
            for d in app.deployments.values()
            for r in list(d.replicas.values())
        ]
        await within(RECOVERY_WAIT_S, found)
        self._recovered.set()
        self.publish()
        self._drive_rollouts()

    def _step(self) -> None:
        """Decide and execute for everything once."""
        before = {name: app.status() for name, app in self._apps.items()}
        for app in list(self._apps.values()):
            for d in list(reconcile.active(app)):
                self._execute(app, d)
                reconcile.settle(d)
                if d.deleting and not d.replicas and not app.deleting:
                    del app.deployments[d.spec.name]
                    self.publish()
            if app.deleting and not any(d.replicas for d in app.deployments.values()):
                del self._apps[app.name]
                store.forget_application(app.name)
                self.publish()
        replicas = [r for app in self._apps.values() for d in app.deployments.values() for r in d.replicas.values()]
        self._fleet.cover({r.node_id for r in replicas if r.node_id})
        for name, app in self._apps.items():
            if (now := app.status()) != before.get(name):
                if now[0] == "RUNNING":
                    app.mark("running")
                if now[0] == "DEPLOY_FAILED":
                    self.publish()  # nothing may be left to wait for
                store.save_application(app)
        self._tell()

    def _execute(self, app: Application, d: Deployment) -> None:
        actions = reconcile.decide(d, time.time())
        started = []
        for action in actions:
            if isinstance(action, reconcile.Start):
                started.append(reconcile.born(d, _new_id(), action.rank))
        if actions:
            store.save_replicas(self._apps)
        for action in actions:
            if isinstance(action, reconcile.Stop):
                self._replicas.stop(d, d.replicas[action.replica_id], action.graceful)
            elif isinstance(action, reconcile.Reconfigure):
                self._replicas.reconfigure(d, d.replicas[action.replica_id])
        for r in started:
            self._replicas.start(app, d, r)
        if actions and d.leaving:
            self.publish()  # what waits for it must not wait until it is gone

    def _check_readable(self, specs: Sequence[ApplicationSpec]) -> None:
        """Refuse applications with which proxies could not read the snapshot any more; replicas matter not for that."""
        apps = dict(self._apps)
        for spec in specs:
            apps[spec.name] = Application(spec, 0.0, {d.name: reconcile.deployed(None, d) for d in spec.deployments})
            snapshot.check(f"The application {spec.name!r}", apps, self._traffic)

    def _target(self, spec: ApplicationSpec) -> None:
        old = self._apps.get(spec.name)
        app = Application(spec, time.time(), former=old.routed if old else None)
        for d in spec.deployments:
            app.deployments[d.name] = reconcile.deployed(old, d)
        for name, gone in (old.deployments if old else {}).items():
            if name not in app.deployments:  # not part of it any more
                app.deployments = {name: gone, **app.deployments}
                reconcile.delete(gone)
        self._apps[spec.name] = app
        store.save_application(app)
        store.save_replicas(self._apps)  # whose settings it may have changed


def _overview(app: Application) -> ApplicationStatusOverview:
    status, message = app.status()
    deployments = {
        d.spec.name: DeploymentStatusOverview(
            DeploymentStatus(d.status),
            DeploymentStatusTrigger(d.trigger),
            dict(Counter(ReplicaState(r.state) for r in d.replicas.values())),
            d.message,
        )
        for d in app.deployments.values()
    }
    return ApplicationStatusOverview(ApplicationStatus(status), message, app.deployed_at, deployments)


def _new_id() -> str:
    return "".join(random.choices(string.ascii_lowercase + string.digits, k=8))
