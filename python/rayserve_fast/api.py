"""The functions of `ray.serve`: run, start, status, delete, shutdown and the handles by name.

They validate, build and ask the controller; what happens in the cluster is `controlplane`'s. Differences from Ray
Serve are named in each docstring; where none is, there is none that we know of.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from rayserve_fast import inactive
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.options import ClusterOptions
from rayserve_fast.controlplane.spec import BOUNDLESS, DEFAULT_ROUTE, DeploymentID
from rayserve_fast.controlplane.status import ServeStatus
from rayserve_fast.exceptions import RayServeException

if TYPE_CHECKING:
    from rayserve_fast.application import RunTarget
    from rayserve_fast.classic.client import Client
    from rayserve_fast.config import ControllerOptions, HTTPOptions, ProxyLocation
    from rayserve_fast.deployment import Application
    from rayserve_fast.handle import DeploymentHandle
    from rayserve_fast.local import Applications

logger = logging.getLogger("ray.serve")


def run(
    target: Application,
    blocking: bool = False,
    name: str = "default",
    route_prefix: str | None = DEFAULT_ROUTE,
    logging_config: Any = None,
    _local_testing_mode: bool = False,
    external_scaler_enabled: bool = False,
    controller_options: Mapping[str, Any] | ControllerOptions | None = None,
) -> DeploymentHandle:
    """Deploy an application and wait until it serves; the same name again is a redeploy, others are not touched.

    Starts Ray and Serve if they do not run.

    Args:
        target: what `Deployment.bind()` returned.
        blocking: stay until Ctrl-C, which raises KeyboardInterrupt here.
        name: of the application, unique in the cluster.
        route_prefix: where HTTP requests reach it; None: only handles do. If it is not given, an older deployment's
            own counts, see docs/classic.md.
        logging_config: accepted, has no effect yet.
        external_scaler_enabled: accepted, has no effect yet.
        controller_options: `runtime_env.env_vars` of the controller, when this call starts it.
        _local_testing_mode: run it in this process, without Ray and HTTP; see docs/composition.md. The environment
            variable RAY_SERVE_FORCE_LOCAL_TESTING_MODE=1 does the same for every call.

    Returns:
        A handle to the ingress deployment; for a `DAGDriver` a `RayServeSyncHandle`.

    Raises:
        TypeError: `target` is no Application.
        RayServeException: empty name, or the prefix belongs to another application.
        RuntimeError: the deployment failed, with the traceback of the user's code, or the HTTP port is taken.
    """
    handle = _run(
        target,
        name=name,
        route_prefix=route_prefix,
        logging_config=logging_config,
        _local_testing_mode=_local_testing_mode,
        external_scaler_enabled=external_scaler_enabled,
        controller_options=controller_options,
    )
    if blocking:
        _wait_for_interrupt()
    return handle


def _run(
    target: Application,
    *,
    _blocking: bool = True,
    name: str = "default",
    route_prefix: str | None = DEFAULT_ROUTE,
    logging_config: Any = None,
    _local_testing_mode: bool = False,
    external_scaler_enabled: bool = False,
    controller_options: Mapping[str, Any] | ControllerOptions | None = None,
) -> DeploymentHandle:
    """`run` that may return before the application serves: with `_blocking=False`."""
    from rayserve_fast.application import RunTarget

    targets = [RunTarget(target, name, route_prefix, logging_config, external_scaler_enabled)]
    return _run_many(targets, True, _blocking, _local_testing_mode, controller_options)[0]


def run_many(
    targets: Sequence[RunTarget],
    blocking: bool = False,
    wait_for_ingress_deployment_creation: bool = True,
    wait_for_applications_running: bool = True,
    _local_testing_mode: bool = False,
    controller_options: Mapping[str, Any] | ControllerOptions | None = None,
) -> list[DeploymentHandle]:
    """Deploy several applications at once; see `run`.

    Args:
        targets: the applications.
        blocking: stay until Ctrl-C.
        wait_for_ingress_deployment_creation: accepted; deployments always exist when this returns.
        wait_for_applications_running: return only when all of them serve.
        controller_options: see `run`.

    Returns:
        A handle to each ingress, in the order of `targets`.
    """
    handles = _run_many(
        targets,
        wait_for_ingress_deployment_creation,
        wait_for_applications_running,
        _local_testing_mode,
        controller_options,
    )
    if blocking:
        _wait_for_interrupt()
    return handles


def _run_many(
    targets: Sequence[RunTarget],
    wait_for_ingress_deployment_creation: bool = True,
    wait_for_applications_running: bool = True,
    _local_testing_mode: bool = False,
    controller_options: Mapping[str, Any] | ControllerOptions | None = None,
) -> list[DeploymentHandle]:
    from rayserve_fast.application import build_target, check_target
    from rayserve_fast.config import forces_local_testing
    from rayserve_fast.handle import DeploymentHandle

    began = time.monotonic()
    if not targets:
        raise ValueError("No applications provided.")
    for target in targets:
        check_target(target)  # before Ray is started for nothing
    if _local_testing_mode or forces_local_testing():
        from rayserve_fast.local import applications

        return [applications.run(target) for target in targets]
    env_vars = _env_vars(controller_options)
    client.connect_ray()
    runtime_env = dict(ray.get_runtime_context().runtime_env)
    specs = [build_target(t, runtime_env) for t in targets]
    controller = client.find() or client.start(_cluster_options(None, None), env_vars)
    client.deploy(controller, specs, wait_for_applications_running, began)
    handles = [DeploymentHandle(spec.ingress, spec.name) for spec in specs]
    return [_ingress_handle(target.target, handle) for target, handle in zip(targets, handles, strict=True)]


def _ingress_handle(app: Application, handle: DeploymentHandle) -> DeploymentHandle:
    """What `run` returns: for a graph's driver the handle that its users know."""
    from rayserve_fast.classic.driver import GraphDriver

    if not isinstance(app._bound_deployment, GraphDriver):
        return handle
    from rayserve_fast.classic.handles import older_handle

    return older_handle(handle, sync=True)  # type: ignore[return-value]


def start(
    proxy_location: str | ProxyLocation | None = None,
    http_options: Mapping[str, Any] | HTTPOptions | None = None,
    grpc_options: Any = None,
    logging_config: Any = None,
    tracing_config: Any = None,
    controller_options: Mapping[str, Any] | ControllerOptions | None = None,
    **kwargs: Any,
) -> Client:
    """Start Serve with options that hold until `shutdown`. If it runs already they are ignored, with a warning.

    Args:
        proxy_location: "EveryNode" (head node and nodes with replicas; the default), "HeadOnly" or "Disabled".
        http_options: see `HTTPOptions`.
        grpc_options: accepted, has no effect yet.
        logging_config: accepted, has no effect yet.
        tracing_config: accepted, has no effect yet.
        controller_options: `runtime_env.env_vars` of the controller.
        kwargs: `detached=False`: Serve ends with this process, if this call has started it. Else it goes on, as with
            `detached=True`. `dedicated_cpu` is accepted.

    Returns:
        A client with the functions of Ray Serve 1.0 to 1.2, where Ray Serve returns None today.

    Raises:
        TypeError, ValueError: an option is wrong; pydantic's ValidationError, which is a ValueError, names the field.
        RuntimeError: the HTTP port is taken; the text names it. Nothing is left running.
    """
    for key in ("http_host", "http_port", "http_middlewares"):
        if key in kwargs:
            instead = f'serve.start(http_options={{"{key}": {kwargs[key]}}})'
            raise ValueError(f"{key} is deprecated, please use {instead} instead.")
    tied = kwargs.pop("detached", None) is False
    kwargs.pop("dedicated_cpu", None)
    if kwargs:
        raise TypeError(f"serve.start() got unexpected keyword arguments {sorted(kwargs)}")
    from rayserve_fast import config, schema
    from rayserve_fast.classic.client import connected

    for option, value, model in (
        ("grpc_options", grpc_options, config.gRPCOptions),
        ("logging_config", logging_config, schema.LoggingConfig),
        ("tracing_config", tracing_config, schema.TracingConfig),
    ):
        if value is not None:
            model.model_validate(value)
            inactive.warn_start([option])
    options = _cluster_options(proxy_location, http_options)
    env_vars = _env_vars(controller_options)
    client.connect_ray()
    controller = client.find()
    if controller is None:
        client.ready(client.start(options, env_vars))
        return connected(tied)
    logger.info(
        'Connecting to existing Serve app in namespace "rayserve_fast".'
        " New http_options/controller_options will not be applied."
    )
    if http_options:
        running, _ = client.ready(controller)
        different = [k for k in vars(options) if getattr(options, k) != getattr(running, k)]
        if different:
            logger.warning(
                "The new client HTTP config differs from the existing one "
                f"in the following fields: {different}. The new HTTP config is ignored."
            )
    return connected()


def status() -> ServeStatus:
    """Proxies, applications and deployments with their states; empty if Serve is not running."""
    controller = client.find()
    return ServeStatus() if controller is None else ray.get(controller.status.remote())


def delete(name: str, _blocking: bool = True) -> None:
    """Delete an application: no new requests, requests in flight finish, its processes end.

    Raises:
        RayServeException: it is a target of a route's traffic (`serve.set_traffic`); the text names the route.
        TimeoutError: it was not gone after 60 s; it goes on leaving.
    """
    if (local := _local(name)) is not None:
        return local.delete(name)
    try:
        client.ask("delete", [name], _blocking, timeout_s=60)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(f"Some of these applications weren't deleted after 60s: {[name]}") from None
    return None


def shutdown() -> None:
    """Delete all applications, then end the proxies and the controller. Without Serve: nothing but a log line."""
    if (local := _local()) is not None and local.shutdown() and not ray.is_initialized():
        return  # a cluster that this process never joined is none of its business
    controller = client.find()
    if controller is None:
        logger.info("Nothing to shut down. There's no Serve application running on this Ray cluster.")
        return
    client.stop(controller)
    if (caller := sys.modules.get("rayserve_fast.caller")) is not None:
        caller.reset()  # the next cluster has another token and counts its snapshots from one
    if (bridge := sys.modules.get("rayserve_fast.classic.bridge")) is not None:
        bridge.end()


async def shutdown_async() -> None:
    """`shutdown`, without blocking the event loop."""
    await asyncio.to_thread(shutdown)


def get_app_handle(name: str) -> DeploymentHandle:
    """A handle to the ingress deployment of an application.

    Raises:
        RayServeException: Serve is not running, or there is no such application.
    """
    from rayserve_fast.handle import DeploymentHandle

    if (local := _local(name)) is not None:
        return local.ingress(name)
    ingress = client.ask("ingress", name)
    if ingress is None:
        raise RayServeException(f"Application '{name}' does not exist.")
    return DeploymentHandle(ingress, name)


def get_deployment_handle(
    deployment_name: str, app_name: str | None = None, _check_exists: bool = True
) -> DeploymentHandle:
    """A handle to any deployment of an application.

    Args:
        deployment_name: of the deployment.
        app_name: of its application; may be left out in a replica, and means its own there.

    Raises:
        RayServeException: Serve is not running, or no application was named outside a replica.
        KeyError: there is no such deployment. A replica's event loop is not held up to ask: a call raises there.
    """
    from rayserve_fast import context
    from rayserve_fast.handle import DeploymentHandle

    if app_name is None:
        if (replica := context._current_replica()) is None:
            raise RayServeException(
                "Please specify an application name when getting a deployment handle outside of a Serve application."
            )
        app_name = replica.app_name
    if (local := _local(app_name)) is not None:
        return local.deployment(DeploymentID(deployment_name, app_name), _check_exists)
    if context._on_replica_loop():
        return DeploymentHandle(deployment_name, app_name)
    controller = client.require()
    if _check_exists and not ray.get(controller.exists.remote(app_name, deployment_name)):
        raise KeyError(f"{DeploymentID(deployment_name, app_name)} does not exist.")
    return DeploymentHandle(deployment_name, app_name)


def _local(name: str | None = None) -> Applications | None:
    """This process's applications in local testing mode: if there is one called `name`, or any."""
    module = sys.modules.get("rayserve_fast.local")
    applications: Applications | None = None if module is None else module.applications
    return applications if applications is not None and (name is None or name in applications) else None


def _cluster_options(
    proxy_location: str | ProxyLocation | None, http_options: Mapping[str, Any] | HTTPOptions | None
) -> ClusterOptions:
    from rayserve_fast.config import HTTPOptions, ProxyLocation

    http = http_options
    if not isinstance(http, HTTPOptions):
        if not isinstance(http, Mapping | None):
            raise TypeError(f"http_options must be a dict, HTTPOptions, or None; got {type(http).__name__}.")
        http = HTTPOptions.model_validate(dict(http or {}))
    inactive.warn_start(f"http_options.{field}" for field in http.model_fields_set)
    location = http.location or ProxyLocation._normalize(proxy_location) or ProxyLocation.EveryNode
    if http.location is None and "location" in http.model_fields_set:
        location = ProxyLocation.Disabled  # said so, as Ray Serve 1.0 to 1.2 had it
    return ClusterOptions(
        host=http.host or "",
        port=http.port,
        root_path=http.root_path,
        request_timeout_s=None if http.request_timeout_s == math.inf else http.request_timeout_s,
        keep_alive_timeout_s=min(http.keep_alive_timeout_s, BOUNDLESS),
        max_head_bytes=min(http.max_head_bytes, BOUNDLESS),
        max_body_bytes=None if (http.max_body_bytes or 0) >= 2**63 else http.max_body_bytes,
        shards=http.shards,
        proxy_location=location.value if http.host else "Disabled",
    )


def _env_vars(controller_options: Mapping[str, Any] | ControllerOptions | None) -> Mapping[str, str] | None:
    from rayserve_fast.config import ControllerOptions

    if controller_options is None:
        return None
    if isinstance(controller_options, Mapping):
        controller_options = ControllerOptions.model_validate(dict(controller_options))
    if not isinstance(controller_options, ControllerOptions):
        raise TypeError(
            f"controller_options must be a dict, ControllerOptions, or None; got {type(controller_options).__name__}."
        )
    env_vars: Mapping[str, str] = (controller_options.runtime_env or {}).get("env_vars") or {}
    return env_vars


def _wait_for_interrupt() -> None:
    while True:
        time.sleep(10)
