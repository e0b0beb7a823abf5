"""The options and methods that are accepted but have no effect yet, or not all, and the warnings that name them.

One place: whoever builds a feature strikes them out here. Nothing is ignored in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import DeploymentConfig

logger = logging.getLogger("ray.serve")

DEPLOYMENT_OPTIONS = {
    "autoscaling_config": "nothing scales; it runs its initial_replicas, else min_replicas, at least one",
    "deployment_actors": "no such actor is started",
    "gang_scheduling_config": "its replicas are placed one by one",
    "graceful_shutdown_wait_loop_s": "a draining replica leaves as soon as it is idle, without polling",
    "health_check_period_s": "only the death of a replica is noticed, at once",
    "health_check_timeout_s": "only the death of a replica is noticed, at once",
    "logging_config": "replicas log as Ray's workers do",
    "max_replicas_per_node": "Ray places the replicas",
    "max_surge_percent": "an old replica stops before its successor starts",
    "placement_group_bundle_label_selector": "replicas get no placement group",
    "placement_group_bundles": "replicas get no placement group",
    "placement_group_strategy": "replicas get no placement group",
}
DEPLOYMENT_METHODS = {
    "check_health": "is called once, when a replica starts; later only its death is noticed",
    "record_autoscaling_stats": "is not called, as nothing scales",
}
APPLICATION_OPTIONS = {
    "logging_config": "replicas log as Ray's workers do",
    "external_scaler_enabled": "there is no scaling endpoint",
}
START_OPTIONS = {
    "grpc_options": "there is no gRPC server",
    "logging_config": "controller and proxies log as Ray's workers do",
    "tracing_config": "nothing is traced",
    "http_options.root_url": "nothing reads it",
    "http_options.ssl_keyfile": "proxies serve plain HTTP",
    "http_options.ssl_certfile": "proxies serve plain HTTP",
    "http_options.ssl_keyfile_password": "proxies serve plain HTTP",
    "http_options.ssl_ca_certs": "proxies serve plain HTTP",
}


def warn_deployment(name: str, config: DeploymentConfig, code: Callable[..., Any]) -> None:
    """Name the options of a deployment, and the methods of its class, that have no effect yet, or not all."""
    _warn(f"deployment '{name}'", config.configured, DEPLOYMENT_OPTIONS)
    for method, what in DEPLOYMENT_METHODS.items():
        if hasattr(code, method):
            logger.warning("deployment '%s': in this version, method '%s' %s.", name, method, what)


def warn_application(name: str, given: Iterable[str]) -> None:
    """The same for the options of `serve.run`; `given` are the names of those that were given."""
    _warn(f"application '{name}'", given, APPLICATION_OPTIONS)


def warn_start(given: Iterable[str]) -> None:
    """The same for `serve.start`; an HTTP option's name is `http_options.` and its field."""
    _warn("serve.start", given, START_OPTIONS)


def _warn(where: str, given: Iterable[str], table: dict[str, str]) -> None:
    for option in sorted(set(given) & set(table)):
        logger.warning("%s: option '%s' has no effect in this version: %s.", where, option, table[option])
