"""`RoundRobinRouter`, where Ray Serve has it."""

from rayserve_fast.request_router import RoundRobinRouter

__all__ = ["RoundRobinRouter"]
