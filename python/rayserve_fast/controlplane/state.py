"""What the controller knows: applications, their deployments, their replicas.

Plain records without behaviour beyond counting. They are mutated only by `reconcile` (decisions and events) and
by the controller that executes; statuses are the reference's names as plain strings, so that nothing heavy is
imported here. The state machines are drawn in ARCHITECTURE.md, section "Control plane".
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from rayserve_fast.controlplane import transitions

if TYPE_CHECKING:
    from rayserve_fast.controlplane.process import Place
    from rayserve_fast.controlplane.spec import ApplicationSpec, DeploymentSpec, ReplicaAddress

ReplicaState = Literal["STARTING", "UPDATING", "RECOVERING", "RUNNING", "STOPPING"]

#: Start failures that one replica may cost before its deployment is given up, as in the reference.
RETRIES_PER_REPLICA = 3


@dataclass
class Replica:
    """One replica actor, from the decision to start it until its process is gone."""

    id: str
    version: str  # of the code and placement that it runs; differs from the deployment's: outdated
    config: str  # of the settings that it was last given; differs from the deployment's: to be reconfigured
    rank: int
    grace_s: float  # how long it may take to leave; a target of another version does not change it
    state: ReplicaState = "STARTING"
    place: Place | None = None  # known as soon as there is a process
    address: ReplicaAddress | None = None  # known as soon as the user's constructor has returned
    routing_stats: str | None = None  # what it said when it was last asked, as `replica.facts` writes it
    ready_at: float = 0.0
    idle: bool = False  # a STOPPING replica that has finished what it had

    @property
    def node_id(self) -> str | None:
        return self.place.node_id if self.place else None


@dataclass
class Deployment:
    """The target of one deployment, and what there is of it."""

    spec: DeploymentSpec
    version: str
    config: str
    target: int
    status: str = "UPDATING"
    trigger: str = "CONFIG_UPDATE_STARTED"
    message: str = ""
    replicas: dict[str, Replica] = field(default_factory=dict)
    deleting: bool = False
    rolling: bool = False  # this target replaces running replicas of another version
    started: bool = False  # a replica of this version has run
    failures: int = 0  # starts of this version that failed in a row
    failure: str = ""  # text of the last one
    early_deaths: int = 0  # replicas in a row that died soon after they were ready
    not_before: float = 0.0  # no start before this time (back-off)
    cramped: bool = False  # Ray has found no room for a replica, for long

    @property
    def key(self) -> str:
        return self.spec.id.key

    @property
    def threshold(self) -> int:
        """Failed starts in a row after which the deployment is given up."""
        return max(1, min(self.spec.config.max_constructor_retry_count, RETRIES_PER_REPLICA * self.target))

    @property
    def failed(self) -> bool:
        """Given up until the next deploy: no further starts, survivors keep serving."""
        return self.failures >= self.threshold and (self.rolling or not self.started)

    @property
    def leaving(self) -> bool:
        """Being deleted, and no replica takes anything new."""
        return self.deleting and all(r.state == "STOPPING" for r in self.replicas.values())

    def among(self, *states: ReplicaState) -> list[Replica]:
        return [r for r in self.replicas.values() if r.state in states]

    def serving(self) -> list[Replica]:
        """Replicas that a caller may send to, or whose links still finish what they have."""
        return [r for r in self.replicas.values() if r.address is not None and not r.idle]


@dataclass
class Application:
    """Deployments that are updated together; `deployments` keeps the order of the specification, callees first."""

    spec: ApplicationSpec
    deployed_at: float
    deployments: dict[str, Deployment] = field(default_factory=dict)
    deleting: bool = False
    former: str | None = None  # the ingress before this specification, if it has another
    notices: list[str] = field(default_factory=list)  # for the driver that waits in serve.run
    timings: dict[str, float] = field(default_factory=dict)  # step -> seconds since the deploy arrived

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def routed(self) -> str:
        """The deployment that the route leads to: a dropped ingress serves on until it stops, as the others are up."""
        former = self.deployments.get(self.former or "")
        if former and former.deleting and former.among("RUNNING"):
            return former.spec.name
        return self.spec.ingress

    def mark(self, step: str) -> None:
        """Note when the deploy came this far; the last replica's time stands."""
        self.timings[step] = round(time.time() - self.deployed_at, 3)

    def status(self) -> tuple[str, str]:
        """The application's status and message, from its deployments."""
        rows = [(d.spec.name, d.status, d.trigger, d.message) for d in self.deployments.values()]
        return transitions.application(rows, self.deleting)


def versions(spec: DeploymentSpec) -> tuple[str, str]:
    """Digests of what needs a new process when it changes, and of what `reconfigure` can change in place."""
    c = spec.config
    restart = (
        spec.code_version,
        c.ray_actor_options,
        c.placement_group_bundles,
        c.placement_group_strategy,
        c.placement_group_bundle_label_selector,
        c.max_replicas_per_node,
        c.max_batch_size is not None,
    )
    in_place = (
        c.user_config,
        c.max_ongoing_requests,
        c.max_batch_size,
        c.batch_wait_timeout_s,
        c.max_concurrent_batches,
        c.logging_config,
        c.request_router_config,
    )
    return _digest(restart), _digest(in_place)


def _digest(value: object) -> str:
    return blake2b(repr(value).encode(), digest_size=8).hexdigest()
