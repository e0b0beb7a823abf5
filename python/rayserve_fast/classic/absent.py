"""A call without arguments of something that was written for HTTP and asks for a request: it gets an empty one.

The older handles call `__call__` with nothing where the code of that time takes a request that it does not look at.
Whether it takes one is known where it runs, so that is where the arguments come into being: when they are unpickled.
"""

from __future__ import annotations

import inspect
from typing import Any

from rayserve_fast.context import get_replica_context
from rayserve_fast.replica.calls import handler_of


class NoArguments:
    """Pickles as the positional arguments that the callee needs when it is given none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _arguments, ()


def _arguments() -> tuple[Any, ...]:
    method = handler_of(get_replica_context().servable_object)
    if method is None:
        return ()
    needed = [
        p for p in inspect.signature(method).parameters.values() if p.default is p.empty and p.kind in _POSITIONAL
    ]
    if len(needed) != 1:
        return ()
    from rayserve_fast.replica.portable import empty_request

    return (empty_request(),)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
