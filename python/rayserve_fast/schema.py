"""The part of `ray.serve.schema` that the Python API needs: statuses, logging and tracing options.

The schemas of configuration files and of the REST API come with those.
"""

from __future__ import annotations

import logging
import os
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rayserve_fast.controlplane.spec import ReplicaRank
from rayserve_fast.controlplane.status import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ProxyStatus,
    ReplicaState,
    ServeStatus,
)
from rayserve_fast.settings import Settings

__all__ = [
    "ApplicationStatus",
    "ApplicationStatusOverview",
    "DeploymentStatus",
    "DeploymentStatusOverview",
    "DeploymentStatusTrigger",
    "EncodingType",
    "LoggingConfig",
    "ProxyStatus",
    "ReplicaRank",
    "ReplicaState",
    "ServeStatus",
    "TracingConfig",
]


class EncodingType(str, Enum):
    """How log records are written."""

    TEXT = "TEXT"
    JSON = "JSON"


class LoggingConfig(BaseModel):
    """What is logged, how and where.

    >>> LoggingConfig(log_level=10).log_level
    'DEBUG'
    """

    model_config = ConfigDict(extra="forbid")

    encoding: str | EncodingType = Field(
        default_factory=lambda: os.environ.get("RAY_SERVE_LOG_ENCODING", "TEXT"),
        description="TEXT or JSON; the environment variable RAY_SERVE_LOG_ENCODING changes the default.",
    )
    log_level: int | str = Field(default="INFO", description="The name or number of a level of `logging`.")
    logs_dir: str | None = Field(default=None, description="A directory; None: that of the Ray session.")
    enable_access_log: bool = Field(default=True, description="A line for every request.")
    additional_log_standard_attrs: list[str] = Field(
        default_factory=list, description="Attributes of `logging.LogRecord` to add to every line."
    )

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        if encoding not in list(EncodingType):
            raise ValueError(
                f"Got '{encoding}' for encoding. Encoding must be one of {[e.value for e in EncodingType]}."
            )
        return encoding

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, level: int | str) -> str:
        name = logging.getLevelName(level) if isinstance(level, int) else level
        if not isinstance(logging.getLevelName(name), int):
            raise ValueError(f'Got "{level}" for log_level. log_level must be the name or number of a logging level.')
        return name

    @field_validator("additional_log_standard_attrs")
    @classmethod
    def _known_attributes(cls, attributes: list[str]) -> list[str]:
        known = {*vars(logging.makeLogRecord({})), "message", "asctime"}
        for attribute in attributes:
            if attribute not in known:
                raise ValueError(f"Unknown attribute '{attribute}'. It must be one of {sorted(known)}.")
        return list(dict.fromkeys(attributes))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, LoggingConfig) and self.model_dump() == other.model_dump()


class TracingConfig(Settings):
    """Whether and where to requests are traced.

    >>> TracingConfig().enabled
    False
    """

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(
        default_factory=lambda: bool(os.environ.get("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH")),
        description="On by itself when the environment names an exporter.",
    )
    exporter_import_path: str = Field(
        default_factory=lambda: os.environ.get("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", ""),
        description="Import path of a function that returns span processors; empty: files.",
    )
    sampling_ratio: float = Field(
        default_factory=lambda: float(os.environ.get("RAY_SERVE_TRACING_SAMPLING_RATIO", "0.01")),
        description="The share of requests that are traced, 0 to 1.",
    )

    @field_validator("sampling_ratio")
    @classmethod
    def _share(cls, ratio: float) -> float:
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"sampling_ratio must be between 0.0 and 1.0, got {ratio}.")
        return ratio
