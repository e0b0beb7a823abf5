"""What `.deploy()` has made, as any driver finds it: `serve.list_deployments()` and `serve.get_deployment(name)`.

The code stays closed until somebody asks for it: this process need not be able to import it to list, delete, call or
reconfigure what runs it, or to deploy it again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray import cloudpickle

from rayserve_fast.classic import deploy
from rayserve_fast.classic.spelling import OlderOptions, warn_older
from rayserve_fast.controlplane import client
from rayserve_fast.deployment import Deployment

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import ApplicationSpec, Definition
    from rayserve_fast.options import DeploymentOptions


def list_deployments() -> dict[str, Deployment]:
    """What `.deploy()` has made, by name; applications of `serve.run` are in `serve.status()`.

    Raises:
        RayServeException: Serve is not running.
    """
    warn_older("`serve.list_deployments()`", "`serve.status().applications`")
    return {name: _deployed(name, labels) for name, labels in client.ask("applications", deploy.ERA).items()}


def get_deployment(name: str) -> Deployment:
    """What `.deploy()` has made under this name: to redeploy it, delete it, or get a handle.

    Raises:
        KeyError: there is none.
        RayServeException: Serve is not running.
    """
    warn_older("`serve.get_deployment()`", "`serve.get_app_handle()`")
    return _deployed(name, deploy.known(name))


def _deployed(name: str, labels: dict[str, Any]) -> Deployed:
    return Deployed(name, name, *deploy.options_of(labels))


class Deployed(Deployment):
    """A deployment whose code is in the cluster, under the name `origin`."""

    def __init__(self, name: str, origin: str, options: DeploymentOptions, older: OlderOptions) -> None:
        # Not the parent's constructor, which looks at the code.
        self._name = name
        self._origin = origin
        self._options = options
        self._older = older
        self._opened: Definition | None = None

    @property
    def _definition(self) -> Definition:
        if self._opened is None:
            self._opened = cloudpickle.loads(self._specification().deployments[-1].definition)
        return self._opened

    @property
    def _func_or_class(self) -> Callable[..., Any]:  # type: ignore[override]
        return self._definition.func_or_class

    @property
    def _init_args(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self._definition.init_args

    @property
    def _init_kwargs(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self._definition.init_kwargs)

    def _copy(self, **changes: Any) -> Deployment:
        if changes.keys() & {"func_or_class", "init_args", "init_kwargs"}:
            own = {"func_or_class": self._func_or_class, "init_args": self._init_args, "init_kwargs": self._init_kwargs}
            return super()._copy(**{**own, **changes})
        kept = {"name": self._name, "options": self._options, "older": self._older}
        return Deployed(origin=self._origin, **{**kept, **changes})

    def _built(self, runtime_env: dict[str, Any]) -> ApplicationSpec:
        """The code as it was first deployed, in the environment of the driver that did."""
        spec = self._specification()
        fresh = secrets.token_hex(4)
        if self._name != self._origin:
            if len(spec.deployments) > 1:  # their handles to each other name the application
                return self._copy(func_or_class=self._func_or_class)._built(runtime_env)
            renamed = replace(spec.deployments[0], app=self._name, name=self._name)
            spec = replace(spec, name=self._name, ingress=self._name, deployments=(renamed,))
        spec = replace(spec, deployments=tuple(replace(d, code_version=fresh) for d in spec.deployments))
        return deploy.reconfigured(spec, self)

    def _specification(self) -> ApplicationSpec:
        deploy.known(self._origin)
        spec: ApplicationSpec = client.ask("specification", self._origin)
        return spec

    def __repr__(self) -> str:
        return f"Deployment(name={self._name},version={self.version},route_prefix={self.route_prefix})"
