"""What all classes of options have in common: True and False are no numbers.

Pydantic takes them for 1 and 0. A flag that has slipped to its neighbour, such as `max_batch_size=True`, would then
count as a number instead of being found.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationInfo, field_validator


class Settings(BaseModel):
    """Options that a user gives.

    >>> class Size(Settings):
    ...     limit: int | None = None
    >>> try:
    ...     Size(limit=True)
    ... except ValueError as error:
    ...     print(error.errors()[0]["msg"])
    Value error, limit must be a number, got True.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _no_bools(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{info.field_name} must be a number, got {value}.")
        return value


def _is_number(annotation: Any) -> bool:
    """Whether a field's values are numbers, or None besides."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(_is_number(part) for part in get_args(annotation))
    return annotation is int or annotation is float
