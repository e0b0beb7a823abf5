"""What a handler's result becomes as JSON: the reference's bytes, at orjson's speed where orjson writes the same ones.

The reference is ``json.dumps(jsonable_encoder(obj, custom_encoder=...), separators=(",", ":"))``. orjson agrees with
it except for: text outside printable ASCII (written raw, not ``\\uXXXX``), NaN and Infinity (written ``null``), the
spelling of small and large floats, and keys that begin with ``_sa`` (the reference drops them). Anything that orjson
cannot be sure about it is told to refuse, or to hand to ``_plain``. So: one pass by orjson, cheap tests of its bytes,
and only when a test strikes a second pass that spells the same values as the standard library does. Everything else
goes to the reference's own functions, which are imported when first needed (FastAPI costs a third of a second).

Invariant: where the reference answers, ``dumps`` answers with the same bytes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import sys
from collections import deque
from collections.abc import Callable
from pathlib import PosixPath
from typing import Any

import orjson


def dumps(obj: Any) -> bytes:
    """Return `obj` as compact JSON in ASCII; raises what ``jsonable_encoder`` or ``json.dumps`` raise."""
    try:
        out = orjson.dumps(obj, _plain, _OPTIONS)
    except TypeError:
        return _reference(obj)
    if 95 in out and out.find(b'"_sa') >= 0:
        return _reference(obj)
    if not out.isascii() or 127 in out or _exponent(out) or (46 in out and out.find(b"0.0000") >= 0):
        out = _spell(orjson.loads(out)).encode()
    if out.find(b"null") >= 0:  # None, or a NaN in disguise: only the standard library's encoder tells
        try:
            if _spell(obj).encode() != out:
                return _reference(obj)
        except (TypeError, ValueError):
            return _reference(obj)
    return out


def _plain(obj: Any) -> Any:
    """Turn an object that orjson does not know into what ``jsonable_encoder`` would make of it, or refuse."""
    convert = _EXACT.get(type(obj))
    if convert is not None:
        return convert(obj)
    if isinstance(obj, Exception):
        return str(obj)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(obj, (numpy.ndarray, numpy.generic)):
        if obj.dtype.kind not in "fiub":
            raise TypeError
        return _from_array(obj) if isinstance(obj, numpy.ndarray) else obj.item()
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(obj, pydantic.BaseModel):
        return obj.model_dump(mode="json", by_alias=True)
    if hasattr(type(obj), "__dataclass_fields__"):
        return dataclasses.asdict(obj)
    raise TypeError


def _from_array(array: Any) -> Any:
    """A numpy array as Ray Serve sends it: floats as doubles, integers as int64."""
    if array.dtype.kind == "f":
        array = array.astype(float)
    elif array.dtype.kind in "iu":
        array = array.astype(int)
    return array.tolist()


def _reference(obj: Any) -> bytes:
    from fastapi.encoders import jsonable_encoder

    return _spell_strict(jsonable_encoder(obj, custom_encoder=encoders())).encode()


def encoders() -> dict[Any, Callable[[Any], Any]]:
    """Ray Serve's additions to FastAPI's encoders, for those libraries that the process has imported."""
    found: dict[Any, Callable[[Any], Any]] = {Exception: str}
    if numpy := sys.modules.get("numpy"):
        found[numpy.ndarray] = _from_array
        found[numpy.generic] = lambda scalar: scalar.item()
    # A half-imported pandas (another thread is at it) has no DataFrame yet, hence nobody has an instance.
    if frame := getattr(sys.modules.get("pandas"), "DataFrame", None):
        found[frame] = lambda table: table.to_dict(orient="records")
    return found


_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
_EXACT: dict[type, Callable[[Any], Any]] = {
    datetime.datetime: datetime.datetime.isoformat,
    datetime.date: datetime.date.isoformat,
    datetime.time: datetime.time.isoformat,
    datetime.timedelta: datetime.timedelta.total_seconds,
    set: list,
    frozenset: list,
    deque: list,
    bytes: bytes.decode,
    PosixPath: str,
}
_exponent = re.compile(rb"e[-+]?\d").search  # spelled differently by orjson (which version?) and Python
_spell_strict = json.JSONEncoder(separators=(",", ":")).encode
_spell = json.JSONEncoder(separators=(",", ":"), default=_plain).encode
