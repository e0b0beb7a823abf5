"""`PowerOfTwoChoicesRequestRouter`, where Ray Serve defines it."""

from rayserve_fast.request_router import PowerOfTwoChoicesRequestRouter

__all__ = ["PowerOfTwoChoicesRequestRouter"]
