"""The options of autoscaling: fields, defaults and checks of Ray Serve's.

Nothing scales yet: a deployment with these options runs `DeploymentConfig.num_replicas`, which is the initial (else the
least) number, and says so when it is deployed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rayserve_fast.importing import import_attr
from rayserve_fast.settings import Settings

DEFAULT_POLICY = "rayserve_fast.autoscaling_policy:default_autoscaling_policy"
_METRICS_INTERVAL_S = 10.0


class AggregationFunction(str, Enum):
    """How the samples of a look-back window become one number."""

    MEAN = "mean"
    MAX = "max"
    MIN = "min"


class AutoscalingPolicy(BaseModel):
    """Which function decides on the number of replicas.

    >>> AutoscalingPolicy(policy_function="math.ceil").policy_function
    'math.ceil'
    """

    policy_function: str | Callable[..., Any] = Field(
        default=DEFAULT_POLICY, description="A function or class, or its import path."
    )
    policy_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments for a policy that is a class; JSON values."
    )

    _policy: Callable[..., Any] | None = PrivateAttr(default=None)

    @field_validator("policy_kwargs")
    @classmethod
    def _json(cls, kwargs: Any) -> Any:
        return json_values("policy_kwargs", kwargs)

    def model_post_init(self, context: Any) -> None:
        """Import what is named, name what is given: a wrong path fails here, not after the deployment."""
        self._policy, self.policy_function = resolve(self.policy_function, DEFAULT_POLICY)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AutoscalingPolicy) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def is_default_policy_function(self) -> bool:
        """Whether the built-in policy decides."""
        return self.policy_function == DEFAULT_POLICY


class AutoscalingConfig(Settings):
    """Between which bounds, towards which load and how fast the number of replicas follows the traffic.

    >>> AutoscalingConfig(min_replicas=3, max_replicas=2)
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for AutoscalingConfig
    ...
    """

    min_replicas: NonNegativeInt = Field(default=1, description="Never fewer; 0 lets an idle deployment go to zero.")
    initial_replicas: NonNegativeInt | None = Field(default=None, description="How many at first; None: min_replicas.")
    max_replicas: PositiveInt = Field(default=1, description="Never more.")
    target_ongoing_requests: PositiveFloat | None = Field(
        default=2, description="Requests, running and queued, that each replica should have."
    )
    metrics_interval_s: PositiveFloat = Field(
        default=_METRICS_INTERVAL_S, description="Deprecated. Seconds between reports of the load."
    )
    look_back_period_s: PositiveFloat = Field(default=30.0, description="Seconds of load that a decision looks at.")
    smoothing_factor: PositiveFloat = Field(default=1.0, description="Deprecated: the two factors below.")
    upscale_smoothing_factor: PositiveFloat | None = Field(default=None, description="Deprecated: upscaling_factor.")
    downscale_smoothing_factor: PositiveFloat | None = Field(
        default=None, description="Deprecated: downscaling_factor."
    )
    upscaling_factor: PositiveFloat | None = Field(default=None, description="Gain of a decision to grow.")
    downscaling_factor: PositiveFloat | None = Field(default=None, description="Gain of a decision to shrink.")
    downscale_delay_s: NonNegativeFloat = Field(default=600.0, description="Seconds of low load before shrinking.")
    downscale_to_zero_delay_s: NonNegativeFloat | None = Field(
        default=None, description="Seconds of no load before the last replica goes; None: downscale_delay_s."
    )
    upscale_delay_s: NonNegativeFloat = Field(default=30.0, description="Seconds of high load before growing.")
    aggregation_function: str | AggregationFunction = Field(
        default=AggregationFunction.MEAN, description="What of the look-back window counts."
    )
    policy: AutoscalingPolicy = Field(default_factory=AutoscalingPolicy, description="What decides.")

    @model_validator(mode="after")
    def _bounds(self) -> AutoscalingConfig:
        low, first, high = self.min_replicas, self.initial_replicas, self.max_replicas
        if high < low:
            raise ValueError(f"max_replicas ({high}) must be greater than or equal to min_replicas ({low})!")
        if first is not None and first < low:
            raise ValueError(f"min_replicas ({low}) must be less than or equal to initial_replicas ({first})!")
        if first is not None and first > high:
            raise ValueError(f"max_replicas ({high}) must be greater than or equal to initial_replicas ({first})!")
        return self

    @field_validator("metrics_interval_s")
    @classmethod
    def _deprecate_interval(cls, interval: float) -> float:
        if interval != _METRICS_INTERVAL_S:
            warnings.warn(
                "The `metrics_interval_s` field in AutoscalingConfig is deprecated.", DeprecationWarning, stacklevel=2
            )
        return interval

    @field_validator("look_back_period_s")
    @classmethod
    def _covers_an_interval(cls, period: float, info: ValidationInfo) -> float:
        interval = info.data.get("metrics_interval_s", _METRICS_INTERVAL_S)
        if period <= interval:
            warnings.warn(
                f"`look_back_period_s` ({period}) must be greater than `metrics_interval_s` ({interval}); a later "
                "release refuses it.",
                FutureWarning,
                stacklevel=2,
            )
        return period

    @field_validator("aggregation_function")
    @classmethod
    def _known_function(cls, function: str | AggregationFunction) -> AggregationFunction:
        return function if isinstance(function, AggregationFunction) else AggregationFunction(function.lower())

    @classmethod
    def default(cls) -> AutoscalingConfig:
        """What `num_replicas="auto"` means: 1 to 100 replicas, two requests each."""
        return cls(target_ongoing_requests=2, min_replicas=1, max_replicas=100)

    def get_upscaling_factor(self) -> float:
        """The gain in force when growing."""
        return self.upscaling_factor or self.upscale_smoothing_factor or self.smoothing_factor

    def get_downscaling_factor(self) -> float:
        """The gain in force when shrinking."""
        return self.downscaling_factor or self.downscale_smoothing_factor or self.smoothing_factor

    def get_target_ongoing_requests(self) -> float | None:
        """Requests that each replica should have."""
        return self.target_ongoing_requests


def json_values(name: str, value: Any) -> Any:
    """`value`, if JSON can express it; ValueError names the option otherwise."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{name} is not JSON-serializable: {error}.") from None
    return value


def resolve(given: str | Callable[..., Any], default: str) -> tuple[Callable[..., Any] | None, str]:
    """The object and the import path of a pluggable class or function; the default names what is built in."""
    if given == default:
        return None, default
    if isinstance(given, str):
        return import_attr(given), given
    return given, f"{given.__module__}.{given.__name__}"
