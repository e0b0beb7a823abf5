"""From applications to replicas in this process: as `rayserve_fast.application` builds, but code is not pickled.

The deployments run the very functions and classes that the test holds, with its globals and its patches. The arguments
bound to them go through the pickler all the same: that is how applications in them become handles, and a constructor
gets copies, as on a cluster.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray import cloudpickle

from rayserve_fast.application import Builder
from rayserve_fast.controlplane.spec import Definition
from rayserve_fast.definition import CodePickler, dump_code
from rayserve_fast.handle import DeploymentHandle

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import DeploymentSpec
    from rayserve_fast.deployment import Deployment

logger = logging.getLogger("ray.serve")

# Of the options that change what user code finds, those that a process which runs already cannot have.
_IGNORED = {"num_gpus": "every GPU of the node is visible", "runtime_env": "code runs in this process's environment"}


class LocalBuilder(Builder):
    """Keeps the definitions beside the specifications, in the same order."""

    def __init__(self, app_name: str) -> None:
        super().__init__(app_name, {})
        self.definitions: list[Definition] = []

    def define(self, deployment: Deployment) -> bytes:
        problem = f"Could not serialize the arguments bound to the deployment {deployment.name}"
        packed = dump_code((deployment.init_args, deployment.init_kwargs), self.handle, problem, _ArgumentPickler)
        self.definitions.append(Definition(deployment.func_or_class, *cloudpickle.loads(packed)))
        return b""

    def handle_to(self, name: str) -> DeploymentHandle:
        return DeploymentHandle(name, self._app_name, _local=True)


class _ArgumentPickler(CodePickler):
    def _choose(self, name: str) -> None:
        """By reference, as this process has the module."""


def warn(spec: DeploymentSpec) -> None:
    """Name the options that have no effect in this mode."""
    for option in _IGNORED.keys() & (spec.config.ray_actor_options.keys()):
        if spec.config.ray_actor_options[option]:
            logger.warning(
                "deployment '%s': option '%s' has no effect in local testing mode: %s.",
                spec.name,
                option,
                _IGNORED[option],
            )
