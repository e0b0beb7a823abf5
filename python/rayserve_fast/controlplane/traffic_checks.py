"""What a wish about traffic must look like, whatever routes and applications there are.

Each function raises an error that names the argument and says what to give instead. Where the name is an endpoint of
the older API, texts and types are the reference's. `traffic` checks what depends on the state of the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: How far the sum of weights may be from 1, as in the reference.
TOLERANCE = 1e-8


def is_route(name: str) -> bool:
    """A first argument that starts with `/` is a route, any other an endpoint."""
    return name.startswith("/")


def check_weights(name: str, weights: Any) -> None:
    """Refuse what is no distribution over targets.

    Raises:
        TypeError: no dict of names to numbers.
        ValueError: a negative weight, or they do not sum to 1.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: must be a dictionary of target to weight, got {type(weights).__name__}.")
    for target, weight in weights.items():
        if not isinstance(target, str):
            raise TypeError(f"weights: a target is the name of an application, got {target!r}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise TypeError(f"weights: the weight of {target!r} must be a finite number, got {weight!r}.")
        if weight < 0 and is_route(name):
            raise ValueError(f"weights: the weight of {target!r} is {weight}; give 0 or more.")
        if weight < 0:
            raise ValueError(
                f"Attempted to assign a weight of {weight} to backend '{target}'. Weights cannot be negative."
            )
    total = math.fsum(weights.values())
    if abs(total - 1) <= TOLERANCE:
        return
    if is_route(name):
        raise ValueError(
            f"weights: must sum to 1, they sum to {total}; serve.delete_traffic({name!r}) is what ends a split."
            if not weights
            else f"weights: must sum to 1, they sum to {total}. Divide each of them by that."
        )
    raise ValueError(f"Traffic dictionary weights must sum to 1, currently they sum to {total}")


def check_share(name: str, share: Any) -> None:
    """Refuse a share that is not in [0, 1].

    Raises:
        TypeError: no number; for an endpoint also one outside [0, 1], as in the reference.
        ValueError: outside [0, 1].
    """
    number = not isinstance(share, bool) and isinstance(share, (int, float))
    if number and 0 <= share <= 1:
        return
    kind = ValueError if number and is_route(name) else TypeError
    raise kind(f"share: must be a number from 0 (stop) to 1 (every request), got {share!r}.")


def endpoint_name(name: Any) -> str:
    """The name, if it can be told from a route and from a deployment's key."""
    if not isinstance(name, str):
        raise TypeError(f"endpoint_name: must be a string, got {type(name).__name__}.")
    if not name or "/" in name or "#" in name:
        raise ValueError(f"endpoint_name: must be a name without '/' and '#', got {name!r}.")
    return name


def endpoint_route(route: Any) -> str | None:
    """The route, if it is one."""
    if route is not None and not (isinstance(route, str) and route.startswith("/")):
        raise TypeError(f"route: must be a string that starts with '/', or None for handles only, got {route!r}.")
    return route


def endpoint_methods(methods: Any) -> tuple[str, ...]:
    """The methods in upper case."""
    names = isinstance(methods, (list, tuple)) and all(isinstance(m, str) for m in methods)
    if not names or not methods:
        raise TypeError(f'methods: must be a list of HTTP methods such as ["GET"], got {methods!r}.')
    return tuple(m.upper() for m in methods)
