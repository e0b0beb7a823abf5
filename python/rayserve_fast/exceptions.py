"""The exceptions of `ray.serve.exceptions`: same names, same parents, same constructor arguments.

Every one of them survives pickling with its fields, because they cross process boundaries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.exceptions import TaskCancelledError

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import DeploymentID

__all__ = [
    "BackPressureError",
    "DeploymentUnavailableError",
    "RayServeException",
    "ReplicaUnavailableError",
    "RequestCancelledError",
    "gRPCStatusError",
]


class RayServeException(Exception):
    """What everything raised by Serve itself derives from."""


class gRPCStatusError(RayServeException):
    """Carries the gRPC status that a handler set before it raised `original_exception`."""

    def __init__(self, original_exception: BaseException, code: Any = None, details: str | None = None) -> None:
        super().__init__(original_exception, code, details)
        self.original_exception = original_exception
        self.grpc_code = code
        self.grpc_details = details

    def __str__(self) -> str:
        return str(self.original_exception)


class BackPressureError(RayServeException):
    """The deployment's queue is full: `max_queued_requests` of this caller wait already.

    Args:
        num_queued_requests: how many were waiting when this one came.
        max_queued_requests: the deployment's limit.
        status_code: what an HTTP client is answered, 503 or 429.
        retry_after_s: seconds for the `Retry-After` header, None for no header.

    >>> str(BackPressureError(3, 3))
    'Request dropped due to backpressure (num_queued_requests=3, max_queued_requests=3).'
    """

    def __init__(
        self,
        num_queued_requests: int,
        max_queued_requests: int,
        status_code: int = 503,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(num_queued_requests, max_queued_requests, status_code, retry_after_s)
        self.status_code = status_code
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        """The text that the client reads."""
        queued, limit = self.args[:2]
        return f"Request dropped due to backpressure (num_queued_requests={queued}, max_queued_requests={limit})."

    def __str__(self) -> str:
        return self.message


class RequestCancelledError(RayServeException, TaskCancelledError):  # type: ignore[misc]
    """The request was cancelled, by `DeploymentResponse.cancel()` or with the request that it was made for."""

    def __init__(self, request_id: str | None = None) -> None:
        Exception.__init__(self, request_id)
        self.task_id = None  # what Ray's own class carries; there is no Ray task here
        self._request_id = request_id

    def __str__(self) -> str:
        return f"Request {self._request_id} was cancelled." if self._request_id else "Request was cancelled."


class DeploymentUnavailableError(RayServeException):
    """The deployment failed to deploy, was deleted or never was, and nothing serves its requests."""

    _why: str | None = None

    def __init__(self, deployment_id: DeploymentID) -> None:
        super().__init__(deployment_id)

    @classmethod
    def _because(cls, deployment_id: DeploymentID, why: str) -> DeploymentUnavailableError:
        """With a sentence that says which it is; the reference has one for all cases."""
        error = cls(deployment_id)
        error._why = why
        return error

    @property
    def message(self) -> str:
        """The text that the client reads."""
        return self._why or f"{self.args[0]} is unavailable because it failed to deploy."

    def __str__(self) -> str:
        return self.message


class ReplicaUnavailableError(RayServeException):
    """The replica that was chosen for a call is gone."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(replica_id)

    @property
    def message(self) -> str:
        """A sentence that names the replica."""
        return f"Replica {self.args[0]} is no longer available."

    def __str__(self) -> str:
        return self.message
