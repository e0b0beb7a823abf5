"""From an `Application`, the graph that `bind` made, to the `ApplicationSpec` that travels to the controller.

Building a deployment writes its arguments, and whatever application turns up among them is built first: the graph is
walked by pickling it, so it may be nested in anything that pickles. The same Application met twice is one deployment.
"""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayserve_fast import definition, inactive
from rayserve_fast.controlplane.spec import (
    DEFAULT_APP_NAME,
    DEFAULT_ROUTE,
    ApplicationSpec,
    DefaultRoute,
    DeploymentConfig,
    DeploymentSpec,
    DriverEnv,
)
from rayserve_fast.deployment import Application, Deployment
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.ingress import asgi_app_of
from rayserve_fast.replica.calls import handler_of
from rayserve_fast.text import check_text

if TYPE_CHECKING:
    from rayserve_fast.handle import DeploymentHandle
    from rayserve_fast.schema import LoggingConfig

__all__ = ["RunTarget", "build", "build_target", "call_builder"]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class RunTarget:
    """One of the applications that `serve.run_many` deploys; the fields are the arguments of `serve.run`."""

    target: Application
    name: str = DEFAULT_APP_NAME
    route_prefix: str | None = DEFAULT_ROUTE
    logging_config: dict[str, Any] | LoggingConfig | None = None
    external_scaler_enabled: bool = False


def build_target(target: RunTarget, default_runtime_env: Mapping[str, Any] | None = None) -> ApplicationSpec:
    """Check and build what `serve.run` was given, and warn of its options that have no effect yet.

    Args:
        target: the arguments of `serve.run`.
        default_runtime_env: the driver's, for deployments that have none of their own.

    Raises:
        TypeError: the target is no Application, something bound cannot be pickled, or the name or prefix is no text.
        ValueError: the name, the route prefix or the logging configuration is wrong.
        RayServeException: the name is empty, or two deployments are FastAPI ingresses.
    """
    check_target(target)
    builder = Builder(target.name, dict(default_runtime_env or {}))
    spec = builder.build(target.target, route_of(target))
    inactive.warn_application(
        target.name, [name for name in inactive.APPLICATION_OPTIONS if getattr(target, name) not in (None, False)]
    )
    for deployment in spec.deployments:
        inactive.warn_deployment(deployment.name, deployment.config, builder.code[deployment.name])
    return spec


def check_target(target: RunTarget) -> None:
    """What can be said about the arguments of `serve.run` before anything is built; errors as for `build_target`."""
    if not isinstance(target.target, Application):
        raise TypeError("`serve.run` expects an `Application` returned by `Deployment.bind()`.")
    if not target.name:
        raise RayServeException("Application name must a non-empty string.")
    check_text("name", target.name)
    check_route_prefix(target.route_prefix)
    if target.logging_config is not None:
        from rayserve_fast.schema import LoggingConfig

        LoggingConfig.model_validate(target.logging_config)


def route_of(target: RunTarget) -> str | None:
    """Where HTTP requests reach it: as `serve.run` was told, else the ingress deployment, else at `/`."""
    if isinstance(target.route_prefix, DefaultRoute):
        given = target.target._bound_deployment._older.route
        return "/" if given is None else given[0]
    return target.route_prefix


def build(
    app: Application,
    name: str = DEFAULT_APP_NAME,
    route_prefix: str | None = "/",
    default_runtime_env: Mapping[str, Any] | None = None,
) -> ApplicationSpec:
    """Build `app` and every application bound into it; arguments and errors as for `build_target`."""
    check_target(RunTarget(app, name, route_prefix))
    return Builder(name, dict(default_runtime_env or {})).build(app, route_prefix)


class Builder:
    """The state of one walk: what is built, callees first, and under which name."""

    def __init__(self, app_name: str, runtime_env: dict[str, Any]) -> None:
        self.specs: list[DeploymentSpec] = []
        self.code: dict[str, Callable[..., Any]] = {}  # the function or class of each
        self._app_name = app_name
        self._driver = driver_env(runtime_env)
        # Every deploy is a new version: whether code that travels by reference has changed cannot be seen from here.
        self._code_version = secrets.token_hex(4)
        # By id(), with the Application itself, so that no other one gets its id meanwhile.
        self._handles: dict[int, tuple[Application, DeploymentHandle | None]] = {}

    def build(self, app: Application, route_prefix: str | None) -> ApplicationSpec:
        """Walk `app`; errors as for `build_target`."""
        ingress = self.handle(app).deployment_name
        if sum(spec.is_asgi for spec in self.specs) > 1:
            raise RayServeException(
                f'Found multiple FastAPI deployments in application "{self._app_name}". Only one deployment of an '
                "application may be made with @serve.ingress."
            )
        return ApplicationSpec(self._app_name, route_prefix, ingress, tuple(self.specs))

    def define(self, deployment: Deployment) -> bytes:
        """The definition, for which `handle` is asked for the applications in its arguments."""
        return definition.dumps(deployment, self.handle)

    def handle_to(self, name: str) -> DeploymentHandle:
        """A handle to a deployment of this application."""
        from rayserve_fast.handle import DeploymentHandle

        return DeploymentHandle(name, self._app_name)

    def handle(self, app: Application) -> DeploymentHandle:
        """The handle that replaces `app`, which is built if it is met for the first time."""
        if id(app) not in self._handles:
            self._handles[id(app)] = app, None
            self._handles[id(app)] = app, self._build(app)
        handle = self._handles[id(app)][1]
        if handle is None:
            raise ValueError(f"{app!r} is bound, through its own arguments, to itself.")
        return handle

    def _build(self, app: Application) -> DeploymentHandle:
        deployment = app._bound_deployment
        if deployment.version is not None:
            raise ValueError(
                "`version` in `@serve.deployment` has been removed. Serve manages deployment versions internally."
            )
        packed = self.define(deployment)  # names callees before their caller
        asgi = asgi_app_of(deployment.func_or_class)
        if deployment._options.max_batch_size is not None:
            _refuse_to_batch(deployment, asgi is not None)
        spec = DeploymentSpec(
            app=self._app_name,
            name=self._free_name(deployment.name),
            definition=packed,
            config=with_runtime_env(deployment._options.plain(), self._driver.runtime_env),
            driver=self._driver,
            is_asgi=asgi is not None,
            docs_path=None if asgi is None else asgi.docs_path,
            code_version=self._code_version,
        )
        self.specs.append(spec)
        self.code[spec.name] = deployment.func_or_class
        return self.handle_to(spec.name)

    def _free_name(self, wanted: str) -> str:
        taken = {spec.name for spec in self.specs}
        name, number = wanted, 0
        while name in taken:
            number += 1
            name = f"{wanted}_{number}"
        if number:
            logger.warning(
                "application '%s' has several deployments named '%s'; one is renamed to '%s'.",
                self._app_name,
                wanted,
                name,
            )
        return name


def with_runtime_env(config: DeploymentConfig, default: Mapping[str, Any]) -> DeploymentConfig:
    """With the driver's runtime environment where the deployment has none, or no `working_dir`."""
    options = config.ray_actor_options
    own = options.get("runtime_env")
    if not default or (own is not None and "working_dir" not in default):
        return config
    merged = default if own is None else {"working_dir": default["working_dir"], **own}
    return replace(config, ray_actor_options={**options, "runtime_env": merged})


def driver_env(runtime_env: Mapping[str, Any]) -> DriverEnv:
    """What a replica needs to import this process's code."""
    cwd = os.getcwd()
    return DriverEnv(tuple(os.path.abspath(path) for path in sys.path), cwd, dict(runtime_env))


def check_route_prefix(prefix: str | None) -> None:
    """Refuse what is no route prefix.

    >>> check_route_prefix("/a/")
    Traceback (most recent call last):
    ...
    ValueError: Invalid route_prefix '/a/', may not end with a trailing '/'.
    """
    if prefix is None:
        return
    check_text("route_prefix", prefix)
    if not prefix.startswith("/"):
        raise ValueError(f"Invalid route_prefix '{prefix}', must start with a forward slash ('/').")
    if prefix != "/" and prefix.endswith("/"):
        raise ValueError(f"Invalid route_prefix '{prefix}', may not end with a trailing '/'.")
    if "{" in prefix or "}" in prefix:
        raise ValueError(f"Invalid route_prefix '{prefix}', may not contain wildcards.")


def call_builder(builder: Application | Callable[[Any], Application], args: Mapping[str, Any]) -> Application:
    """The application that an import path names: itself, or what its builder function makes of `args`.

    Args:
        builder: an Application, or a function of one parameter: a dict, or a pydantic model if annotated as one.
        args: what the user gave; text if it came from a command line.

    Raises:
        TypeError: it is neither, or the function takes another number of parameters or returns something else.
        ValueError: arguments for an Application; pydantic's ValidationError, which is one, for wrong arguments.
    """
    from pydantic import BaseModel

    if isinstance(builder, Application):
        if args:
            raise ValueError("Arguments can only be passed to an application builder function, not an application.")
        return builder
    if not inspect.isfunction(builder):
        raise TypeError(f"Expected an Application or an application builder function but got: {type(builder)}.")
    parameters = list(_signature(builder).parameters.values())
    if len(parameters) != 1:
        raise TypeError("Application builder functions should take exactly one parameter, a dictionary of arguments.")
    model = parameters[0].annotation
    if inspect.isclass(model) and issubclass(model, BaseModel):
        app = builder(model.model_validate(dict(args)))
    else:
        app = builder(dict(args))
    if not isinstance(app, Application):
        raise TypeError(
            "Application builder functions must return an `Application` returned by `Deployment.bind()`, "
            f"but got: {type(app)}."
        )
    return app


def _refuse_to_batch(deployment: Deployment, is_asgi: bool) -> None:
    """Refuse `max_batch_size` for what cannot take lists and return one."""
    handler = handler_of(deployment.func_or_class)
    if is_asgi:
        what = "it is a FastAPI or ASGI ingress, which answers each request by itself"
    elif inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        what = "its handler is a generator, whose items belong to one request"
    else:
        return
    raise RayServeException(
        f"The deployment {deployment.name} cannot set max_batch_size: {what}. Leave the option out, or give it to a "
        "deployment that takes lists and returns a list, and call that one by its handle."
    )


def _signature(builder: Callable[..., Any]) -> inspect.Signature:
    """With annotations as objects, also where `from __future__ import annotations` made them text."""
    try:
        return inspect.signature(builder, eval_str=True)
    except NameError:  # an annotation that is there for type checkers only
        return inspect.signature(builder)
