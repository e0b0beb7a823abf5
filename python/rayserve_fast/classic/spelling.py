"""The older options of `@serve.deployment`: what is today's under another name, and what only `.deploy()` obeys.

Accepted in silence: using one is a PendingDeprecationWarning, which Python does not show unless it is asked to.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

#: Older option -> today's.
RENAMED = {"max_concurrent_queries": "max_ongoing_requests", "_autoscaling_config": "autoscaling_config"}


@dataclass(frozen=True)
class OlderOptions:
    """What only `.deploy()` obeys, except for the route, which `serve.run` takes if it is given none itself."""

    route: tuple[str | None] | None = None  # None: not given; (None,): not reachable over HTTP
    version: str | None = None
    prev_version: str | None = None

    def with_given(self, given: dict[str, Any]) -> OlderOptions:
        """A copy with the options among `given`, which are taken out of there.

        Raises:
            TypeError, ValueError: one is wrong.
        """
        changed: dict[str, Any] = {}
        for name in ("version", "prev_version"):
            if name in given:
                changed[name] = given.pop(name)
                if not isinstance(changed[name], (str, type(None))):
                    raise TypeError(f"{name} must be a string or None, got {type(changed[name])}.")
        if "route_prefix" in given:
            from rayserve_fast.application import check_route_prefix  # imports Ray: only when it is needed

            route = given.pop("route_prefix")
            if not isinstance(route, (str, type(None))):
                raise TypeError(f"route_prefix must be a string or None, got {type(route)}.")
            check_route_prefix(route)
            changed["route"] = (route,)
        return replace(self, **changed)


def rename(given: dict[str, Any]) -> None:
    """Give older options their names of today.

    Raises:
        ValueError: an option is given under both of its names.

    >>> given = {"max_concurrent_queries": 10}
    >>> rename(given)
    >>> given
    {'max_ongoing_requests': 10}
    """
    for older, today in RENAMED.items():
        if given.get(older) is None:
            given.pop(older, None)
            continue
        if today in given:
            raise ValueError(f"`{older}` is the older name of `{today}`: give one of them.")
        warn_older(f"`{older}`", f"`{today}`", depth=2)
        given[today] = given.pop(older)


def warn_older(what: str, today: str, depth: int = 1) -> None:
    """Say, to whoever wants to hear it, that there is a spelling of today; `depth` functions below the user's code."""
    warnings.warn(f"{what} is an older spelling; today's is {today}.", PendingDeprecationWarning, stacklevel=2 + depth)
