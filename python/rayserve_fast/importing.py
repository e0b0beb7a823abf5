"""Import paths given as text: `package.module:attribute` or `package.module.attribute`."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_attr(path: str) -> Any:
    """Import what `path` names.

    Raises:
        ValueError: the path names no attribute, or has two colons.
        ImportError, AttributeError: the module or the attribute does not exist.

    >>> import_attr("json:dumps")([1])
    '[1]'
    >>> import_attr("os.path.join")("a", "b")
    'a/b'
    """
    module, _, attribute = path.rpartition(":") if ":" in path else path.rpartition(".")
    if not module or not attribute or ":" in module:
        raise ValueError(f'Got invalid import path "{path}"; expected "module:attribute" or "module.attribute".')
    return getattr(import_module(module), attribute)
