"""`ConsistentHashRouter`, where Ray Serve has it."""

from rayserve_fast.request_router import ConsistentHashRouter

__all__ = ["ConsistentHashRouter"]
