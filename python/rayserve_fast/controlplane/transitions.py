"""Deployment and application statuses: which event leads from which status to which.

Pure tables with the reference's names. Deliberately left out: why an event happened (`reconcile` knows) and the
autoscaling triggers, which come with autoscaling. An event without an entry for the current status changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Event = Literal["deploy", "scale_up", "scale_down", "healthy", "start_failed", "replica_lost", "delete"]
Status = tuple[str, str]  # status, trigger

_ANY = "*"
_TABLE: dict[tuple[str, Event], Status] = {
    (_ANY, "delete"): ("UPDATING", "DELETING"),
    (_ANY, "deploy"): ("UPDATING", "CONFIG_UPDATE_STARTED"),
    ("HEALTHY", "scale_up"): ("UPSCALING", "CONFIG_UPDATE_STARTED"),
    ("HEALTHY", "scale_down"): ("DOWNSCALING", "CONFIG_UPDATE_STARTED"),
    ("UPSCALING", "scale_up"): ("UPSCALING", "CONFIG_UPDATE_STARTED"),
    ("UPSCALING", "scale_down"): ("DOWNSCALING", "CONFIG_UPDATE_STARTED"),
    ("DOWNSCALING", "scale_up"): ("UPSCALING", "CONFIG_UPDATE_STARTED"),
    ("DOWNSCALING", "scale_down"): ("DOWNSCALING", "CONFIG_UPDATE_STARTED"),
    ("UPDATING", "healthy"): ("HEALTHY", "CONFIG_UPDATE_COMPLETED"),
    ("UPSCALING", "healthy"): ("HEALTHY", "UPSCALE_COMPLETED"),
    ("DOWNSCALING", "healthy"): ("HEALTHY", "DOWNSCALE_COMPLETED"),
    ("UNHEALTHY", "healthy"): ("HEALTHY", "UNSPECIFIED"),
    ("DEPLOY_FAILED", "healthy"): ("HEALTHY", "UNSPECIFIED"),
    ("UPDATING", "start_failed"): ("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED"),
    ("DEPLOY_FAILED", "start_failed"): ("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED"),
    ("UPSCALING", "start_failed"): ("UNHEALTHY", "REPLICA_STARTUP_FAILED"),
    ("DOWNSCALING", "start_failed"): ("UNHEALTHY", "REPLICA_STARTUP_FAILED"),
    ("UNHEALTHY", "start_failed"): ("UNHEALTHY", "REPLICA_STARTUP_FAILED"),
    ("HEALTHY", "replica_lost"): ("UNHEALTHY", "HEALTH_CHECK_FAILED"),
    ("UPSCALING", "replica_lost"): ("UNHEALTHY", "HEALTH_CHECK_FAILED"),
    ("DOWNSCALING", "replica_lost"): ("UNHEALTHY", "HEALTH_CHECK_FAILED"),
}


def transition(status: str, trigger: str, event: Event) -> Status:
    """The status and trigger after `event`; unchanged when the table has no entry."""
    if trigger == "DELETING":
        return status, trigger
    return _TABLE.get((_ANY, event)) or _TABLE.get((status, event)) or (status, trigger)


def application(deployments: Iterable[tuple[str, str, str, str]], deleting: bool) -> tuple[str, str]:
    """Status and message of an application; of its deployments' (name, status, trigger, message) the worst decides."""
    rows = list(deployments)
    if deleting:
        return "DELETING", ""

    def having(*statuses: str) -> list[tuple[str, str, str, str]]:
        return [row for row in rows if row[1] in statuses]

    if failed := having("DEPLOY_FAILED"):
        reasons = "\n".join(f"{name}: {text}" for name, _, _, text in failed)
        return "DEPLOY_FAILED", f"Failed to update the deployments {[name for name, *_ in failed]}.\n{reasons}"
    if unhealthy := having("UNHEALTHY"):
        return "UNHEALTHY", f"The deployments {[name for name, *_ in unhealthy]} are UNHEALTHY."
    if having("UPDATING") or any(t == "CONFIG_UPDATE_STARTED" for _, _, t, _ in having("UPSCALING", "DOWNSCALING")):
        return "DEPLOYING", ""
    return "RUNNING", ""
