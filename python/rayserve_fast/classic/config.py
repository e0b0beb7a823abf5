"""The configuration classes of the Client API, as `serve.BackendConfig` and `serve.CondaEnv`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, NonNegativeFloat, PositiveInt

from rayserve_fast.settings import Settings

__all__ = ["BackendConfig", "CondaEnv"]


class BackendConfig(Settings):
    """How the replicas of a backend run; a dict with the same keys does as well.

    >>> BackendConfig(num_replicas=2).max_concurrent_queries
    100
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    #: How many replicas.
    num_replicas: PositiveInt = 1
    #: Requests that one call may take; for handlers with `@serve.accept_batch`, which take one without it.
    max_batch_size: PositiveInt | None = None
    #: Seconds that a batch waits for more requests.
    batch_wait_timeout: NonNegativeFloat = 0.0
    #: Requests that one replica works on at once. Today: `max_ongoing_requests`.
    max_concurrent_queries: PositiveInt = 100
    #: What the class's `reconfigure` is called with; JSON values.
    user_config: Any = None
    #: Accepted: a replica that is idle leaves at once.
    experimental_graceful_shutdown_wait_loop_s: NonNegativeFloat = 2.0
    #: Seconds that a leaving replica has to finish its requests.
    experimental_graceful_shutdown_timeout_s: NonNegativeFloat = 20.0


def given_config(config: Any, kinds: str = "a dictionary") -> dict[str, Any]:
    """The options that a dict, or a `BackendConfig`, was made with.

    Raises:
        TypeError: it is neither; the text names these `kinds`.
    """
    if isinstance(config, BackendConfig):
        return config.model_dump(exclude_unset=True)
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    raise TypeError(f"config must be {kinds}.")


class CondaEnv:
    """The conda environment that a backend's replicas run in, by name.

    Today: `ray_actor_options={"runtime_env": {"conda": name}}`.

    >>> CondaEnv("ray-tf2").name
    'ray-tf2'
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"CondaEnv({self.name!r})"
