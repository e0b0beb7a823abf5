"""Where routers of the user's own run: one thread a process, with an event loop on which every router is asked.

The thread exists only where such a router is needed. Calls of handles come here from the process's tender, HTTP
requests from the proxy's Rust threads by way of a descriptor that this loop watches: no Rust thread waits for the
interpreter, and no other deployment's requests wait for a router. A router that fails is logged, and its requests go to
the least loaded replica.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import pickle
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from rayserve_fast.controlplane.spec import DeploymentID, ReplicaID
from rayserve_fast.request_router import PendingRequest, ReplicaResult, RequestMetadata, RequestRouter, RunningReplica

if TYPE_CHECKING:
    from rayserve_fast._core import Proxy

logger = logging.getLogger("ray.serve")

#: Id, node, TCP address, whether it is open and has room, load, limit, models, metadata and routing stats of a replica,
#: as Rust tells it.
Told: TypeAlias = "tuple[str, str, str | None, bool, bool, int, int, list[str], str | None, str | None]"

#: What a router may end by and harm no other: its requests must not wait for ever, nor its loop end.
FAILURES = (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt)


@dataclass
class Custom:
    """A router at work."""

    definition: str
    router: RequestRouter
    pauses: tuple[float, float, float]  # first, factor, longest


class Routers:
    """All routers of this process.

    Args:
        node_id: the node of this process.
    """

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._customs: dict[str, Custom] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running on its thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="rayserve-fast-routers", daemon=True).start()
            return self._loop

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run `work` on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def place(
        self,
        deployment: str,
        known: Callable[[], tuple[list[Told], str | None] | None],
        pending: PendingRequest,
        assign: Callable[[list[list[str]]], str | None],
    ) -> tuple[RequestRouter | None, ReplicaID | None]:
        """Ask the deployment's router until one of the replicas that it names takes the request.

        Args:
            deployment: the key of the deployment.
            known: the replicas and the router's definition, as they are now.
            assign: gives the request to a replica of these ranks and returns its id: the first with a free slot, else
                the first with room for a backlog; None: none has room; empty: the request has ended.

        Returns:
            The router, and the replica; None if the request has ended.
        """
        app, _, name = deployment.partition("#")
        deployment_id = DeploymentID(name, app)
        pause = 0.0
        while True:
            told, definition = known() or ([], None)
            replicas = [running(deployment_id, one) for one in told if one[3]]
            custom = self._custom(deployment_id, definition)
            first, factor, longest = custom.pauses
            _tell(custom.router, "_refresh", replicas)
            ranks = await self._ranks(custom.router, pending) if replicas else []
            got = assign([[replica.replica_id.unique_id for replica in rank] for rank in ranks])
            if got == "":  # nobody waits any more
                return custom.router, None
            if got is not None:
                replica_id = ReplicaID(got, deployment_id)
                _tell(custom.router, "on_request_routed", pending, replica_id, ReplicaResult())
                return custom.router, replica_id
            pause = min(longest, pause * factor) if pause else first
            await asyncio.sleep(pause)

    async def _ranks(self, router: RequestRouter, pending: PendingRequest) -> list[list[RunningReplica]]:
        candidates = list(router.curr_replicas.values())
        router.num_pending_requests += 1
        try:
            return _checked(await router.choose_replicas(candidates, pending))
        except FAILURES as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            logger.exception("%s failed, any replica may do: %r", _described(router, "choose_replicas"), error)
            return [candidates]
        finally:
            router.num_pending_requests -= 1

    def _custom(self, deployment_id: DeploymentID, definition: str | None) -> Custom:
        known = self._customs.get(deployment_id.key)
        if known is not None and definition in (known.definition, None):
            return known
        router: RequestRouter = _Anybody(deployment_id)
        pauses = (0.025, 2.0, 0.5)
        if definition is not None:
            try:
                kind, kwargs, pauses = pickle.loads(base64.b64decode(definition))
                router = kind(deployment_id=deployment_id, self_node_id=self._node_id)
                router.initialize_state(**kwargs)
            except FAILURES as error:
                logger.exception(
                    "The request router of %s cannot be made, any replica may do: %r", deployment_id, error
                )
                router = _Anybody(deployment_id)
        custom = Custom(definition or "", router, pauses)
        if definition is not None:
            self._customs[deployment_id.key] = custom
        return custom


class _Anybody(RequestRouter):
    """Stands in for a router that cannot be made."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]


def running(deployment_id: DeploymentID, told: Told) -> RunningReplica:
    """A replica as routers see it."""
    replica_id, node_id, _tcp, _open, room, load, limit, models, *facts = told
    known = ReplicaID(replica_id, deployment_id), node_id, limit, set(models), load, room
    return RunningReplica(*known, _facts=tuple(facts))


def pending_call(texts: tuple[str, ...], flags: tuple[bool, bool], encoded: tuple[Any, ...]) -> PendingRequest:
    """A handle call as routers see it; `texts` are those of its head, `encoded` what `values.load_arguments` takes.

    Args:
        flags: whether it is answered by a stream, and whether it prefers its caller's node.
    """
    from rayserve_fast import values

    method, request_id, route, app, model, session = texts
    try:
        args, kwargs = values.load_arguments(*encoded)
    except Exception:  # of a class that cannot be imported here: a router can do without
        args, kwargs = (), {}
    stream, near = flags
    metadata = RequestMetadata(request_id, request_id, method, route, app, model, session, stream, prefers_local=near)
    return PendingRequest(list(args), kwargs, metadata)


class HttpRouting:
    """Answers the proxy's questions on the routers' loop.

    Args:
        proxy: the proxy of this process.
        node_id: its node.
    """

    def __init__(self, proxy: Proxy, node_id: str) -> None:
        self._proxy = proxy
        self._routers = Routers(node_id)
        self._tasks: set[asyncio.Task[None]] = set()
        #: By number, what is to be told when the request has ended.
        self._routed: dict[int, tuple[RequestRouter | None, ReplicaID, str]] = {}
        loop = self._routers.loop
        loop.call_soon_threadsafe(loop.add_reader, proxy.choices_fileno(), self._take)

    def _take(self) -> None:
        fresh, ended = self._proxy.choices()
        for number in ended:
            completed(*self._routed.pop(number, (None, None, "")))
        for number, deployment, *texts in fresh:
            task = asyncio.get_running_loop().create_task(self._route(number, deployment, *texts))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _route(self, number: int, deployment: str, route: str, request_id: str, model: str, session: str) -> None:
        app = deployment.partition("#")[0]
        metadata = RequestMetadata(request_id, request_id, "__call__", route, app, model, session, is_http_request=True)
        known, assign = partial(self._proxy.candidates, number), partial(self._proxy.assign, number)
        router, replica_id = await self._routers.place(deployment, known, PendingRequest([], {}, metadata), assign)
        if replica_id is not None:
            self._routed[number] = router, replica_id, request_id


def completed(router: RequestRouter | None, replica_id: ReplicaID | None, request_id: str) -> None:
    """Tell a router that a request of its has ended."""
    if router is not None and replica_id is not None:
        _tell(router, "on_request_completed", replica_id, request_id)


def _tell(router: RequestRouter, method: str, *args: Any) -> None:
    try:
        getattr(router, method)(*args)
    except FAILURES as error:
        logger.exception("%s failed: %r", _described(router, method), error)


def _is_cancelled() -> bool:
    """Whether somebody has cancelled the running task; Python 3.10 does not know whose `CancelledError` it is."""
    task: Any = asyncio.current_task()
    return not hasattr(task, "cancelling") or task.cancelling() > 0


def _described(router: RequestRouter, method: str) -> str:
    return f"{type(router).__qualname__}.{method} of the request router of {router._deployment_id}"


def _checked(ranks: Any) -> list[list[RunningReplica]]:
    """What a router has chosen; TypeError if it is not what it should be."""
    try:
        lists = [list(rank) for rank in ranks]
    except TypeError:
        lists = [[ranks]]
    for replica in (replica for rank in lists for replica in rank):
        if not isinstance(replica, RunningReplica):
            raise TypeError(f"it must return lists of RunningReplica, the best first, not {ranks!r}")
    return lists
