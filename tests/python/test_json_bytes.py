"""`replica.json.dumps` writes the bytes of Ray Serve's json.dumps(jsonable_encoder(...))."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import string
import sys
import uuid
from collections import OrderedDict, deque, namedtuple
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pydantic
import pytest
from fastapi.encoders import jsonable_encoder
from hypothesis import example, given, settings, strategies as st

from rayserve_fast.replica.json import dumps


def reference(obj: Any) -> bytes:
    """Ray Serve's answer, written down independently of the code under test."""

    def array(value: Any) -> Any:
        kind = value.dtype.kind
        return (value.astype(float) if kind == "f" else value.astype(int) if kind in "iu" else value).tolist()

    encoders = {
        Exception: str,
        np.ndarray: array,
        np.generic: lambda value: value.item(),
        pd.DataFrame: lambda table: table.to_dict(orient="records"),
    }
    return json.dumps(jsonable_encoder(obj, custom_encoder=encoders), separators=(",", ":")).encode()


class Color(enum.Enum):
    RED = 1
    NAMES = ("a", "é")


class Level(enum.IntEnum):
    LOW = 1


class Tag(str, enum.Enum):
    A = "a"

    def __str__(self) -> str:
        return "other"


class Shouted(str, enum.Enum):
    """A member whose value is not its content: encoders that take one for the other show."""

    def __new__(cls, text: str) -> Shouted:
        member = str.__new__(cls, text)
        member._value_ = text.upper()
        return member

    QUIET = "quiet"


class Text(str):
    __slots__ = ()


class Number(float):
    def __repr__(self) -> str:
        return "number"


Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = None


@dataclasses.dataclass
class Trouble(Exception):
    reason: str


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    name: str = pydantic.Field(alias="n")
    when: datetime.datetime | None = None
    value: Any = None


floats = st.floats() | st.sampled_from([1e15, 1e16, 1e-4, 1e-5, 9.9999e-5, 1e-7, 1e22, 5e-324, -0.0, 123456789.125e9])
texts = (
    st.text()
    | st.text(string.printable + "\x7f\x80")
    | st.sampled_from(["_sa", "e-1", "1e5", "0.0000", "null", '"_sa'])
)
scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**64), 2**65) | floats | texts | st.uuids()
    | st.datetimes(timezones=st.none() | st.timezones()) | st.dates() | st.times() | st.timedeltas()
    | st.decimals(allow_nan=False, allow_infinity=False, places=3) | st.binary(max_size=4)
    | st.sampled_from([*Color, *Level, *Tag, *Shouted])
    | st.sampled_from([Path("/é"), PurePosixPath("a"), ValueError("x", 1), Trouble("r")])
    | texts.map(Text) | st.floats(allow_nan=False).map(Number)
    | st.floats(width=32).map(np.float32) | st.floats().map(np.float64)
    | st.integers(0, 2**64 - 1).map(np.uint64) | st.booleans().map(np.bool_)
    | st.lists(st.floats(width=32), max_size=3).map(lambda x: np.array(x, dtype=np.float32))
    | st.lists(st.integers(0, 2**64 - 1), max_size=3).map(lambda x: np.array(x, dtype=np.uint64))
    | st.lists(texts, max_size=3).map(np.array)
)  # fmt: skip
keys = (
    st.text(max_size=6) | texts.map(Text) | st.integers() | st.none() | st.booleans()
    | st.sampled_from(["_sa", "_sax", "_s", "a", *Tag, *Shouted, *Level])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(deque)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=2).map(OrderedDict)
        | st.builds(Pair, inner, inner)
        | st.builds(Point, inner, inner)
        | st.builds(Model, n=texts, when=st.none() | st.datetimes(), value=inner)
        | st.frozensets(st.integers() | st.text(max_size=3), max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=1500, deadline=None)
@given(values)
@example([math.nan, None])
@example({"a": math.inf})
@example([None, 1e-5, "é", Color.RED])
@example([None, Shouted.QUIET])
@example([None, uuid.UUID(int=7), datetime.date(2024, 2, 29)])
@example({"_sa_instance_state": 1, "kept": None})
@example([np.array([1.5, np.nan]), None, np.float32(0.1)])
@example([2**64, -(2**63) - 1])
@example("\x7f")
@example(pd.DataFrame({"a": [1, 2], "b": ["x", None]}))
@example(np.zeros((2, 0), dtype=np.int8))
@example(np.array(3.5))
@example(np.array([None, {"a": 1}], dtype=object))
@example({Text("k"): Number(1.5)})
@example([[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]])
def test_bytes_equal_the_reference(obj: Any) -> None:
    try:
        expected = reference(obj)
    except Exception:
        return  # not serializable there: what we do with it is our own matter
    assert dumps(obj) == expected


def deep(levels: int) -> Any:
    return [] if levels == 0 else [deep(levels - 1)]


def test_nesting_deeper_than_orjson_goes() -> None:
    assert dumps(deep(300)) == reference(deep(300))


def test_generator_is_consumed_once() -> None:
    assert dumps({"items": (i for i in range(3))}) == b'{"items":[0,1,2]}'


@pytest.mark.parametrize("obj", [object, {"a": object}, b"\xff", {1, object}, [uuid.UUID(int=1), lambda: 0, 3j]])
def test_refuses_what_the_reference_refuses(obj: Any) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whichever it is
        reference(obj)
    with pytest.raises(theirs.type):
        dumps(obj)


@pytest.mark.parametrize(
    "obj",
    [
        {"id": 7, "name": "x", "score": 0.25, "labels": ["a", "b"], "nested": {"ok": True, "none": None}},
        {"text": "naïve ☃", "small": 1e-7},
        {"array": np.arange(6.0).reshape(2, 3), "scalar": np.int64(3)},
        {"point": Point(1, datetime.date(2020, 1, 1)), "model": Model(n="a")},
    ],
)
def test_common_results_never_take_the_slow_way(obj: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(obj)
    monkeypatch.setitem(sys.modules, "fastapi.encoders", None)  # importing it now raises ImportError
    assert dumps(obj) == expected


def test_decimal_takes_the_reference_way() -> None:
    assert dumps([Decimal("1.50"), Decimal(2)]) == reference([Decimal("1.50"), Decimal(2)]) == b"[1.5,2]"


def test_float_spelling_of_this_orjson_is_covered() -> None:
    """Every power of ten: whatever this version of orjson writes, we write what json writes."""
    for exponent in range(-323, 309):
        for mantissa in ("1", "1.5", "-9.999999999999999"):
            value = float(f"{mantissa}e{exponent}")
            assert dumps(value) == json.dumps(value).encode(), orjson.dumps(value)
