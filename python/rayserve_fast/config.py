"""The configuration classes of `ray.serve.config`: same names, fields, defaults and errors.

First the options of the whole instance, which `serve.start` takes, then those of a deployment; autoscaling and gangs
have files of their own and are importable from here. They are pydantic models because they check what comes from
outside; everything inside works on the plain values of `controlplane.spec`.
"""

from __future__ import annotations

import base64
import math
import os
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rayserve_fast.autoscaling import AggregationFunction, AutoscalingConfig, AutoscalingPolicy, json_values, resolve
from rayserve_fast.controlplane.spec import DeploymentConfig
from rayserve_fast.gang import GangPlacementStrategy, GangRuntimeFailurePolicy, GangSchedulingConfig
from rayserve_fast.importing import import_attr
from rayserve_fast.request_router import RequestRouter, built_in
from rayserve_fast.settings import Settings
from rayserve_fast.text import check_text

__all__ = [
    "AggregationFunction",
    "AutoscalingConfig",
    "AutoscalingPolicy",
    "BackpressureConfig",
    "ControllerOptions",
    "DeploymentActorConfig",
    "DeploymentConfig",
    "GangPlacementStrategy",
    "GangRuntimeFailurePolicy",
    "GangSchedulingConfig",
    "HTTPOptions",
    "ProxyLocation",
    "RequestRouterConfig",
    "gRPCOptions",
]

DEFAULT_ROUTER = "rayserve_fast.request_router:LeastLoadedRequestRouter"


def forces_local_testing() -> bool:
    """Whether the environment makes every `serve.run` of this process one in local testing mode."""
    return os.environ.get("RAY_SERVE_FORCE_LOCAL_TESTING_MODE") == "1"


class ProxyLocation(str, Enum):
    """On which nodes proxies take traffic in.

    `Disabled`: nowhere, applications are reachable by handles only. `HeadOnly`: on the head node. `EveryNode`: on every
    node that runs a replica, and on the head node.

    >>> ProxyLocation._normalize("NoServer")
    <ProxyLocation.Disabled: 'Disabled'>
    """

    Disabled = "Disabled"
    HeadOnly = "HeadOnly"
    EveryNode = "EveryNode"

    @classmethod
    def _normalize(cls, location: ProxyLocation | str | None) -> ProxyLocation | None:
        if location is None or isinstance(location, cls):
            return location
        if not isinstance(location, str):
            raise TypeError(f"Must be a `ProxyLocation` or str, got: {type(location)}.")
        return cls.Disabled if location == "NoServer" else cls(location)


class HTTPOptions(Settings):
    """How the proxies serve HTTP. They keep what they were started with until `serve.shutdown()`.

    `max_head_bytes`, `max_body_bytes` and `shards` are this project's own; the other fields are Ray Serve's.

    >>> HTTPOptions(port=0).keep_alive_timeout_s
    90
    >>> HTTPOptions(ssl_keyfile="key.pem", ssl_certfile=None)
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for HTTPOptions
    ...
    """

    model_config = ConfigDict(validate_assignment=True, validate_default=False, arbitrary_types_allowed=True)

    host: str | None = Field(
        default_factory=lambda: os.environ.get("RAY_SERVE_DEFAULT_HTTP_HOST") or "127.0.0.1",
        description="Address to listen on; 0.0.0.0 or :: to be reachable from outside. None starts no proxy.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    middlewares: list[Any] = Field(default=[], description="Removed: a non-empty list is an error.")
    location: ProxyLocation | None = Field(default=None, description="Deprecated: `proxy_location` of `serve.start`.")
    num_cpus: int = Field(default=0, description="Removed: anything but 0 is an error.")
    root_url: str = Field(default="", description="Accepted for old configurations.")
    root_path: str = Field(default="", description="The path that a proxy in front strips, for links back to us.")
    request_timeout_s: float | None = Field(
        default=None, description="Seconds from the head of a request to the end of its answer; None: no limit."
    )
    keep_alive_timeout_s: int = Field(
        default=90, ge=0, description="Seconds that an idle connection stays open; 0: each answer ends its connection."
    )
    ssl_keyfile: str | None = Field(default=None, description="Path of the private key, with `ssl_certfile`.")
    ssl_certfile: str | None = Field(default=None, description="Path of the certificate chain, with `ssl_keyfile`.")
    ssl_keyfile_password: str | None = Field(default=None, description="What opens the private key.")
    ssl_ca_certs: str | None = Field(default=None, description="Path of the authorities that clients must be from.")
    max_head_bytes: int = Field(
        default=65536, ge=1024, description="Bytes of the longest request head, at least 1024; beyond it 431."
    )
    max_body_bytes: int | None = Field(
        default=None, gt=0, description="Bytes of the longest request body, beyond it 413; None: no limit."
    )
    shards: int | None = Field(
        default=None, gt=0, le=256, description="Threads of each proxy; None: half the node's cores, at least 1."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown(cls, given: Any) -> Any:
        unknown = sorted(set(given) - set(cls.model_fields)) if isinstance(given, dict) else ()
        if unknown:
            warnings.warn(f"HTTPOptions does not know {unknown}; ignored.", UserWarning, stacklevel=4)
        return given

    @field_validator("location", mode="before")
    @classmethod
    def _deprecate_location(cls, location: Any) -> ProxyLocation | None:
        if location is not None:
            warnings.warn(
                "`location` in HTTPOptions is deprecated; use the `proxy_location` argument of `serve.start`.",
                DeprecationWarning,
                stacklevel=2,
            )
        return ProxyLocation._normalize(location)

    @model_validator(mode="after")
    def _no_host_no_proxy(self) -> HTTPOptions:
        if self.host is None:
            self.__dict__["location"] = ProxyLocation.Disabled  # not by assignment, which would validate again
        return self

    @field_validator("host", "root_path")
    @classmethod
    def _text(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None:
            check_text(str(info.field_name), text)
        return text

    @field_validator("request_timeout_s")
    @classmethod
    def _number(cls, seconds: float | None) -> float | None:
        if seconds is not None and math.isnan(seconds):
            raise ValueError("request_timeout_s must be a number of seconds, or None for no limit; got nan.")
        return seconds

    @field_validator("ssl_certfile")
    @classmethod
    def _key_and_certificate(cls, certfile: str | None, info: ValidationInfo) -> str | None:
        if bool(certfile) != bool(info.data.get("ssl_keyfile")):
            raise ValueError("Both ssl_keyfile and ssl_certfile must be provided together to enable HTTPS.")
        return certfile

    @field_validator("middlewares")
    @classmethod
    def _refuse_middlewares(cls, middlewares: list[Any]) -> list[Any]:
        if middlewares:
            raise ValueError(
                "`middlewares` in HTTPOptions has been removed. Add them to the FastAPI or Starlette application "
                "that you give to `serve.ingress`."
            )
        return middlewares

    @field_validator("num_cpus")
    @classmethod
    def _refuse_num_cpus(cls, num_cpus: int) -> int:
        if num_cpus:
            raise ValueError("`num_cpus` in HTTPOptions has been removed. Proxies reserve no CPU.")
        return num_cpus


class gRPCOptions(Settings):
    """How the proxies serve gRPC.

    >>> gRPCOptions().port
    9000
    """

    port: int = Field(default=9000, description="Port to listen on.")
    grpc_servicer_functions: list[str] = Field(
        default=[], description="Import paths of `add_...Servicer_to_server` functions; none: no gRPC server."
    )
    request_timeout_s: float | None = Field(default=None, description="Seconds that a call may take; None: no limit.")
    enable_reflection: bool = Field(default=True, description="Answer the reflection protocol.")

    @property
    def grpc_servicer_func_callable(self) -> list[Any]:
        """The functions behind the import paths; ImportError or ValueError names the one that is none."""
        functions = [(path, import_attr(path)) for path in self.grpc_servicer_functions]
        for path, function in functions:
            if not callable(function):
                raise ValueError(f"{path} is not a callable function.")
        return [function for _, function in functions]


class ControllerOptions(BaseModel):
    """What the controller's actor is started with.

    >>> ControllerOptions(runtime_env={"env_vars": {"LOG": "1"}}).runtime_env
    {'env_vars': {'LOG': '1'}}
    """

    model_config = ConfigDict(extra="forbid")

    runtime_env: dict[str, Any] | None = Field(
        default=None, description="Only `env_vars`, names and values both str; packages belong on deployments."
    )

    @field_validator("runtime_env")
    @classmethod
    def _only_env_vars(cls, runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
        others = sorted(set(runtime_env or ()) - {"env_vars"})
        if others:
            raise ValueError(
                f"ControllerOptions.runtime_env only supports ['env_vars']; got disallowed keys {others}. What a "
                "replica needs belongs into `ray_actor_options` of its deployment."
            )
        env_vars = (runtime_env or {}).get("env_vars", {})
        if not isinstance(env_vars, dict):
            raise ValueError(f"runtime_env.env_vars must be a dict[str, str], got {type(env_vars).__name__}.")
        for name, value in env_vars.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"env_vars key must be a non-empty str, got {name!r}.")
            if not isinstance(value, str):
                raise ValueError(f"env_vars[{name!r}] must be str (got {type(value).__name__}).")
        return runtime_env


class BackpressureConfig(Settings):
    """What an HTTP client is answered when the deployment's queue is full.

    >>> BackpressureConfig(status_code=429, retry_after_s=2).retry_after_s
    2.0
    """

    model_config = ConfigDict(extra="forbid")

    status_code: Literal[503, 429] = Field(default=503, description="HTTP status.")
    retry_after_s: NonNegativeFloat | None = Field(
        default=None, allow_inf_nan=False, description="Seconds for `Retry-After`, rounded up; None: no header."
    )


class RequestRouterConfig(Settings):
    """Which router chooses the replica of a request, and what it may know."""

    request_router_class: str | Callable[..., Any] = Field(
        default=DEFAULT_ROUTER, description="A class, or its import path; the default takes the least loaded replica."
    )
    request_router_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of its `initialize_state`; JSON values."
    )
    request_routing_stats_period_s: PositiveFloat = Field(
        default=10, description="Seconds between calls of `record_routing_stats`."
    )
    request_routing_stats_timeout_s: PositiveFloat = Field(default=30, description="Seconds that such a call may take.")
    initial_backoff_s: PositiveFloat = Field(default=0.025, description="Seconds before the second attempt to route.")
    backoff_multiplier: PositiveFloat = Field(default=2, description="Growth of that pause.")
    max_backoff_s: PositiveFloat = Field(default=0.5, description="Seconds that it never exceeds.")

    _router: Callable[..., Any] | None = PrivateAttr(default=None)
    _policy: str = PrivateAttr(default="least_loaded")

    @field_validator("request_router_kwargs")
    @classmethod
    def _json(cls, kwargs: Any) -> Any:
        return json_values("request_router_kwargs", kwargs)

    def model_post_init(self, context: Any) -> None:
        """Import what is named, name what is given: a wrong path fails here, not after the deployment."""
        given = self.request_router_class
        kind = given if isinstance(given, type) else None
        found = built_in(f"{kind.__module__}:{kind.__qualname__}" if kind else str(given))
        if found is not None:
            self._policy, self.request_router_class = found.policy, f"{found.__module__}:{found.__name__}"
            return
        _check_router(given)
        self._policy, (self._router, self.request_router_class) = "custom", resolve(given, DEFAULT_ROUTER)

    def plain(self) -> dict[str, Any]:
        """What travels: the fields, the engine's name for the rule, and a router of the user's own as text.

        Raises:
            TypeError: the router cannot be pickled.
        """
        custom = None
        if self._router is not None:
            from rayserve_fast.definition import RouterPickler, dump_code

            pauses = (self.initial_backoff_s, self.backoff_multiplier, self.max_backoff_s)
            problem = f"Could not serialize the request router {self.request_router_class}"
            code = dump_code((self._router, self.request_router_kwargs, pauses), None, problem, RouterPickler)
            custom = base64.b64encode(code).decode()
        return self.model_dump(mode="json") | {"policy": self._policy, "custom": custom}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RequestRouterConfig) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def is_default_request_router(self) -> bool:
        """Whether the built-in router chooses."""
        return self.request_router_class == DEFAULT_ROUTER


_NO_IMPORT = (ModuleNotFoundError, ImportError, AttributeError, ValueError)


def _check_router(given: object) -> None:
    """Whether a router of the user's own can be imported and is one."""
    try:
        router = import_attr(given) if isinstance(given, str) else given
    except _NO_IMPORT as error:  # or of a kind derived from these, which may ask for more than a text
        kind = next(kind for kind in _NO_IMPORT if isinstance(error, kind))
        raise kind(f"request_router_class {given!r} cannot be imported: {error}") from error
    if not (isinstance(router, type) and issubclass(router, RequestRouter)):
        raise TypeError(
            f"request_router_class must be a class that derives from rayserve_fast.request_router.RequestRouter, "
            f"got {router!r}."
        )
    if router.choose_replicas is RequestRouter.choose_replicas:
        raise TypeError(f"request_router_class {router.__qualname__} must define `async def choose_replicas`.")


class DeploymentActorConfig(BaseModel):
    """An actor that all replicas of a deployment share."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = Field(description="Unique within the deployment.")
    actor_class: Any = Field(description="A `ray.remote` class, or the import path of one.")
    init_args: tuple[Any, ...] = Field(default_factory=tuple, description="Positional constructor arguments.")
    init_kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword constructor arguments.")
    actor_options: dict[str, Any] = Field(default_factory=dict, description="Ray options, over the deployment's.")

    _class: Any = PrivateAttr(default=None)

    def model_post_init(self, context: Any) -> None:
        """Keep the class, show its import path."""
        self._class = self.actor_class
        if not isinstance(self.actor_class, str):
            inner = self.actor_class.__ray_actor_class__
            self.actor_class = f"{inner.__module__}:{inner.__qualname__}"

    def get_actor_class(self) -> Any:
        """The class itself, imported if it was given as a path."""
        return import_attr(self._class) if isinstance(self._class, str) else self._class
