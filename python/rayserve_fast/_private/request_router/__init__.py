"""`PowerOfTwoChoicesRequestRouter`, by the path that Ray Serve's own default has."""

from rayserve_fast.request_router import PowerOfTwoChoicesRequestRouter

__all__ = ["PowerOfTwoChoicesRequestRouter"]
