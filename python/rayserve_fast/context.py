"""Where code runs: the context of the replica and of the request that it handles.

The request context is set for every request, so this module imports nothing but the standard library and the plain
values of `controlplane.spec`, and the context is a slotted dataclass: 0.3 us to make, a frozen one costs 1.1 us.
Treat it as read-only all the same: it is shared by everything that the request starts.
"""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass
from typing import Any

from rayserve_fast.controlplane.spec import DeploymentConfig, DeploymentID, ReplicaID, ReplicaRank

__all__ = ["DeploymentActorContext", "ReplicaContext", "get_replica_context"]


@dataclass
class ReplicaContext:
    """Describes the replica that the calling code runs in; see `serve.get_replica_context`."""

    replica_id: ReplicaID
    servable_object: Any  # the user's instance, or the function
    _deployment_config: DeploymentConfig
    rank: ReplicaRank
    world_size: int  # replicas that the deployment wants to have
    gang_context: Any = None
    code_version: str | None = None

    @property
    def app_name(self) -> str:
        """The application that the replica serves."""
        return self.replica_id.deployment_id.app_name

    @property
    def deployment(self) -> str:
        """The name of the deployment that the replica runs."""
        return self.replica_id.deployment_id.name

    @property
    def replica_tag(self) -> str:
        """The replica's short random id."""
        return self.replica_id.unique_id


@dataclass
class DeploymentActorContext:
    """Describes the deployment-scoped actor that the calling code runs in."""

    deployment_id: DeploymentID
    actor_name: str
    code_version: str | None = None

    @property
    def app_name(self) -> str:
        """The application of the deployment."""
        return self.deployment_id.app_name

    @property
    def deployment(self) -> str:
        """The name of the deployment."""
        return self.deployment_id.name


@dataclass(slots=True)
class _RequestContext:
    """What is known of the request that the current task handles."""

    route: str = ""
    request_id: str = ""
    _internal_request_id: str = ""
    app_name: str = ""
    multiplexed_model_id: str = ""
    session_id: str = ""
    grpc_context: Any = None
    is_http_request: bool = False
    cancel_on_parent_request_cancel: bool = False
    _client: str = ""  # host:port
    _ray_trace_ctx: dict[str, Any] | None = None


_serve_request_context: contextvars.ContextVar[_RequestContext | None] = contextvars.ContextVar(
    "serve_request_context", default=None
)

#: In a call of a deployment with `max_batch_size`: how many requests it serves, the length of its lists.
#: `__getattr__` shows it.
_batch_size: contextvars.ContextVar[int | None] = contextvars.ContextVar("batch_size", default=None)

# Of the requests of the batch that runs (`serve.batch`); it has no request of its own.
_serve_batch_request_context: contextvars.ContextVar[list[_RequestContext | None]] = contextvars.ContextVar(
    "serve_batch_request_context"
)

# One replica per process: this names it. Set once, before the user's constructor runs.
_replica_context: ReplicaContext | None = None
# In local testing mode there are several in one process: this names the one whose code runs.
_local_replica: contextvars.ContextVar[ReplicaContext | None] = contextvars.ContextVar("local_replica", default=None)


def get_replica_context() -> ReplicaContext:
    """The context of the replica that the calling code runs in.

    Returns:
        Application, deployment, replica id, the user's own object, rank and world size.

    Raises:
        RayServeException: outside a replica.
    """
    if (context := _current_replica()) is None:
        from rayserve_fast.exceptions import RayServeException  # imports Ray: only when it is needed

        raise RayServeException("`serve.get_replica_context()` may only be called from within a Ray Serve deployment.")
    return context


def _current_replica() -> ReplicaContext | None:
    return _local_replica.get() or _replica_context


def _on_replica_loop() -> bool:
    """Whether this is a replica's event loop, which must not wait for the controller: a call says what is not there."""
    return asyncio._get_running_loop() is not None and _current_replica() is not None


def _set_replica_context(context: ReplicaContext | None) -> None:
    global _replica_context
    _replica_context = context


def _get_serve_request_context() -> _RequestContext:
    """The context of the current request; an empty one outside a request."""
    context = _serve_request_context.get()
    if context is None:
        context = _RequestContext()
        _serve_request_context.set(context)
    return context


def _get_serve_batch_request_context() -> list[_RequestContext]:
    """Those of the requests in the batch that runs (`serve.batch`), in their order; none outside a batch."""
    return [context or _RequestContext() for context in _serve_batch_request_context.get([])]


def __getattr__(name: str) -> Any:
    """`batch_size` (None outside a batch) and `web` (whether it came over HTTP) of the call that is being handled.

    Attributes of the module, as in Ray Serve 0.8, that each task and thread sees its own value of.
    """
    if name == "batch_size":
        return _batch_size.get()
    if name == "web":
        return (context := _serve_request_context.get()) is not None and context.is_http_request
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
