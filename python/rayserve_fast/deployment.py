"""`@serve.deployment`, and what it makes: a `Deployment`, which binds to arguments as an `Application`.

Nothing here talks to Ray: a deployment is a definition and its checked options. `application.build` turns a bound one
into what travels to the cluster.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from rayserve_fast.autoscaling import AutoscalingConfig
from rayserve_fast.classic.deployable import Deployable
from rayserve_fast.classic.graph import CallNode, Method, holds_node, method_of
from rayserve_fast.classic.spelling import OlderOptions, rename
from rayserve_fast.options import DeploymentOptions
from rayserve_fast.text import check_text

if TYPE_CHECKING:
    from rayserve_fast.config import (
        BackpressureConfig,
        DeploymentActorConfig,
        GangSchedulingConfig,
        RequestRouterConfig,
    )
    from rayserve_fast.schema import LoggingConfig

__all__ = ["Application", "Deployment", "deployment"]


class DEFAULT(Enum):
    """Stands for an option that was not given, where None is a value."""

    VALUE = 1


T = TypeVar("T")
Default: TypeAlias = "DEFAULT | T"


class Application:
    """A deployment bound to its arguments, and through them to other applications.

    Give it to `serve.run`, or to another deployment's `bind`, where it arrives as a `DeploymentHandle`.
    """

    def __init__(self, bound_deployment: Deployment) -> None:
        self._bound_deployment = bound_deployment

    def __getattr__(self, name: str) -> Method:
        """A method of the class, to be bound as a node of a graph: `model.predict.bind(node)`."""
        if name == "_bound_deployment":  # asked for by copying, before there is one
            raise AttributeError(name)
        return method_of(self, name)

    def __repr__(self) -> str:
        return f"Application({self._bound_deployment.name})"


class Deployment(Deployable):
    """A class or function with options, made by `@serve.deployment`.

    >>> @deployment(num_replicas=2)
    ... class Doubler:
    ...     def __call__(self, n: int) -> int:
    ...         return 2 * n
    >>> Doubler, Doubler.num_replicas
    (Deployment(name=Doubler), 2)
    >>> Doubler.options(name="Twice", num_replicas=1).bind()
    Application(Twice)
    """

    #: A function as what all nodes of graphs call that are bound of it.
    _called: Application | None = None

    def __init__(
        self,
        name: str,
        options: DeploymentOptions,
        func_or_class: Callable[..., Any],
        init_args: tuple[Any, ...] = (),
        init_kwargs: dict[str, Any] | None = None,
        older: OlderOptions = OlderOptions(),  # noqa: B008  # frozen
        _internal: bool = False,
    ) -> None:
        if not _internal:
            raise RuntimeError(
                "The Deployment constructor should not be called directly. Use `@serve.deployment` instead."
            )
        if not isinstance(name, str):
            raise TypeError("name must be a string.")
        check_text("name", name)
        if "#" in name:  # it separates application, deployment and replica in the names of actors
            raise ValueError(f"Deployment names must not contain the '#' character. Current name: {name}.")
        if not (inspect.isfunction(func_or_class) or inspect.isclass(func_or_class)):
            raise TypeError("@serve.deployment must be called on a class or function.")
        for kind, given in (("init_args", init_args), ("init_kwargs", init_kwargs)):
            if given and inspect.isfunction(func_or_class):
                raise ValueError(f"{kind} not supported for function deployments.")
        self._name = name
        self._options = options
        self._func_or_class = func_or_class
        self._init_args = tuple(init_args or ())
        self._init_kwargs = init_kwargs or {}
        self._older = older

    @property
    def name(self) -> str:
        """Unique within the application."""
        return self._name

    @property
    def version(self) -> str | None:
        """What `.deploy()` compares with what is there; None for deployments of `serve.run`."""
        return self._older.version

    @property
    def func_or_class(self) -> Callable[..., Any]:
        """What the replicas run."""
        return self._func_or_class

    @property
    def num_replicas(self) -> int | None:
        """How many replicas there should be, if no autoscaling decides."""
        return self._options.num_replicas

    @property
    def user_config(self) -> Any:
        """What the replicas' `reconfigure` is called with."""
        return self._options.user_config

    @property
    def max_ongoing_requests(self) -> int:
        """Requests that one replica works on at once."""
        return self._options.max_ongoing_requests

    @property
    def max_queued_requests(self) -> int:
        """Requests that may wait at one caller; -1: any number."""
        return self._options.max_queued_requests

    @property
    def backpressure_config(self) -> BackpressureConfig:
        """What a request is answered that finds the queue full."""
        return self._options.backpressure_config

    @property
    def ray_actor_options(self) -> dict[str, Any]:
        """What each replica needs: resources, runtime environment, labels."""
        return self._options.actor_options()

    @property
    def init_args(self) -> tuple[Any, ...]:
        """Positional arguments of the constructor, as bound."""
        return self._init_args

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the constructor, as bound."""
        return self._init_kwargs

    @property
    def logging_config(self) -> dict[str, Any] | None:
        """The fields of the `LoggingConfig`, or None."""
        config = self._options.logging_config
        return None if config is None else config.model_dump()

    def set_logging_config(self, logging_config: dict[str, Any]) -> None:
        """Change the logging options in place."""
        self._options = self._options.changed({"logging_config": logging_config})

    def __call__(self) -> None:
        raise RuntimeError(
            "Deployments cannot be constructed directly. Use `.bind()` and give the result to `serve.run`."
        )

    def bind(self, *args: Any, **kwargs: Any) -> Application:
        """Bind constructor arguments; functions take none, except as nodes of a graph: see docs/classic.md.

        Args:
            *args, **kwargs: anything that pickles; Applications in it, at any depth, arrive as DeploymentHandles.

        Raises:
            ValueError: arguments for a function, and no node of a graph among them.
        """
        if inspect.isfunction(self._func_or_class) and holds_node((args, kwargs)):
            if self._called is None:
                self._called = Application(self._copy())
            return CallNode(self._called, "__call__", args, kwargs)  # type: ignore[return-value]
        return Application(self._copy(init_args=args, init_kwargs=kwargs))

    def options(
        self,
        func_or_class: Callable[..., Any] | None = None,
        name: Default[str] = DEFAULT.VALUE,
        version: Default[str] = DEFAULT.VALUE,
        num_replicas: Default[int | str | None] = DEFAULT.VALUE,
        ray_actor_options: Default[dict[str, Any] | None] = DEFAULT.VALUE,
        placement_group_bundles: Default[list[dict[str, float]]] = DEFAULT.VALUE,
        placement_group_strategy: Default[str] = DEFAULT.VALUE,
        placement_group_bundle_label_selector: Default[list[dict[str, str]]] = DEFAULT.VALUE,
        max_replicas_per_node: Default[int] = DEFAULT.VALUE,
        user_config: Default[Any] = DEFAULT.VALUE,
        max_ongoing_requests: Default[int] = DEFAULT.VALUE,
        max_queued_requests: Default[int] = DEFAULT.VALUE,
        backpressure_config: Default[dict[str, Any] | BackpressureConfig | None] = DEFAULT.VALUE,
        autoscaling_config: Default[dict[str, Any] | AutoscalingConfig | None] = DEFAULT.VALUE,
        graceful_shutdown_wait_loop_s: Default[float] = DEFAULT.VALUE,
        graceful_shutdown_timeout_s: Default[float] = DEFAULT.VALUE,
        health_check_period_s: Default[float] = DEFAULT.VALUE,
        health_check_timeout_s: Default[float] = DEFAULT.VALUE,
        logging_config: Default[dict[str, Any] | LoggingConfig | None] = DEFAULT.VALUE,
        request_router_config: Default[dict[str, Any] | RequestRouterConfig | None] = DEFAULT.VALUE,
        _init_args: Default[tuple[Any, ...]] = DEFAULT.VALUE,
        _init_kwargs: Default[dict[Any, Any]] = DEFAULT.VALUE,
        _internal: bool = False,
        max_constructor_retry_count: Default[int] = DEFAULT.VALUE,
        gang_scheduling_config: Default[dict[str, Any] | GangSchedulingConfig | None] = DEFAULT.VALUE,
        deployment_actors: Default[list[dict[str, Any] | DeploymentActorConfig] | None] = DEFAULT.VALUE,
        max_surge_percent: Default[int] = DEFAULT.VALUE,
        retry_idempotent: Default[bool] = DEFAULT.VALUE,
        max_batch_size: Default[int | None] = DEFAULT.VALUE,
        batch_wait_timeout_s: Default[float] = DEFAULT.VALUE,
        max_concurrent_batches: Default[int] = DEFAULT.VALUE,
        route_prefix: Default[str | None] = DEFAULT.VALUE,
        prev_version: Default[str | None] = DEFAULT.VALUE,
        init_args: Default[tuple[Any, ...] | None] = DEFAULT.VALUE,
        init_kwargs: Default[dict[str, Any] | None] = DEFAULT.VALUE,
        max_concurrent_queries: Default[int | None] = DEFAULT.VALUE,
        _autoscaling_config: Default[dict[str, Any] | AutoscalingConfig | None] = DEFAULT.VALUE,
    ) -> Deployment:
        """A copy with other options; those not given stay as they are. See `serve.deployment` for what they mean.

        Raises:
            TypeError, ValueError: an option is wrong, as for the decorator.
        """
        given = {k: v for k, v in locals().items() if k not in _NOT_OPTIONS and v is not DEFAULT.VALUE}
        parts = {
            "name": name,
            "func_or_class": func_or_class or DEFAULT.VALUE,
            "init_args": init_args if _init_args is DEFAULT.VALUE else _init_args,
            "init_kwargs": init_kwargs if _init_kwargs is DEFAULT.VALUE else _init_kwargs,
        }
        older = self._older.with_given(given)
        rename(given)
        changes = {part: value for part, value in parts.items() if value is not DEFAULT.VALUE}
        return self._copy(options=self._options.changed(given), older=older, **changes)

    def _copy(self, **changes: Any) -> Deployment:
        """A copy with other parts, which are named as the constructor's parameters."""
        parts = {
            "name": self._name,
            "options": self._options,
            "func_or_class": self._func_or_class,
            "init_args": self._init_args,
            "init_kwargs": self._init_kwargs,
            "older": self._older,
        }
        return Deployment(**{**parts, **changes}, _internal=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Deployment) and self._identity() == other._identity()

    __hash__ = None  # type: ignore[assignment]  # its options are mutable, as in Ray Serve

    def _identity(self) -> tuple[Any, ...]:
        return self._name, self._options, self._init_args, self._init_kwargs, self._older

    def __repr__(self) -> str:
        return f"Deployment(name={self._name})"


if TYPE_CHECKING:

    class _Decorated(Deployment):
        """What type checkers see: bare, the decorator gives a Deployment; with options, what makes one of a class."""

        def __call__(self, func_or_class: Callable[..., Any], /) -> Deployment: ...  # type: ignore[override]


def deployment(
    _func_or_class: Callable[..., Any] | None = None,
    name: Default[str] = DEFAULT.VALUE,
    version: Default[str] = DEFAULT.VALUE,
    num_replicas: Default[int | str | None] = DEFAULT.VALUE,
    ray_actor_options: Default[dict[str, Any]] = DEFAULT.VALUE,
    placement_group_bundles: Default[list[dict[str, float]]] = DEFAULT.VALUE,
    placement_group_strategy: Default[str] = DEFAULT.VALUE,
    placement_group_bundle_label_selector: Default[list[dict[str, str]]] = DEFAULT.VALUE,
    max_replicas_per_node: Default[int] = DEFAULT.VALUE,
    user_config: Default[Any] = DEFAULT.VALUE,
    max_ongoing_requests: Default[int] = DEFAULT.VALUE,
    max_queued_requests: Default[int] = DEFAULT.VALUE,
    backpressure_config: Default[dict[str, Any] | BackpressureConfig | None] = DEFAULT.VALUE,
    autoscaling_config: Default[dict[str, Any] | AutoscalingConfig | None] = DEFAULT.VALUE,
    graceful_shutdown_wait_loop_s: Default[float] = DEFAULT.VALUE,
    graceful_shutdown_timeout_s: Default[float] = DEFAULT.VALUE,
    health_check_period_s: Default[float] = DEFAULT.VALUE,
    health_check_timeout_s: Default[float] = DEFAULT.VALUE,
    logging_config: Default[dict[str, Any] | LoggingConfig | None] = DEFAULT.VALUE,
    request_router_config: Default[dict[str, Any] | RequestRouterConfig | None] = DEFAULT.VALUE,
    max_constructor_retry_count: Default[int] = DEFAULT.VALUE,
    gang_scheduling_config: Default[dict[str, Any] | GangSchedulingConfig | None] = DEFAULT.VALUE,
    deployment_actors: Default[list[dict[str, Any] | DeploymentActorConfig] | None] = DEFAULT.VALUE,
    rolling_update_percentage: Default[float] = DEFAULT.VALUE,
    max_surge_percent: Default[int] = DEFAULT.VALUE,
    retry_idempotent: Default[bool] = DEFAULT.VALUE,
    max_batch_size: Default[int | None] = DEFAULT.VALUE,
    batch_wait_timeout_s: Default[float] = DEFAULT.VALUE,
    max_concurrent_batches: Default[int] = DEFAULT.VALUE,
    route_prefix: Default[str | None] = DEFAULT.VALUE,
    prev_version: Default[str | None] = DEFAULT.VALUE,
    init_args: Default[tuple[Any, ...] | None] = DEFAULT.VALUE,
    init_kwargs: Default[dict[str, Any] | None] = DEFAULT.VALUE,
    max_concurrent_queries: Default[int | None] = DEFAULT.VALUE,
    _autoscaling_config: Default[dict[str, Any] | AutoscalingConfig | None] = DEFAULT.VALUE,
) -> _Decorated:
    """Make a class or function a `Deployment`; bare or with options.

    An option whose effect comes with a later version is checked, and named in a warning when it is deployed.

    Args:
        _func_or_class: what the replicas run, when the decorator is used bare.
        name: unique within the application; default: the name of the class or function.
        version: for `.deploy()`, see docs/classic.md; `serve.run` refuses it.
        num_replicas: how many replicas, at least 1; "auto": as `autoscaling_config`, of 1 to 100 replicas by default.
        ray_actor_options: what each replica needs: num_cpus (default 1), num_gpus, memory (bytes), resources,
            accelerator_type, runtime_env, label_selector, fallback_strategy.
        placement_group_bundles: resources of a placement group per replica; the replica runs in the first bundle.
        placement_group_strategy: how Ray places those bundles.
        placement_group_bundle_label_selector: labels of the nodes for those bundles, one for all or one for each.
        max_replicas_per_node: 1 to 100; not together with bundles or gangs.
        user_config: JSON values for the class's `reconfigure(user_config)`, called after the constructor.
        max_ongoing_requests: requests that a replica works on at once; default 5.
        max_queued_requests: requests that may wait at one proxy shard or one process's handles; default -1: any number.
        backpressure_config: what a request beyond that is answered; default 503.
        autoscaling_config: bounds and pace of autoscaling; not together with a number of replicas.
        graceful_shutdown_wait_loop_s: seconds between looks at the requests of a draining replica; default 2.
        graceful_shutdown_timeout_s: seconds that a draining replica has to finish its requests; default 20.
        health_check_period_s: seconds between health checks of a replica; default 10.
        health_check_timeout_s: seconds that a health check may take; default 30.
        logging_config: what the replicas log, how and where.
        request_router_config: which router chooses the replica.
        max_constructor_retry_count: failures of the constructor, over all replicas, that end a deployment; default 20.
        gang_scheduling_config: replicas that start, stop and fail together.
        deployment_actors: actors that the replicas share.
        rolling_update_percentage: share of replicas that an update replaces at once, above 0, up to 1; default 0.2.
        max_surge_percent: replicas beyond the number, 0 to 100 percent of it, that an update may start; default 0.
        retry_idempotent: send a request of an idempotent method once more when its replica dies before anything of the
            answer went to the client; default True. This project's own.
        max_batch_size: put up to so many requests together and call the code with lists, see docs/batching.md; default
            None: one call for each request. This project's own, as are the next two.
        batch_wait_timeout_s: seconds that the first request of a batch waits for others while a replica is free;
            default 0.
        max_concurrent_batches: batches that a replica works on at once, whatever max_ongoing_requests says; default 1.
        route_prefix: for `.deploy()`, where None means not over HTTP; for `serve.run` if it is given none itself.
        prev_version, init_args, init_kwargs: for `.deploy()`, see docs/classic.md.
        max_concurrent_queries, _autoscaling_config: older names of `max_ongoing_requests` and `autoscaling_config`.

    Returns:
        A Deployment, or used with options, what makes one of a class or function.

    Raises:
        TypeError, ValueError: an option, or what is decorated, is wrong; pydantic's ValidationError is a ValueError.
    """
    given = {k: v for k, v in locals().items() if k not in _NOT_OPTIONS and v is not DEFAULT.VALUE}
    older = OlderOptions().with_given(given)
    rename(given)
    options = DeploymentOptions().changed(given)
    args = () if init_args is DEFAULT.VALUE else init_args or ()
    kwargs = {} if init_kwargs is DEFAULT.VALUE else init_kwargs

    def decorate(func_or_class: Callable[..., Any]) -> Deployment:
        own_name = getattr(func_or_class, "__name__", "") if name is DEFAULT.VALUE else name
        return Deployment(own_name, options, func_or_class, args, kwargs, older, _internal=True)

    return decorate if _func_or_class is None else decorate(_func_or_class)  # type: ignore[return-value]


_NOT_OPTIONS = {
    "_func_or_class",
    "_init_args",
    "_init_kwargs",
    "_internal",
    "func_or_class",
    "init_args",
    "init_kwargs",
    "name",
    "self",
}
