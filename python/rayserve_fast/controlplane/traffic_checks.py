"""What a wish about traffic must look like, whatever routes and applications there are.

Each function raises an error that names the argument and says what to give instead. Where the name is an endpoint of
the older API, texts and types are the reference's. `traffic` checks what depends on the state of the cluster.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayserve_fast.text import check_text

#: How far the sum of weights may be from 1, as in the reference.
TOLERANCE = 1e-8


#: What may be the name of an HTTP header or a cookie (RFC 9110, token).
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def is_route(name: str) -> bool:
    """A first argument that starts with `/` is a route, any other an endpoint."""
    return name.startswith("/")


def check_route(route: str) -> None:
    """Refuse a route that no request would find, or that another one would hide."""
    for wrong, why in (
        (route != "/" and route.endswith("/"), "may not end with '/'"),
        (any(c in route for c in "{}"), "may not contain wildcards; endpoints have them"),
        (any(c in route for c in "?#") or any(c.isspace() for c in route), "is a path without a query and spaces"),
        (route == "/-" or route.startswith("/-/"), "may not begin with '/-/', which are the proxy's own pages"),
    ):
        if wrong:
            raise ValueError(f"route: {why}, got {route!r}.")


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
        check_text("weights", target)
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
    text = check_text("endpoint_name", name)
    if not text or "/" in text or "#" in text:
        raise ValueError(f"endpoint_name: must be a name without '/' and '#', got {text!r}.")
    return text


def endpoint_route(route: Any) -> str | None:
    """The route, if it is one."""
    if route is not None and not (isinstance(route, str) and route.startswith("/")):
        raise TypeError(f"route: must be a string that starts with '/', or None for handles only, got {route!r}.")
    if route is not None:
        check_text("route", route)
    return route


def endpoint_methods(methods: Any) -> tuple[str, ...]:
    """The methods in upper case."""
    names = isinstance(methods, (list, tuple)) and all(isinstance(m, str) for m in methods)
    if not names or not methods:
        raise TypeError(f'methods: must be a list of HTTP methods such as ["GET"], got {methods!r}.')
    for method in methods:
        check_text("methods", method)
    return tuple(m.upper() for m in methods)


def check_name(field: str, value: Any) -> None:
    """Refuse what is no name."""
    check_text(field, value)
    if not value:
        raise ValueError(f"{field}: must not be empty.")


def check_number(
    field: str, value: Any, what: str, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    """Refuse what is not `what`, a finite number within these bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field}: must be {what}, got {value!r}.")
    if not (math.isfinite(value) and value > above and least <= value <= most):
        raise ValueError(f"{field}: must be {what}, got {value!r}.")


def rollout_steps(steps: Any) -> tuple[float, ...]:
    """The shares of a rollout, if they rise."""
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
        raise TypeError(f"steps: must be a list of shares such as [0.1, 0.5, 1.0], got {steps!r}.")
    for i, share in enumerate(steps):
        check_number(f"steps[{i}]", share, "a share above 0 and at most 1", above=0, most=1)
        if i and share <= steps[i - 1]:
            raise ValueError(f"steps[{i}]: must be above the step before it, {steps[i - 1]}, got {share}.")
    return tuple(float(s) for s in steps)


def _token(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{field}: must be the name of a header or cookie, got {value!r}.")
    if not TOKEN.fullmatch(value):
        raise ValueError(f"{field}: {value!r} cannot be the name of a header or cookie; give letters, digits and '-'.")
    return value


def sticky_by(header: str | None, cookie: str | None) -> dict[str, str] | None:
    """What makes requests stick, as the snapshot says it; header names are lower case on the wire."""
    if header is not None and cookie is not None:
        raise ValueError("sticky_header, sticky_cookie: give one of them, not both.")
    if header is not None:
        return {"header": _token("sticky_header", header).lower()}
    return {"cookie": _token("sticky_cookie", cookie)} if cookie is not None else None


def rule_of(index: int, rule: Any) -> dict[str, str | None]:
    """A rule as the snapshot says it."""
    field = f"rules[{index}]"
    if not isinstance(rule, Mapping):
        raise TypeError(f'{field}: must be a dict such as {{"header": "x-canary", "target": "b"}}, got {rule!r}.')
    if unknown := set(rule) - {"header", "cookie", "value", "target"}:
        raise ValueError(f"{field}: unknown keys {sorted(map(str, unknown))}; give header or cookie, value and target.")
    if ("header" in rule) == ("cookie" in rule):
        raise ValueError(f'{field}: give either "header" or "cookie".')
    check_name(f"{field}.target", rule.get("target"))
    value = rule.get("value")
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{field}.value: must be a string, or None for any value, got {value!r}.")
    if value is not None:
        check_text(f"{field}.value", value)
    if "header" in rule:
        return {"header": _token(f"{field}.header", rule["header"]).lower(), "value": value, "target": rule["target"]}
    return {"cookie": _token(f"{field}.cookie", rule["cookie"]), "value": value, "target": rule["target"]}
