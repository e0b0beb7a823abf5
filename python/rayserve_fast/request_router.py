"""Routers: which replica takes a request. The public names of `ray.serve.request_router`, and the built-in rules.

A built-in router (`LeastLoadedRequestRouter` and the others below) is a rule of the Rust engine: its class here only
names it, and no request of such a deployment meets Python. A subclass of `RequestRouter` is asked for every request,
on a thread of its own in the process that routes: of the proxy for HTTP, of the caller for handles
(`rayserve_fast.routing`). It sees what that process knows of the replicas.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rayserve_fast.controlplane.spec import DeploymentID, ReplicaID
from rayserve_fast.importing import import_attr
from rayserve_fast.replica import facts

__all__ = [
    "FIFOMixin",
    "LocalityMixin",
    "MultiplexMixin",
    "PendingRequest",
    "ReplicaID",
    "ReplicaResult",
    "RequestRouter",
    "RunningReplica",
]


@dataclass(frozen=True)
class RequestMetadata:
    """What is known of a request before anybody has read its arguments."""

    request_id: str
    internal_request_id: str
    call_method: str = "__call__"
    route: str = ""
    app_name: str = ""
    multiplexed_model_id: str = ""
    session_id: str = ""
    is_streaming: bool = False
    is_http_request: bool = False
    prefers_local: bool = False  # `options(_prefer_local_routing=True)`


@dataclass(eq=False)
class PendingRequest:
    """A request that waits for its replica.

    Args:
        args, kwargs: copies of a call's arguments; of an HTTP request there are none.
        metadata: ids, method, route, model and session.
        created_at: `time.time()` when it came.
        routing_context: whatever routers want to remember between two attempts.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    metadata: RequestMetadata
    created_at: float = field(default_factory=time.time)
    routing_context: dict[str, Any] = field(default_factory=dict)
    resolved: bool = True


class ReplicaResult:
    """What `on_request_routed` is given for the answer to come, which the data plane carries past Python."""


@dataclass(eq=False)
class RunningReplica:
    """A replica that takes requests, as this process knows it now."""

    replica_id: ReplicaID
    node_id: str = ""
    max_ongoing_requests: int = 1
    multiplexed_model_ids: set[str] = field(default_factory=set)
    queue_len: int = 0  # requests in flight there, this caller's and, by its last answer, everybody else's
    has_room: bool = True
    availability_zone: str | None = None
    routing_stats: dict[str, Any] = field(default_factory=dict)
    replica_metadata: dict[str, Any] = field(default_factory=dict)
    _facts: tuple[str | None, ...] = (None, None)  # metadata and stats as they came
    is_cross_language: ClassVar[bool] = False


class _QueueLengths:
    """Queue lengths by replica; they are always known here, nothing is probed."""

    def __init__(self, replicas: Mapping[ReplicaID, RunningReplica]) -> None:
        self._replicas = replicas

    def get(self, replica_id: ReplicaID) -> int | None:
        replica = self._replicas.get(replica_id)
        return None if replica is None else replica.queue_len


class RequestRouter:
    """What a router of one's own derives from.

    One object serves one deployment in one process; all its methods are called on one thread, in its event loop.

    Args:
        deployment_id: whose requests it routes.
        self_node_id: the node of this process.
    """

    def __init__(self, deployment_id: DeploymentID, *, self_node_id: str = "", **_: Any) -> None:
        self._deployment_id = deployment_id
        self._self_node_id = self_node_id
        self._replicas: dict[ReplicaID, RunningReplica] = {}
        self.num_pending_requests = 0

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once, with `request_router_kwargs`."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank replicas for a request: the least loaded with room of the first list that has one takes it.

        If no listed replica has room the router is asked again, after a pause that grows (`initial_backoff_s` ...).
        """
        raise NotImplementedError

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called when replicas have come or gone, or tell something new of themselves."""

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Called when a request has been given to a replica."""

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called when a call or an HTTP request that was routed has ended, however it did."""

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Accepted for compatibility, never called: read `RunningReplica.queue_len`."""

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called when a replica has gone."""

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Accepted for compatibility, never called: an unavailable replica is no candidate."""

    def select_available_replicas(self, candidates: list[RunningReplica] | None = None) -> list[RunningReplica]:
        """Those of `candidates`, or of all replicas, that take one more request."""
        return [r for r in (self._replicas.values() if candidates is None else candidates) if r.has_room]

    @property
    def curr_replicas(self) -> dict[ReplicaID, RunningReplica]:
        """The replicas that take requests."""
        return self._replicas

    @property
    def replica_queue_len_cache(self) -> _QueueLengths:
        """Queue lengths by replica id."""
        return _QueueLengths(self._replicas)

    @property
    def app_name(self) -> str:
        """The application of the deployment."""
        return self._deployment_id.app_name

    def _refresh(self, replicas: Iterable[RunningReplica]) -> None:
        """Take over what is known now; the objects stay the same as long as their replicas."""
        before, news = set(self._replicas), False
        now = {replica.replica_id: replica for replica in replicas}
        for replica_id in before - now.keys():
            del self._replicas[replica_id]
            self.on_replica_actor_died(replica_id)
        for replica_id, replica in now.items():
            known = self._replicas.setdefault(replica_id, replica)
            if known is replica or known._facts != replica._facts:
                replica.replica_metadata, replica.routing_stats = map(facts.read, replica._facts)
                news = True
            else:
                replica.replica_metadata, replica.routing_stats = known.replica_metadata, known.routing_stats
            vars(known).update(vars(replica))
        if news or before - now.keys():
            self.update_replicas(list(self._replicas.values()))


class FIFOMixin:
    """Requests are served in the order of arrival, as everywhere here; for compatibility."""


class LocalityMixin:
    """Prefers replicas on the node of the process that routes."""

    def rank_replicas_via_locality(self: Any, replicas: list[RunningReplica]) -> list[list[RunningReplica]]:
        """Those of this node, those of this node's zone, the others; zones are not known yet."""
        near = [r for r in replicas if r.node_id == self._self_node_id]
        return [near, [], [r for r in replicas if r.node_id != self._self_node_id]]

    def apply_locality_routing(self: Any, pending_request: PendingRequest | None = None) -> set[ReplicaID]:
        """Those of this node with room, else all."""
        near = [r for r in self.select_available_replicas() if r.node_id == self._self_node_id]
        return {r.replica_id for r in near or self.curr_replicas.values()}


class MultiplexMixin:
    """Prefers replicas that hold a request's model."""

    def rank_replicas_via_multiplex(
        self: Any, replicas: list[RunningReplica], multiplexed_model_id: str
    ) -> list[list[RunningReplica]]:
        """Those that hold the model, those that hold the fewest models, the others."""
        holders = [r for r in replicas if multiplexed_model_id in r.multiplexed_model_ids]
        others = [r for r in replicas if multiplexed_model_id not in r.multiplexed_model_ids]
        fewest = min((len(r.multiplexed_model_ids) for r in others), default=0)
        ranks: list[list[RunningReplica]] = [holders, [], []]
        for replica in others:
            ranks[1 if len(replica.multiplexed_model_ids) == fewest else 2].append(replica)
        return ranks

    def apply_multiplex_routing(self: Any, pending_request: PendingRequest | None = None) -> set[ReplicaID]:
        """Those that hold the request's model, else those with the fewest models, else all: the first with room."""
        replicas = list(self.curr_replicas.values())
        model = pending_request.metadata.multiplexed_model_id if pending_request else ""
        for rank in self.rank_replicas_via_multiplex(replicas, model) if model else ():
            if any(r.has_room for r in rank):
                return {r.replica_id for r in rank}
        return {r.replica_id for r in replicas}


class _BuiltIn(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):
    """A rule of the engine, which also answers in Python, for routers that derive from it."""

    policy: ClassVar[str]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        metadata = pending_request.metadata if pending_request else None
        if metadata is not None and metadata.multiplexed_model_id:
            return self.rank_replicas_via_multiplex(candidate_replicas, metadata.multiplexed_model_id)
        if metadata is not None and metadata.prefers_local:
            return self.rank_replicas_via_locality(candidate_replicas)
        return [candidate_replicas]


class LeastLoadedRequestRouter(_BuiltIn):
    """The replica with the fewest requests in flight; the default."""

    policy = "least_loaded"


class PowerOfTwoChoicesRequestRouter(_BuiltIn):
    """The less loaded of two replicas taken at random: Ray Serve's default."""

    policy = "power_of_two"

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        return [part for rank in ranks for part in (random.sample(rank, min(2, len(rank))), rank) if part]


class RoundRobinRouter(_BuiltIn):
    """One replica after the other."""

    policy = "round_robin"


class ConsistentHashRouter(_BuiltIn):
    """A session stays at its replica; requests without a session go anywhere."""

    policy = "consistent_hash"


def built_in(path: str) -> type[_BuiltIn] | None:
    """The built-in router of an import path; one of Ray Serve's means the same path of this project.

    >>> built_in("ray.serve.experimental.round_robin_router:RoundRobinRouter").policy
    'round_robin'
    >>> built_in("my_routers:Mine") is None
    True
    """
    own = re.sub(r"^ray\.serve\b", "rayserve_fast", path)
    if not own.startswith("rayserve_fast."):
        return None
    try:
        found = import_attr(own)
    except (ImportError, AttributeError, ValueError):  # a router of Ray Serve's that has no counterpart here
        return None
    return found if isinstance(found, type) and issubclass(found, _BuiltIn) and "policy" in vars(found) else None
