"""Backends: what answers the requests of endpoints, as functions of `rayserve_fast` and methods of the Client API.

A backend is an application of one deployment, both named by its tag, that no route leads to; which endpoints do is the
splits' business. Its configuration as the user gave it stands in the application's labels.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import ray

from rayserve_fast import context
from rayserve_fast.classic import session
from rayserve_fast.classic.backend import AsyncBackend, SyncBackend, accepts_batch
from rayserve_fast.classic.config import BackendConfig, CondaEnv, given_config
from rayserve_fast.classic.spelling import warn_older
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.seen import OvertakenError
from rayserve_fast.controlplane.spec import ApplicationSpec
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica.calls import handler_of, is_async
from rayserve_fast.text import check_text

F = TypeVar("F", bound=Callable[..., Any])

#: What the application records of backends are marked with.
ERA = "backend"


def create_backend(
    backend_tag: str,
    func_or_class: Callable[..., Any],
    *actor_init_args: Any,
    ray_actor_options: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | BackendConfig | None = None,
    env: CondaEnv | None = None,
    backend_config: Mapping[str, Any] | BackendConfig | None = None,
) -> None:
    """Start the replicas of a backend, and wait until they serve.

    Today: `serve.run(serve.deployment(func_or_class).bind(*args), name=tag, route_prefix=None)`.

    Args:
        backend_tag: its name, unique among applications. The oldest order, function first and tag second, works too.
        func_or_class: what answers. It is called with the request, if it has a parameter for it.
        actor_init_args: what a class is constructed with.
        ray_actor_options: what each replica needs, as in `serve.deployment`.
        config: a dict with the keys of `BackendConfig`, or one; see there.
        env: the conda environment of the replicas.
        backend_config: the older name of `config`.

    Raises:
        ValueError: the tag is registered, or an option is wrong.
        TypeError: `func_or_class` is neither, or `config` is no dict.
        RayServeException: Serve is not running, or the tag is the name of an application.
        RuntimeError: the replicas cannot start, with the traceback of the user's code. The tag is free again then.
    """
    warn_older("`serve.create_backend`", "`serve.run`")
    if not isinstance(backend_tag, str) and isinstance(func_or_class, str):
        backend_tag, func_or_class = func_or_class, backend_tag
    given = given_config(config if config is not None else backend_config)
    create(backend_tag, func_or_class, actor_init_args, ray_actor_options, given, env, session.requests())


def create(
    tag: str,
    func_or_class: Callable[..., Any],
    init_args: tuple[Any, ...],
    ray_actor_options: Mapping[str, Any] | None,
    given: dict[str, Any],
    env: CondaEnv | None,
    requests: str,
) -> None:
    """`create_backend`, once it is known which `session` requests its handlers get."""
    check_text("backend_tag", tag)
    if not (inspect.isfunction(func_or_class) or inspect.isclass(func_or_class)):
        raise TypeError(f"Backend must be a function or class, it is {type(func_or_class)}.")
    began, controller = time.monotonic(), session.require()
    registered = f"Cannot create backend. Backend '{tag}' is already registered."
    if tag in labels_by_tag():
        raise ValueError(registered)  # before anything is pickled for nothing
    spec = _spec(tag, func_or_class, init_args, _actor_options(ray_actor_options, env), given, requests)
    try:
        client.deploy(controller, [spec], True, began, {tag: None})
    except OvertakenError:
        raise ValueError(registered) from None
    except RuntimeError:
        session.ask("delete", [tag])
        raise


def list_backends() -> dict[str, dict[str, Any]]:
    """Every backend: `accepts_batches`, `num_replicas` and `max_batch_size`.

    Today: `serve.status()`.
    """
    warn_older("`serve.list_backends`", "`serve.status`")
    found = {}
    for tag, labels in labels_by_tag().items():
        config = BackendConfig(**labels["config"])
        found[tag] = {
            "accepts_batches": labels["accepts_batches"],
            "num_replicas": config.num_replicas,
            "max_batch_size": config.max_batch_size,
        }
    return found


def labels_by_tag() -> dict[str, dict[str, Any]]:
    """What the records of all backends say: `config` and `accepts_batches`."""
    found: dict[str, dict[str, Any]] = session.ask("applications", ERA)
    return found


def delete_backend(backend_tag: str, force: bool = False) -> None:
    """Stop a backend; requests that it works on finish. Its tag is free again when this returns.

    Today: `serve.delete`.

    Args:
        backend_tag: of the backend.
        force: end its replicas at once.

    Raises:
        ValueError: there is no such backend, or an endpoint uses it.
    """
    warn_older("`serve.delete_backend`", "`serve.delete`")
    _existing(backend_tag)
    session.ask("delete", [backend_tag], True, force)  # which refuses one that is in use


def update_backend_config(backend_tag: str, config_options: Mapping[str, Any] | BackendConfig) -> None:
    """Change the configuration of a backend; what is not given stays. Running replicas are kept.

    Today: `serve.run` with `serve.deployment(...).options(...)`.

    Args:
        backend_tag: of the backend.
        config_options: a dict with keys of `BackendConfig`, or one.

    Raises:
        ValueError: there is no such backend, or an option is wrong.
        TypeError: `config_options` is no dict.
    """
    warn_older("`serve.update_backend_config`", "`serve.run`")
    began, given = time.monotonic(), given_config(config_options)
    while True:
        old = _existing(backend_tag)
        labels = {**old.labels, "config": {**old.labels["config"], **given}}
        (deployment,) = old.deployments
        options = _options(labels["config"], deployment.config.ray_actor_options, labels["accepts_batches"]).plain()
        # The runtime environment stays what the creating process gave it.
        config = replace(options, ray_actor_options=deployment.config.ray_actor_options)
        new = replace(old, labels=labels, deployments=(replace(deployment, config=config),))
        try:
            client.deploy(session.require(), [new], True, began, {backend_tag: old.labels})
        except OvertakenError:
            continue  # with what the other driver has made of it
        return


def get_backend_config(backend_tag: str) -> BackendConfig:
    """The configuration of a backend.

    Raises:
        ValueError: there is no such backend.
    """
    warn_older("`serve.get_backend_config`", "`serve.status`")
    return BackendConfig(**_existing(backend_tag).labels["config"])


def get_current_backend_tag() -> str:
    """The tag of the backend that the calling code runs in. Today: `serve.get_replica_context().app_name`.

    Raises:
        RayServeException: outside a backend.
    """
    return _replica("serve.get_current_backend_tag()").deployment


def get_current_replica_tag() -> str:
    """The id of the replica that the calling code runs in. Today: `serve.get_replica_context().replica_tag`.

    Raises:
        RayServeException: outside a backend.
    """
    return _replica("serve.get_current_replica_tag()").replica_tag


def accept_batch(function: F) -> F:
    """Mark a function, or a class's method, as one that takes a list of requests and returns a list of results.

    The backend's `max_batch_size` says how many at most; `serve.context.batch_size` how many there are. A replica works
    on one batch at a time. Today: `max_batch_size` of `serve.deployment`, or `@serve.batch`.

    >>> @accept_batch
    ... def lengths(requests):
    ...     return [len(request.data) for request in requests]
    """
    function._serve_accept_batch = True  # type: ignore[attr-defined]
    return function


def _spec(
    tag: str,
    func_or_class: Callable[..., Any],
    init_args: tuple[Any, ...],
    actor_options: dict[str, Any],
    given: dict[str, Any],
    requests: str,
) -> ApplicationSpec:
    from rayserve_fast.application import build
    from rayserve_fast.deployment import Application, Deployment

    batches = accepts_batch(func_or_class)
    handler = handler_of(func_or_class)
    kind = AsyncBackend if handler is not None and is_async(handler) else SyncBackend
    options = _options(given, actor_options, batches)
    deployment = Deployment(tag, options, kind, (func_or_class, init_args, requests), _internal=True)
    runtime_env = dict(ray.get_runtime_context().runtime_env)
    spec = build(Application(deployment), tag, None, runtime_env)
    return replace(spec, era=ERA, labels={"config": given, "accepts_batches": batches})


def _options(given: dict[str, Any], actor_options: Mapping[str, Any], batches: bool) -> Any:
    """The options of a backend's deployment, checked."""
    from rayserve_fast.options import DeploymentOptions

    config = BackendConfig(**given)
    if config.max_batch_size is not None and not batches:
        raise ValueError(
            "max_batch_size is set, but the function or class does not accept batches. Mark the function, or the"
            " class's __call__, with @serve.accept_batch."
        )
    batching: dict[str, Any] = {}
    if batches:
        batching = {
            "max_batch_size": config.max_batch_size or 1,
            "batch_wait_timeout_s": config.batch_wait_timeout,
            "max_concurrent_batches": 1,
        }
    return DeploymentOptions(
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_concurrent_queries,
        user_config=config.user_config,
        graceful_shutdown_timeout_s=config.experimental_graceful_shutdown_timeout_s,
        ray_actor_options=dict(actor_options),
        **batching,
    ).check()


def _actor_options(given: Mapping[str, Any] | None, env: CondaEnv | None) -> dict[str, Any]:
    options = dict(given or {})
    if env is not None:
        options["runtime_env"] = {**options.get("runtime_env", {}), "conda": env.name}
    return options


def _existing(tag: str) -> ApplicationSpec:
    spec: ApplicationSpec | None = None
    if tag in labels_by_tag():  # not one that is being deleted
        spec = session.ask("specification", tag)
    if spec is None:
        raise ValueError(f"Backend {tag} is not registered.")
    return spec


def _replica(what: str) -> context.ReplicaContext:
    if (replica := context._current_replica()) is None:
        raise RayServeException(f"`{what}` may only be called from within a Ray Serve backend.")
    return replica
