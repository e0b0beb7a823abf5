"""The options of one deployment, checked: `DeploymentOptions` holds what the user gave, with defaults for the rest.

Defaults and errors are Ray Serve's: pydantic judges single options, `check` what needs several of them or Ray, and
`plain` makes the `DeploymentConfig` that travels.
"""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rayserve_fast.autoscaling import AutoscalingConfig, json_values
from rayserve_fast.config import BackpressureConfig, DeploymentActorConfig, RequestRouterConfig
from rayserve_fast.controlplane.spec import Backpressure, DeploymentConfig
from rayserve_fast.gang import GangSchedulingConfig
from rayserve_fast.schema import LoggingConfig
from rayserve_fast.settings import Settings

_ACTOR_OPTIONS = {
    "accelerator_type",
    "fallback_strategy",
    "label_selector",
    "memory",
    "num_cpus",
    "num_gpus",
    "resources",
    "runtime_env",
}

#: Options that say how a batch is put together.
_OF_BATCHES = ("batch_wait_timeout_s", "max_concurrent_batches")

#: The largest batch that travels; `MAX_BATCH` of the wire.
MAX_BATCH = 16 * 1024


class DeploymentOptions(Settings):
    """Every option of `@serve.deployment` except the name; suffix `_s` is seconds."""

    # The title is what a ValidationError calls it: the reference's name.
    model_config = ConfigDict(title="DeploymentConfig", extra="forbid", frozen=True, arbitrary_types_allowed=True)

    num_replicas: NonNegativeInt | None = 1
    ray_actor_options: Any = None
    placement_group_bundles: Any = None
    placement_group_strategy: Any = None
    placement_group_bundle_label_selector: Any = None
    max_replicas_per_node: Any = None
    user_config: Any = None
    max_ongoing_requests: PositiveInt = 5
    max_queued_requests: int = -1
    max_batch_size: int | None = Field(default=None, ge=1, le=MAX_BATCH)
    batch_wait_timeout_s: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    max_concurrent_batches: PositiveInt = 1
    backpressure_config: BackpressureConfig = BackpressureConfig()
    autoscaling_config: AutoscalingConfig | None = None
    graceful_shutdown_wait_loop_s: NonNegativeFloat = 2
    graceful_shutdown_timeout_s: NonNegativeFloat = 20
    health_check_period_s: PositiveFloat = 10
    health_check_timeout_s: PositiveFloat = 30
    logging_config: LoggingConfig | None = None
    request_router_config: RequestRouterConfig = RequestRouterConfig()
    max_constructor_retry_count: PositiveInt = 20
    gang_scheduling_config: GangSchedulingConfig | None = None
    deployment_actors: list[DeploymentActorConfig] | None = None
    rolling_update_percentage: float = Field(default=0.2, gt=0.0, le=1.0)
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    retry_idempotent: bool = True

    @field_validator("user_config")
    @classmethod
    def _json(cls, config: Any) -> Any:
        return config if isinstance(config, bytes) else json_values("user_config", config)

    @field_validator("max_queued_requests")
    @classmethod
    def _limit(cls, limit: int) -> int:
        if limit < 1 and limit != -1:
            raise ValueError("max_queued_requests must be -1 (no limit) or a positive integer.")
        return limit

    @field_validator("deployment_actors")
    @classmethod
    def _unique_names(cls, actors: list[DeploymentActorConfig] | None) -> list[DeploymentActorConfig] | None:
        names = [actor.name for actor in actors or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"deployment_actors must have unique names. Duplicate name(s): {twice}")
        return actors

    @model_validator(mode="after")
    def _whole_gangs(self) -> DeploymentOptions:
        gang = self.gang_scheduling_config
        if gang is not None and self.autoscaling_config is None and self.replicas_now() % gang.gang_size:
            raise ValueError(f"num_replicas ({self.num_replicas}) must be a multiple of gang_size ({gang.gang_size}).")
        return self

    def changed(self, given: dict[str, Any]) -> DeploymentOptions:
        """A copy with those that were given on top, all of them checked together; errors as for `check`."""
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        if given.get("max_batch_size", kept) is None:  # batching ends, and with it what was said of it
            kept = {name: value for name, value in kept.items() if name not in _OF_BATCHES}
        return DeploymentOptions(**{**kept, **_settled(given)}).check()

    def check(self) -> DeploymentOptions:
        """Itself, once what pydantic cannot judge is judged too.

        Raises:
            TypeError, ValueError: an option is wrong; plain ones, as in Ray Serve, which read better than a
                ValidationError around them.
        """
        self._check_actor()
        self._check_batch()
        if self.gang_scheduling_config is not None:
            self._check_gang()
        if self.placement_group_bundles is not None:
            self._check_bundles(self.placement_group_bundles)
            return self
        for option in ("placement_group_strategy", "placement_group_bundle_label_selector"):
            if getattr(self, option) is not None:
                raise ValueError(f"If `{option}` is provided, `placement_group_bundles` must also be provided.")
        return self

    def _check_actor(self) -> None:
        options, limit = self.ray_actor_options, self.max_replicas_per_node
        if options is not None and not isinstance(options, dict):
            raise TypeError(f'Got invalid type "{type(options)}" for ray_actor_options. Expected a dictionary.')
        for option in options or ():
            if option not in _ACTOR_OPTIONS:
                raise ValueError(
                    f"Specifying '{option}' in ray_actor_options is not allowed. "
                    f"Allowed options: {sorted(_ACTOR_OPTIONS)}"
                )
        if options:
            _validate_by_ray(options)
        if isinstance(limit, bool):
            raise TypeError(f"max_replicas_per_node must be None or an integer in [1, 100], not {type(limit)}.")
        if limit is not None and not isinstance(limit, int):
            raise TypeError(
                f"Get invalid type '{type(limit)}' for max_replicas_per_node. "
                "Expected None or an integer in the range of [1, 100]."
            )
        if limit is not None and not 1 <= limit <= 100:
            raise ValueError(
                f"Invalid max_replicas_per_node {limit}. Valid values are None or an integer in the range of [1, 100]."
            )

    def _check_batch(self) -> None:
        if self.max_batch_size is None:
            for option in _OF_BATCHES:
                if option in self.model_fields_set:
                    raise ValueError(f"{option} has no meaning without max_batch_size: set that too, or leave it out.")
        elif self.request_router_config.plain().get("custom"):
            raise ValueError(
                "max_batch_size is not allowed with a request_router_class of your own, which chooses a replica for "
                "each request: a batch goes to one. Leave one of the two out."
            )

    def _check_gang(self) -> None:
        for option in ("max_replicas_per_node", "placement_group_strategy"):
            if getattr(self, option) is not None:
                raise ValueError(f"Setting {option} is not allowed when gang_scheduling_config is provided.")

    def _check_bundles(self, bundles: list[dict[str, float]]) -> None:
        from ray.util.placement_group import validate_placement_group

        if self.max_replicas_per_node is not None:
            raise ValueError("Setting max_replicas_per_node is not allowed when placement_group_bundles is provided.")
        strategy = self.placement_group_strategy or "PACK"
        validate_placement_group(bundles, strategy, lifetime="detached", bundle_label_selector=self._selectors())
        for resource, needed in self._actor_resources().items():
            if bundles[0].get(resource, 0) < needed:
                raise ValueError(
                    "When using `placement_group_bundles`, the replica actor will be placed in the first bundle, so "
                    f"its resources must fit there: it needs {needed} {resource}, the bundle has "
                    f"{bundles[0].get(resource, 0)}."
                )

    def _selectors(self) -> Any:
        """The label selectors of the bundles; a single one counts for all of them."""
        selectors = self.placement_group_bundle_label_selector
        return selectors * len(self.placement_group_bundles or ()) if selectors and len(selectors) == 1 else selectors

    def _actor_resources(self) -> dict[str, float]:
        options = self.actor_options()
        return {"CPU": options["num_cpus"], "GPU": options.get("num_gpus") or 0, **(options.get("resources") or {})}

    def actor_options(self) -> dict[str, Any]:
        """The options of the replica's actor, with one CPU unless something else was given."""
        options = dict(self.ray_actor_options or {})
        if options.get("num_cpus") is None:
            options["num_cpus"] = 1
        return options

    def replicas_now(self) -> int:
        """How many replicas to run: with autoscaling, the number to begin with, and never none while nothing scales."""
        scaling = self.autoscaling_config
        if scaling is None:
            return 1 if self.num_replicas is None else self.num_replicas
        return max(1, scaling.min_replicas if scaling.initial_replicas is None else scaling.initial_replicas)

    def plain(self) -> DeploymentConfig:
        """The value that travels."""
        from ray import cloudpickle

        bundles, selectors, actors = self.placement_group_bundles, self._selectors(), self.deployment_actors
        return DeploymentConfig(
            num_replicas=self.replicas_now(),
            ray_actor_options=self.actor_options(),
            placement_group_bundles=None if bundles is None else tuple(bundles),
            placement_group_bundle_label_selector=None if selectors is None else tuple(selectors),
            backpressure=Backpressure(**self.backpressure_config.model_dump()),
            autoscaling_config=_dump(self.autoscaling_config),
            logging_config=_dump(self.logging_config),
            request_router_config=self.request_router_config.plain(),
            gang_scheduling_config=_dump(self.gang_scheduling_config),
            deployment_actors=None if actors is None else cloudpickle.dumps(actors),
            configured=frozenset(self.model_fields_set),
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
        )


_AS_THEY_ARE = (
    "batch_wait_timeout_s",
    "graceful_shutdown_timeout_s",
    "graceful_shutdown_wait_loop_s",
    "health_check_period_s",
    "health_check_timeout_s",
    "max_batch_size",
    "max_concurrent_batches",
    "max_constructor_retry_count",
    "max_ongoing_requests",
    "max_queued_requests",
    "max_replicas_per_node",
    "max_surge_percent",
    "placement_group_strategy",
    "retry_idempotent",
    "rolling_update_percentage",
    "user_config",
)


def _settled(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, with what is about the number of replicas sorted out."""
    given = dict(given)
    replicas, scaling = given.get("num_replicas"), given.get("autoscaling_config")
    if replicas in (None, "auto"):
        given.pop("num_replicas", None)
    if "max_ongoing_requests" in given and given["max_ongoing_requests"] is None:
        raise ValueError("`max_ongoing_requests` must be non-null, got None.")
    if replicas == "auto":
        if isinstance(scaling, AutoscalingConfig):
            scaling = scaling.model_dump(exclude_unset=True)
        auto = AutoscalingConfig.default().model_dump(exclude_unset=True)
        return {**given, "autoscaling_config": AutoscalingConfig(**{**auto, **(scaling or {})})}
    if replicas == 0:
        raise ValueError("num_replicas is expected to larger than 0")
    if replicas is not None and scaling is not None:
        raise ValueError("Manually setting num_replicas is not allowed when autoscaling_config is provided.")
    return given


def _dump(config: BaseModel | None) -> dict[str, Any] | None:
    return None if config is None else config.model_dump(mode="json")


def _validate_by_ray(options: dict[str, Any]) -> None:
    """Let Ray judge values that it alone knows; what is in a runtime environment is judged when the actor starts."""
    import ray

    given = {k: v for k, v in options.items() if k != "runtime_env" or not isinstance(v, dict)}
    ray.remote(type("Replica", (), {})).options(**given)
