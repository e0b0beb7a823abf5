"""What `.deploy()` does: it makes one application of the deployment's name, on today's core, in the era "deploy".

Kept in the application's labels is what another driver needs to speak of it again (`deployed.py`).
"""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle

from rayserve_fast import api, context
from rayserve_fast.application import with_runtime_env
from rayserve_fast.classic.handles import older_handle
from rayserve_fast.classic.spelling import OlderOptions
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.seen import OvertakenError
from rayserve_fast.definition import dump_code
from rayserve_fast.handle import DeploymentHandle, RayServeHandle

if TYPE_CHECKING:
    from rayserve_fast.classic.deployable import Deployable
    from rayserve_fast.controlplane.spec import ApplicationSpec
    from rayserve_fast.options import DeploymentOptions

ERA = "deploy"


def deploy(deployment: Deployable, blocking: bool) -> None:
    """Deploy it, and wait until it serves if `blocking`; errors as for `Deployment.deploy`."""
    began = time.monotonic()
    client.connect_ray()
    controller = client.find() or client.start(api._cluster_options(None, None))
    while True:
        labels = client.ask("applications", ERA).get(deployment._name)
        _check_previous(deployment, labels)
        spec = replace(_spec(deployment, labels), era=ERA, labels=_labels(deployment))
        try:
            client.deploy(controller, [spec], blocking, began, {spec.name: labels})
        except OvertakenError:
            continue  # with what the other driver has made of it
        return


def delete(name: str) -> None:
    """Delete what `.deploy()` made under this name, nobody else's application."""
    if name in client.ask("applications", ERA):
        api.delete(name)


def handle(name: str, sync: bool) -> RayServeHandle:
    """A handle whose calls give ObjectRefs; errors as for `Deployment.get_handle`."""
    ingress = name
    if not context._on_replica_loop():
        known(name)
        ingress = client.ask("ingress", name)
    return older_handle(DeploymentHandle(ingress, name), sync)


def known(name: str) -> dict[str, Any]:
    """The labels of what `.deploy()` made under this name.

    Raises:
        KeyError: there is none.
    """
    labels: dict[str, Any] | None = client.ask("applications", ERA).get(name)
    if labels is None:
        raise KeyError(f"Deployment {name} was not found. Did you call Deployment.deploy()?")
    return labels


def options_of(labels: dict[str, Any]) -> tuple[DeploymentOptions, OlderOptions]:
    """The options that a deployment was deployed with."""
    options: tuple[DeploymentOptions, OlderOptions] = cloudpickle.loads(base64.b64decode(labels["options"]))
    return options


def reconfigured(spec: ApplicationSpec, deployment: Deployable) -> ApplicationSpec:
    """The same code in the same environment with the options of `deployment`."""
    *callees, ingress = spec.deployments
    config = with_runtime_env(deployment._deployed_options().plain(), ingress.driver.runtime_env)
    return replace(spec, route_prefix=deployment.route_prefix, deployments=(*callees, replace(ingress, config=config)))


def _spec(deployment: Deployable, labels: dict[str, Any] | None) -> ApplicationSpec:
    """What replaces the deployment with these labels."""
    if labels is not None and deployment._older.version is not None and labels["version"] == deployment._older.version:
        there: ApplicationSpec | None = client.ask("specification", deployment._name)
        if there is not None:  # or it has gone meanwhile
            return reconfigured(there, deployment)
    return deployment._built(dict(ray.get_runtime_context().runtime_env))


def _labels(deployment: Deployable) -> dict[str, Any]:
    problem = f"Could not serialize the options of the deployment {deployment._name}"
    options = dump_code((deployment._options, replace(deployment._older, prev_version=None)), None, problem)
    return {"version": deployment._older.version, "options": base64.b64encode(options).decode()}


def _check_previous(deployment: Deployable, labels: dict[str, Any] | None) -> None:
    wanted = deployment.prev_version
    if wanted is None:
        return
    if labels is None:
        raise ValueError(f"prev_version '{wanted}' is given, but there is no deployment '{deployment._name}' yet.")
    if labels["version"] != wanted:
        raise ValueError(
            f"prev_version '{wanted}' is not the version of the deployment '{deployment._name}' that is there, which is"
            f" {labels['version']!r}. Look at serve.get_deployment({deployment._name!r}).version and decide again."
        )
