"""Import paths given as text: `package.module:attribute` or `package.module.attribute`."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def split(path: str) -> tuple[str, str]:
    """The module and the attribute that `path` names.

    Raises:
        ValueError: it names no attribute, or has two colons.

    >>> split("package.module:attribute")
    ('package.module', 'attribute')
    """
    module, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not module or not attribute or ":" in module:
        raise ValueError(f'Got invalid import path "{path}"; expected "module:attribute" or "module.attribute".')
    return module, attribute


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
    module, attribute = split(path)
    return getattr(import_module(module), attribute)
