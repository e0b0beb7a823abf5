"""Builds the snapshot, the one value that proxies and handles know the cluster by.

The format is the contract in ARCHITECTURE.md; `rust/dataplane/src/snapshot.rs` reads it. Pure. A route leaves the
table as soon as its application is being deleted, a deployment when its last replica is draining: what a caller has
sent there finishes all the same, and what waits for it must not wait until that is over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayserve_fast._core import check_snapshot
from rayserve_fast.controlplane.spec import BOUNDLESS, DeploymentID, ReplicaAddress
from rayserve_fast.controlplane.state import Application, Deployment, Replica
from rayserve_fast.controlplane.traffic import Split, Traffic
from rayserve_fast.controlplane.traffic_checks import is_route
from rayserve_fast.exceptions import RayServeException

#: What keeps a client of an endpoint at one backend, unless its traffic says otherwise.
SHARD_KEY = {"header": "x-serve-shard-key"}


def build(version: tuple[int, int], apps: Mapping[str, Application], traffic: Traffic) -> bytes:
    """The snapshot as JSON bytes."""
    deployments = [d for app in apps.values() for d in app.deployments.values()]
    here = {name: app for name, app in apps.items() if not app.deleting}
    return json.dumps(
        {
            "version": version,
            "routes": _routes(here, traffic),
            "splits": {name: _split(split, here) for name, split in traffic.splits.items()},
            "deployments": {d.key: _deployment(d) for d in deployments if not d.leaving},
        },
        separators=(",", ":"),
    ).encode()


def readable(version: tuple[int, int], apps: Mapping[str, Application], traffic: Traffic) -> bytes:
    """The snapshot, once the proxies' own parser has read it. Raises ValueError or TypeError if it cannot."""
    json_bytes = build(version, apps, traffic)
    check_snapshot(json_bytes)
    return json_bytes


def check(what: str, apps: Mapping[str, Application], traffic: Traffic) -> None:
    """Refuse a change that leads to a snapshot which proxies cannot read: they would take no later one either.

    Args:
        what: the change, for the error.
        apps: every application, as the change makes them.
        traffic: every split and endpoint, as the change makes them.

    Raises:
        RayServeException: names the change, and says what the proxies' own parser says.
    """
    try:
        readable((0, 0), apps, traffic)
    except (ValueError, TypeError) as e:
        raise RayServeException(f"{what} is refused, as no proxy could read what it leads to: {e}") from None


def _routes(here: Mapping[str, Application], traffic: Traffic) -> list[dict[str, Any]]:
    """Those of applications, those of endpoints, and those that nobody owns but that have targets."""
    routes: dict[str, dict[str, Any]] = {}
    for app in here.values():
        if (prefix := app.spec.route_prefix) is not None:
            routes[prefix] = {"prefix": prefix, "app": app.name, "deployment": _ingress(app)}
    for endpoint in traffic.endpoints.values():
        if endpoint.route is not None:
            routes[endpoint.route] = {
                "prefix": endpoint.route,
                "app": "",
                "deployment": "",
                "pattern": True,  # an endpoint answers its path, not what lies below it
                "methods": endpoint.methods,
                "label": [endpoint.name, endpoint.methods],
                "split": endpoint.name,
            }
    for name, split in traffic.splits.items():
        if is_route(name):
            nobodys = {"prefix": name, "app": "", "deployment": "", "label": split.weights}
            routes[name] = {**routes.get(name, nobodys), "split": name}
    return list(routes.values())


def _split(split: Split, here: Mapping[str, Application]) -> dict[str, Any]:
    def named(app: Application) -> dict[str, Any]:
        return {"name": app.name, "deployment": _ingress(app)}

    return {
        "targets": [{**named(here[t]), "weight": w} for t, w in split.weights.items() if t in here],
        "sticky": split.sticky or (None if is_route(split.name) else SHARD_KEY),
        "rules": [r for r in split.rules if r["target"] in here],
        "shadows": [{**named(here[t]), "share": s} for t, s in split.shadows.items() if t in here],
    }


def _ingress(app: Application) -> str:
    return DeploymentID(app.routed, app.name).key


def _deployment(d: Deployment) -> dict[str, Any]:
    config = d.spec.config
    serving = d.serving()
    router = config.request_router_config or {}
    return {
        "app": d.spec.app,
        "name": d.spec.name,
        "max_ongoing_requests": min(config.max_ongoing_requests, BOUNDLESS),
        "max_queued_requests": min(config.max_queued_requests, BOUNDLESS),
        "backpressure": {
            "status_code": config.backpressure.status_code,
            "retry_after_s": config.backpressure.retry_after_s,
        },
        "retry_idempotent": config.retry_idempotent,
        "router": {key: router[key] for key in ("policy", "custom") if router.get(key)},
        "unavailable": f"{d.spec.id} is unavailable because it failed to deploy." if d.failed and not serving else None,
        "batch": None
        if config.max_batch_size is None
        else {
            "max_size": config.max_batch_size,
            "wait_s": config.batch_wait_timeout_s,
            "concurrent": config.slots,
        },
        "replicas": [_replica(r, r.address) for r in serving if r.address is not None],
    }


def _replica(r: Replica, address: ReplicaAddress) -> dict[str, Any]:
    row = {"id": r.id, "node_id": address.node_id, "unix": address.unix, "tcp": address.tcp}
    facts = {"metadata": address.metadata, "routing_stats": r.routing_stats}
    return row | {name: fact for name, fact in facts.items() if fact is not None}
