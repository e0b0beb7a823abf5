"""Text that can be sent: names and paths end in snapshots, frames and the names of actors, all of them UTF-8.

What is not encodable is refused where the user gives it, by the name of its field. Deeper inside it would fail late,
as a UnicodeEncodeError without a field, or in every proxy at once.
"""

from __future__ import annotations

from typing import Any


def check_text(field: str, value: Any) -> str:
    """The value, if it is text that can be encoded.

    Raises:
        TypeError: it is no string.
        ValueError: it has a lone surrogate.

    >>> check_text("name", "a\\ud800")
    Traceback (most recent call last):
    ...
    ValueError: name: 'a\\ud800' cannot be encoded as UTF-8, it has a lone surrogate at index 1; leave that out.
    """
    if not isinstance(value, str):
        raise TypeError(f"{field}: must be a string, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{field}: {value!r} cannot be encoded as UTF-8, it has a lone surrogate at index {e.start};"
            " leave that out."
        ) from None
    return value
