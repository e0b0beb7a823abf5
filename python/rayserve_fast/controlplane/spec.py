"""The plain values that travel between driver, controller, proxies and replicas.

Everything here is a frozen dataclass of builtin values: it pickles by reference to this module, and reading it costs
no pydantic, FastAPI or Starlette import in the process that does. Options were validated before they came here, by
`rayserve_fast.config` in the process of the user; nothing is checked again.

Left out: how a definition becomes bytes (`rayserve_fast.application`) and what the controller remembers beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_APP_NAME = "default"

#: A limit above this is none that anybody meets: the data plane, which counts in 32 bits, is given this instead.
BOUNDLESS = 2**31 - 1


class DefaultRoute(str):
    """The route of an application for which none was given: its ingress may know one. Never travels."""

    __slots__ = ()


DEFAULT_ROUTE = DefaultRoute("/")


@dataclass(frozen=True, slots=True)
class DeploymentID:
    """Names one deployment of one application."""

    name: str
    app_name: str = DEFAULT_APP_NAME

    @property
    def key(self) -> str:
        """How the snapshot names it: `app#deployment`. Neither name may contain `#` on the deployment's side."""
        return f"{self.app_name}#{self.name}"

    def __str__(self) -> str:
        return f"Deployment(name='{self.name}', app='{self.app_name}')"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class ReplicaID:
    """Names one replica: a short random id, and the deployment that it runs."""

    unique_id: str
    deployment_id: DeploymentID

    def to_full_id_str(self) -> str:
        """The name of the replica's Ray actor."""
        return f"SERVE_REPLICA::{self.deployment_id.key}#{self.unique_id}"

    def __str__(self) -> str:
        deployment = self.deployment_id
        return f"Replica(id='{self.unique_id}', deployment='{deployment.name}', app='{deployment.app_name}')"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class ReplicaRank:
    """Where a replica stands among its deployment's replicas: over all nodes, its node, and within that node."""

    rank: int
    node_rank: int
    local_rank: int


@dataclass(frozen=True, slots=True)
class DriverEnv:
    """What a replica needs to import the code of the driver that deployed it, not of the one that started Serve."""

    sys_path: tuple[str, ...] = ()
    cwd: str = ""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Backpressure:
    """The answer to a request that finds its queue full; `retry_after_s` in seconds, None for no header."""

    status_code: int = 503
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """Every option of a deployment, validated, with the defaults filled in.

    Suffix `_s` is seconds. The options of a feature that is itself a configuration class (autoscaling, router, logging,
    gang) are its fields as a mapping, or None.
    """

    num_replicas: int = 1  # how many to run now; with autoscaling: initial_replicas, else min_replicas, at least 1
    max_ongoing_requests: int = 5
    max_queued_requests: int = -1
    max_batch_size: int | None = None  # not None: the router puts requests together, code takes lists
    batch_wait_timeout_s: float = 0.0
    max_concurrent_batches: int = 1
    backpressure: Backpressure = Backpressure()
    retry_idempotent: bool = True
    user_config: Any = None
    ray_actor_options: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    placement_group_bundles: tuple[Mapping[str, float], ...] | None = None
    placement_group_strategy: str | None = None
    placement_group_bundle_label_selector: tuple[Mapping[str, str], ...] | None = None
    max_replicas_per_node: int | None = None
    graceful_shutdown_wait_loop_s: float = 2.0
    graceful_shutdown_timeout_s: float = 20.0
    health_check_period_s: float = 10.0
    health_check_timeout_s: float = 30.0
    max_constructor_retry_count: int = 20
    rolling_update_percentage: float = 0.2
    max_surge_percent: int = 0
    autoscaling_config: Mapping[str, Any] | None = None
    request_router_config: Mapping[str, Any] | None = None
    logging_config: Mapping[str, Any] | None = None
    gang_scheduling_config: Mapping[str, Any] | None = None
    deployment_actors: bytes | None = None  # cloudpickle of the list of DeploymentActorConfig
    configured: frozenset[str] = frozenset()  # the options that the user gave explicitly

    @property
    def slots(self) -> int:
        """What one replica runs at once: requests, or batches; at most `BOUNDLESS`."""
        return min(self.max_ongoing_requests if self.max_batch_size is None else self.max_concurrent_batches, BOUNDLESS)


@dataclass(frozen=True, slots=True)
class Definition:
    """The user's code and its constructor arguments; bound applications among them are DeploymentHandles already."""

    func_or_class: Callable[..., Any]
    init_args: tuple[Any, ...] = ()
    init_kwargs: Mapping[str, Any] = field(default_factory=dict)


def unpack_definition(code: bytes, init_args: tuple[Any, ...], init_kwargs: Mapping[str, Any]) -> Definition:
    """What the bytes of a definition call when a replica opens them."""
    from ray import cloudpickle

    return Definition(cloudpickle.loads(code), init_args, init_kwargs)


@dataclass(frozen=True, slots=True)
class DeploymentSpec:
    """One deployment as it travels to the controller and its replicas."""

    app: str
    name: str
    definition: bytes = field(repr=False)  # ray.cloudpickle.loads makes a Definition of it; only replicas do
    config: DeploymentConfig
    driver: DriverEnv = field(repr=False)
    is_asgi: bool
    docs_path: str | None
    code_version: str  # a replica of another code version must be replaced, one of the same may be reconfigured

    @property
    def id(self) -> DeploymentID:
        return DeploymentID(self.name, self.app)


@dataclass(frozen=True, slots=True)
class ApplicationSpec:
    """Deployments that are updated together; `deployments` lists callees before their callers, the ingress last."""

    name: str
    route_prefix: str | None  # None: not reachable over HTTP
    ingress: str
    deployments: tuple[DeploymentSpec, ...]
    era: str = ""  # which API made it: "" for today's, "backend", "deploy"; names are unique over all of them
    labels: Mapping[str, Any] = field(default_factory=dict)  # plain JSON that only the API of its era reads


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What a replica process is started with."""

    replica_id: str  # 8 random alphanumeric characters
    deployment: DeploymentSpec
    token: bytes = field(repr=False)  # the cluster's secret, for the handshake on links
    socket_dir: str  # a 0700 directory of this node, short: a socket's path is at most 108 bytes
    route_prefix: str | None = None
    rank: ReplicaRank = ReplicaRank(0, 0, 0)
    world_size: int = 1
    listen_tcp: bool = True

    @property
    def id(self) -> ReplicaID:
        return ReplicaID(self.replica_id, self.deployment.id)


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """Where a started replica takes links; `unix` is a path on `node_id`, `tcp` is `host:port`, None: not listening."""

    replica_id: str
    node_id: str
    unix: str | None
    tcp: str | None
    metadata: str | None = None  # what `record_replica_metadata` has returned, as `replica.facts` writes it
    has_routing_stats: bool = False  # it can be asked for `routing_stats`
