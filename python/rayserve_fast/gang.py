"""Gangs: replicas that start, stop and fail together. Accepted and checked; nothing schedules them yet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pydantic import Field, field_validator

from rayserve_fast.settings import Settings

__all__ = ["GangContext", "GangPlacementStrategy", "GangRuntimeFailurePolicy", "GangSchedulingConfig"]


@dataclass
class GangContext:
    """What a replica knows of its gang: its place in it, and who else is there, in order of rank."""

    gang_id: str
    rank: int
    world_size: int
    member_replica_ids: list[str]
    pg_name: str = ""


class GangPlacementStrategy(str, Enum):
    """How the replicas of a gang lie on the nodes: together, or apart; both as far as possible."""

    PACK = "PACK"
    SPREAD = "SPREAD"


class GangRuntimeFailurePolicy(str, Enum):
    """What the failure of one replica does to its gang."""

    RESTART_GANG = "RESTART_GANG"
    RESTART_REPLICA = "RESTART_REPLICA"


class GangSchedulingConfig(Settings):
    """Replicas that start, stop and fail together."""

    gang_size: int = Field(ge=1, description="Replicas of a gang; num_replicas is a multiple of it.")
    gang_placement_strategy: GangPlacementStrategy = Field(
        default=GangPlacementStrategy.PACK, description="How they lie on the nodes."
    )
    runtime_failure_policy: GangRuntimeFailurePolicy = Field(
        default=GangRuntimeFailurePolicy.RESTART_GANG, description="What one failure does to the others."
    )

    @field_validator("runtime_failure_policy")
    @classmethod
    def _implemented(cls, policy: GangRuntimeFailurePolicy) -> GangRuntimeFailurePolicy:
        if policy is GangRuntimeFailurePolicy.RESTART_REPLICA:
            raise NotImplementedError("RESTART_REPLICA policy is not yet implemented.")
        return policy
