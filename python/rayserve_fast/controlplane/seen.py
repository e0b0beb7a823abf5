"""What a driver had seen of an application when it chose to deploy: of two drivers at once, one is told to look again.

A driver reads, decides and then deploys; only the controller does one thing after the other, so it compares. The labels
stand for the application, as they are all that the older APIs decide by. Pure, and part of `Traffic.check_deploy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from rayserve_fast.controlplane.spec import ApplicationSpec
from rayserve_fast.exceptions import RayServeException

#: By application: its labels, or None if there was none of that era. Of others anything is taken.
Seen: TypeAlias = Mapping[str, Mapping[str, Any] | None]


class OvertakenError(RayServeException):
    """The application is not what the driver had seen: another driver was faster. Nothing has changed."""


def check_seen(spec: ApplicationSpec, there: ApplicationSpec | None, seen: Seen) -> None:
    """Refuse to deploy over what has not been seen; an order that a restarted controller is given again passes.

    Args:
        spec: what is to be deployed.
        there: what would be replaced, None if nothing.
        seen: what the driver says.

    Raises:
        OvertakenError: the labels are others, or there is an application where there was none, or none where one was.
    """
    if spec.name not in seen or _mark(there) == seen[spec.name]:
        return
    if there is not None and _code(there) == _code(spec) and there.labels == spec.labels:
        return
    raise OvertakenError(
        f'Another driver has changed the application "{spec.name}" meanwhile; look at it and decide again.'
    )


def _mark(there: ApplicationSpec | None) -> Mapping[str, Any] | None:
    return None if there is None else there.labels


def _code(spec: ApplicationSpec) -> list[str]:
    return [deployment.code_version for deployment in spec.deployments]
