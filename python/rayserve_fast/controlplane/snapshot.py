"""Builds the snapshot, the one value that proxies and handles know the cluster by.

The format is the contract in ARCHITECTURE.md; `rust/dataplane/src/snapshot.rs` reads it. Pure. A route leaves the
table as soon as its application is being deleted, a deployment when its last replica is draining: what a caller has
sent there finishes all the same, and what waits for it must not wait until that is over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rayserve_fast.controlplane.state import Application, Deployment


def build(version: tuple[int, int], apps: Iterable[Application]) -> bytes:
    """The snapshot as JSON bytes."""
    apps = list(apps)
    return json.dumps(
        {
            "version": version,
            "routes": [
                {
                    "prefix": app.spec.route_prefix,
                    "app": app.name,
                    "deployment": f"{app.name}#{app.routed}",
                }
                for app in apps
                if app.spec.route_prefix is not None and not app.deleting
            ],
            "deployments": {d.key: _deployment(d) for app in apps for d in app.deployments.values() if not d.leaving},
            "draining_nodes": [],
        },
        separators=(",", ":"),
    ).encode()


def _deployment(d: Deployment) -> dict[str, Any]:
    config = d.spec.config
    serving = d.serving()
    router = config.request_router_config or {}
    return {
        "app": d.spec.app,
        "name": d.spec.name,
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
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
            "concurrent": config.max_concurrent_batches,
        },
        "replicas": [
            {"id": r.id, "node_id": r.address.node_id, "unix": r.address.unix, "tcp": r.address.tcp}
            for r in serving
            if r.address is not None
        ],
    }
