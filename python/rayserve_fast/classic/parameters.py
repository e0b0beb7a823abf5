"""Constructor parameters that are annotated with an older handle class, and get such handles.

Bound applications arrive as today's handles; a constructor that was written for the older ones says so in its
annotations, which is the only thing that tells them apart. Decided once per replica, before the constructor runs.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from rayserve_fast.handle import DeploymentHandle, RayServeDeploymentHandle, RayServeHandle, RayServeSyncHandle

_BY_NAME = {kind.__name__: kind for kind in (RayServeHandle, RayServeSyncHandle, RayServeDeploymentHandle)}
_NAMES = re.compile(r"\b(?:RayServe(?:Sync|Deployment)?|Deployment)Handle\b")


def with_older_handles(
    init: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments with the handles that `init` asks for.

    Args:
        init: the constructor, as a function of the class.
        target: its first argument.
        args, kwargs: the others. Where they do not fit the signature they are returned as they are.
    """
    wanted = {name: kind for name, hint in _annotations(init).items() if (kind := _older(hint)) is not None}
    if not wanted:
        return args, kwargs
    try:
        bound = inspect.signature(init).bind(target, *args, **kwargs)
    except TypeError:
        return args, kwargs  # the constructor itself says it best
    for name in wanted.keys() & bound.arguments.keys():
        bound.arguments[name] = _convert(bound.arguments[name], wanted[name])
    return bound.args[1:], bound.kwargs


def _annotations(init: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(init)
    except Exception:  # text that only a type checker can resolve: taken as text
        return getattr(inspect.unwrap(init), "__annotations__", {})


def _older(annotation: Any) -> type[RayServeHandle] | None:
    """The older class that an annotation names, alone or within others; None if it also takes today's."""
    kinds = list(_handle_kinds(annotation))
    return None if DeploymentHandle in kinds else next(iter(kinds), None)


def _handle_kinds(annotation: Any) -> typing.Iterator[Any]:
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        yield from (_BY_NAME.get(name, DeploymentHandle) for name in _NAMES.findall(annotation))
    elif inspect.isclass(annotation) and issubclass(annotation, (RayServeHandle, DeploymentHandle)):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _handle_kinds(part)


def _convert(value: Any, kind: type[RayServeHandle]) -> Any:
    if isinstance(value, DeploymentHandle):
        return kind(value)
    if type(value) in (list, tuple):
        return type(value)(_convert(item, kind) for item in value)
    if type(value) is dict:
        return {key: _convert(item, kind) for key, item in value.items()}
    return value
