"""The controller's side of the proxies: one actor per node, started, published to, watched.

`HeadOnly` runs one on the head node, `EveryNode` also one on each node that has replicas, `Disabled` none. Ray restarts
a proxy that crashed (`max_restarts=-1`); the watch call tells when, and it is given the current snapshot again. A
proxy that cannot take its port is UNHEALTHY; on the head node that fails the start of Serve.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayserve_fast.controlplane.figures import Reading
from rayserve_fast.controlplane.options import LINK_WAIT_S, NAMESPACE, ClusterOptions, proxy_name
from rayserve_fast.controlplane.process import Place, wait_gone
from rayserve_fast.controlplane.proxy import ProxyActor

logger = logging.getLogger("ray.serve")

RESTART_S = 5.0
#: How long the proxies may take to say that they know a snapshot.
PUBLISH_WAIT_S = 2.0
#: How long a new replica waits for a proxy that is still starting.
SETTLE_WAIT_S = 10.0
#: How long a proxy may take to say what it has counted.
COUNT_WAIT_S = 2.0
#: A node without replicas keeps its proxy for so long, as replicas may come back, and then so long while it drains.
UNNEEDED_S = 30.0
DRAIN_S = 30.0


@dataclass
class _Proxy:
    node_id: str
    handle: Any
    status: str = "STARTING"
    place: Place | None = None
    address: tuple[str, int] | None = None
    error: str = ""
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # it listens, or it has failed to
    task: asyncio.Task[None] | None = None
    needed_at: float = 0.0
    leaving: asyncio.Task[None] | None = None
    refusal: str = ""  # why it did not take the last snapshot that it has answered for


class Fleet:
    """Every proxy of the cluster."""

    def __init__(self, options: ClusterOptions, token: bytes, head: str, changed: Callable[[], None]) -> None:
        self._options = options
        self._token = token
        self._head = head
        self._changed = changed
        self._proxies: dict[str, _Proxy] = {}
        self._snapshot: bytes | None = None
        self._unreadable = ""  # why there is a later one than that, which no proxy could read
        self._sent: set[asyncio.Task[None]] = set()
        self.cover(())

    def cover(self, nodes: Iterable[str]) -> None:
        """See that the nodes that need a proxy have one; `nodes` are those with replicas."""
        where = self._options.proxy_location
        wanted = set() if where == "Disabled" else {self._head} | (set(nodes) if where == "EveryNode" else set())
        for node_id in wanted - self._proxies.keys():
            self._add(node_id)
        now = time.monotonic()
        for p in self._proxies.values():
            p.needed_at = now if p.node_id in wanted else p.needed_at
            if now - p.needed_at > UNNEEDED_S and p.status == "HEALTHY":
                p.status = "DRAINING"
                p.leaving = asyncio.ensure_future(self._retire(p))

    def publish(self, snapshot: bytes) -> list[asyncio.Future[None]]:
        """Send the snapshot to every proxy that listens; the futures end when it has arrived, or was refused."""
        self._snapshot, self._unreadable = snapshot, ""
        sent = [self._send(p, snapshot) for p in self._proxies.values() if p.address]
        return [asyncio.shield(task) for task in sent]  # an answer counts also when nobody waits for it any more

    def refuse(self, reason: str) -> None:
        """Note that there is a snapshot which no proxy could read, and which is therefore not published."""
        self._unreadable = reason

    async def refusal(self) -> str:
        """Why nobody goes by the last snapshot; empty if a proxy has taken it, if none listens or none answers."""
        if self._unreadable:
            return self._unreadable
        if self._sent:
            await asyncio.wait(self._sent, timeout=PUBLISH_WAIT_S)
        refusals = [p.refusal for p in self._proxies.values() if p.status == "HEALTHY"]
        return refusals[0] if refusals and all(refusals) else ""

    async def linked(self, replica_id: str) -> str:
        """Wait until every live proxy has a link to the replica, at most `LINK_WAIT_S`; says what is amiss then."""
        proxies = list(self._proxies.values())
        await within(SETTLE_WAIT_S, (p.settled.wait() for p in proxies))
        refs = [p.handle.wait_linked.remote([replica_id], LINK_WAIT_S) for p in proxies if p.status == "HEALTHY"]
        # A proxy that does not answer at all, on a node that is cut off, must not hold up the others' deployments.
        missing: list[str] = []
        amiss = ""
        if not await within(LINK_WAIT_S + 1, (_told(ref, missing) for ref in refs)):
            amiss = f"A proxy does not say whether it has a link to replica {replica_id}."
        if missing:
            refusal = self._unreadable or next((p.refusal for p in proxies if p.refusal), "")
            why = f": it refuses the routing table: {refusal}" if refusal else "."
            amiss = f"A proxy has no link to replica {replica_id} after {LINK_WAIT_S:g} s{why}"
        if amiss:
            logger.warning(amiss)
        return amiss

    async def ready(self) -> tuple[str, int] | None:
        """The address of the head node's proxy, None without proxies. Raises OSError if it cannot listen."""
        head = self._proxies.get(self._head)
        if head is None:
            return None
        await head.settled.wait()
        if head.address is None:
            raise OSError(head.error)
        return head.address

    @property
    def head_settled(self) -> bool:
        """The head node's proxy listens, has failed, or is not wanted."""
        return self._head not in self._proxies or self._proxies[self._head].settled.is_set()

    def statuses(self) -> dict[str, str]:
        """The status of each node's proxy."""
        return {p.node_id: p.status for p in self._proxies.values()}

    async def traffic(self) -> Reading:
        """What each proxy has counted; one that does not answer in time is left out."""
        asked = [(f"{p.node_id}:{p.place.pid}", p) for p in self._proxies.values() if p.address and p.place]
        answers = await asyncio.gather(*(_counted(p) for _, p in asked), return_exceptions=True)
        return {
            process: counted
            for (process, _), counted in zip(asked, answers, strict=True)
            if not isinstance(counted, BaseException)
        }

    async def shutdown(self, timeout_s: float) -> None:
        """Stop all proxies and wait until their processes are gone."""
        proxies, self._proxies = list(self._proxies.values()), {}
        await within(timeout_s + 1, (p.handle.shutdown.remote(timeout_s, True) for p in proxies))
        for p in proxies:
            ray.kill(p.handle, no_restart=True)
        await asyncio.gather(*(asyncio.to_thread(wait_gone, p.place, 5) for p in proxies))

    async def _retire(self, p: _Proxy) -> None:
        """Take a proxy out of service: its health check fails at once, its requests may finish."""
        await within(DRAIN_S, [p.handle.drain.remote()])
        await within(DRAIN_S + 1, [p.handle.shutdown.remote(DRAIN_S, False)])
        self._proxies.pop(p.node_id, None)
        ray.kill(p.handle, no_restart=True)

    def _add(self, node_id: str) -> None:
        handle = (
            ray.remote(ProxyActor)
            .options(
                name=proxy_name(node_id),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                enable_task_events=False,
            )
            .remote(self._options, self._token, node_id)
        )
        p = self._proxies[node_id] = _Proxy(node_id, handle)
        p.task = asyncio.ensure_future(self._live(p))

    async def _live(self, p: _Proxy) -> None:
        """Start the proxy and watch it, over its crashes, until it is gone for good."""
        while True:
            try:
                p.place = await p.handle.place.remote()
                p.address = await p.handle.start.remote(self._snapshot)
                p.status, p.error = "HEALTHY", ""
                if self._snapshot:
                    self._send(p, self._snapshot)  # what came while it started; an old version is ignored
                self._settle(p)
                await p.handle.watch.remote()
            except RayTaskError as e:
                p.status, p.error = "UNHEALTHY", str(e.cause)
                logger.error(f"The proxy of node {p.node_id} cannot start: {p.error}")
                self._settle(p)
                if p.address is None and p.node_id == self._head:
                    return  # the start of Serve fails with it
                await asyncio.sleep(RESTART_S)  # somebody else may leave its port
            except ActorUnavailableError:
                logger.warning(f"The proxy of node {p.node_id} crashed and is being restarted.")
                p.status = "STARTING"
                self._changed()
            except RayError as e:
                p.status, p.error = "UNHEALTHY", p.error or f"the proxy died: {e}"
                self._settle(p)
                if self._proxies.get(p.node_id) is p:  # not in a shutdown
                    await asyncio.sleep(RESTART_S)  # its node may be gone, and is soon wanted no more
                    self._proxies.pop(p.node_id, None)
                    self._changed()
                return

    def _send(self, p: _Proxy, snapshot: bytes) -> asyncio.Task[None]:
        task = asyncio.ensure_future(self._sending(p, p.handle.publish.remote(snapshot)))
        self._sent.add(task)
        task.add_done_callback(self._sent.discard)
        return task

    async def _sending(self, p: _Proxy, answer: Awaitable[None]) -> None:
        """Note whether the proxy takes what it was sent; one that does not answer is `_live`'s business."""
        refusal = ""
        try:
            await answer
        except RayError as e:
            if isinstance(e, RayTaskError) and isinstance(e.cause, ValueError):  # else it is being restarted
                refusal = str(e.cause)
        if refusal and p.refusal != refusal:
            logger.error(f"The proxy of node {p.node_id} refuses the routing table and keeps the last: {refusal}")
        p.refusal = refusal

    def _settle(self, p: _Proxy) -> None:
        p.settled.set()
        self._changed()


async def _counted(p: _Proxy) -> Mapping[str, Any]:
    counted: Mapping[str, Any] = json.loads(await asyncio.wait_for(p.handle.traffic.remote(), COUNT_WAIT_S))
    return counted


async def _told(asked: Awaitable[list[str]], missing: list[str]) -> None:
    missing += await asked


async def within(timeout_s: float, awaitables: Iterable[Awaitable[Any]]) -> bool:
    """Wait for all of them, whatever they raise; False if that took longer than `timeout_s`."""
    try:
        await asyncio.wait_for(asyncio.gather(*awaitables, return_exceptions=True), timeout_s)
    except asyncio.TimeoutError:
        return False
    return True
