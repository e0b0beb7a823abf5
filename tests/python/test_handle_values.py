"""Values and errors of handle calls: what goes in comes out, by the right pickler, as a copy."""

from __future__ import annotations

import math
import pickle
import pickletools
import subprocess
import sys
import textwrap
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from ray.exceptions import RayError, RayTaskError

from rayserve_fast import values


def through_the_wire(value: Any) -> Any:
    """Encode, flatten as a socket would, decode."""
    encoded, buffers = values.dumps(value)
    return values.loads(bytes(encoded), [bytearray(buffer.raw()) for buffer in buffers])


def globals_in(encoded: bytes) -> bool:
    """Whether the pickle imports anything, which builtin values never need."""
    return any(op.name in ("GLOBAL", "STACK_GLOBAL") for op, _, _ in pickletools.genops(encoded))


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=40)
)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
        | st.sets(st.integers(), max_size=4)
        | st.frozensets(st.text(max_size=3), max_size=4)
        | st.binary(max_size=20).map(bytearray)
    ),
    max_leaves=20,
)


@given(plain)
def test_builtin_values_come_back_equal_and_without_imports(value: Any) -> None:
    encoded, buffers = values.dumps(value)
    assert not globals_in(encoded)
    assert buffers == []
    decoded = values.loads(encoded)
    assert decoded == value
    assert type(decoded) is type(value)


@given(st.tuples(plain, plain), st.dictionaries(st.text(max_size=8), plain, max_size=3))
def test_arguments_come_back_as_tuple_and_dict(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    encoded, buffers = values.dumps((args, kwargs))
    assert values.loads(encoded, buffers) == (args, kwargs)


@given(
    st.sampled_from(["u1", "i8", "f4", "c16", "S5", "?", "M8[ns]", [("a", "i4"), ("b", "f8")]]),
    st.lists(st.integers(0, 4), max_size=3),
    st.booleans(),
)
def test_arrays_of_any_shape_and_layout_come_back(kind: Any, shape: list[int], strided: bool) -> None:
    rng = np.random.default_rng(7)
    dtype = np.dtype(kind)
    raw = rng.integers(0, 2, size=math.prod(shape) * dtype.itemsize, dtype=np.uint8).tobytes()
    array = np.frombuffer(raw, dtype=dtype, count=math.prod(shape)).reshape(shape).copy()
    if strided and array.ndim:
        array = array[::-1].T
    decoded = through_the_wire([{"x": array}])[0]["x"]
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


def test_a_large_array_travels_beside_the_pickle_and_arrives_as_a_writable_copy() -> None:
    array = np.arange(1_000_000)
    encoded, buffers = values.dumps({"nested": [array, array]})
    assert len(encoded) < 1000
    assert [buffer.raw().nbytes for buffer in buffers] == [array.nbytes]
    decoded = through_the_wire(array)
    decoded[0] = 42
    assert array[0] == 0


def test_a_read_only_array_stays_read_only() -> None:
    array = np.arange(10)
    array.flags.writeable = False
    encoded, buffers = values.dumps(array)
    assert not values.loads(encoded, [bytes(buffer.raw()) for buffer in buffers]).flags.writeable


def test_an_array_of_objects_goes_by_what_it_holds() -> None:
    assert through_the_wire(np.array([1, "a", None], dtype=object)).tolist() == [1, "a", None]
    local = type("Local", (), {"x": 3})
    assert through_the_wire(np.array([local()], dtype=object))[0].x == 3


@dataclass
class Point:
    x: int
    weights: np.ndarray[Any, Any]


class Words(str):
    pass


@pytest.mark.parametrize(
    "value",
    [Words("a"), OrderedDict(a=1), Point, math.sqrt, {1: [Words("b")]}, range(3), 1j, np.float64(3), slice(1, 2)],
    ids=repr,
)
def test_whatever_is_not_plain_goes_by_cloudpickle_and_comes_back(value: Any) -> None:
    decoded = through_the_wire(value)
    assert decoded == value
    assert type(decoded) is type(value)


def test_arrays_inside_objects_travel_out_of_band_too() -> None:
    encoded, buffers = values.dumps(Point(1, np.zeros(100_000)))
    assert len(encoded) < 1000
    assert values.loads(encoded, [bytes(b.raw()) for b in buffers]).weights.shape == (100_000,)


def test_a_container_that_holds_itself_comes_back() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    decoded = through_the_wire(loop)
    assert decoded[1] is decoded


def test_classes_of_main_cross_processes_both_ways(tmp_path: Any) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from rayserve_fast import values
        class Item:
            def __init__(self, x): self.x = x
            def double(self): return Item(self.x * 2)
        encoded, _ = values.dumps({"item": Item(21)})
        sys.stdout.buffer.write(encoded)
    """)
    )
    encoded = subprocess.run([sys.executable, script], capture_output=True, check=True, timeout=60).stdout
    item = values.loads(encoded)["item"]
    assert item.double().x == 42
    back, _ = values.dumps(item.double())
    assert values.loads(back).x == 42


def test_unpicklable_values_raise_what_pickling_raised() -> None:
    with pytest.raises(TypeError, match=r"(?i)pickle|serialize"):
        values.dumps(sys._getframe())


class Custom(ValueError):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 7


class NeedsTwo(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)


def raised(error: BaseException) -> RayTaskError:
    def user_code() -> None:
        raise error

    try:
        user_code()
    except BaseException as caught:
        return values.load_error(values.dump_error(caught, "Model.predict"))
    raise AssertionError


def test_an_exception_arrives_as_its_own_type_and_as_a_task_error() -> None:
    error = raised(Custom("bad input"))
    assert isinstance(error, Custom)
    assert isinstance(error, RayTaskError)
    assert isinstance(error.cause, Custom)
    assert error.code == 7  # type: ignore[attr-defined]
    assert "user_code" in str(error)
    assert "bad input" in str(error)


def test_a_child_calls_error_does_not_nest() -> None:
    error = raised(raised(Custom("deep")))
    assert type(error.cause) is Custom


def test_exceptions_that_cannot_travel_still_bring_their_traceback() -> None:
    for broken in (NeedsTwo(1, 2), Custom(sys._getframe())):  # type: ignore[arg-type]
        error = raised(broken)
        assert isinstance(error, RayTaskError)
        assert type(error.cause) is RayError
        assert "user_code" in str(error.cause)


def test_an_exception_that_only_the_replica_can_import_still_arrives() -> None:
    name, text, pid, ip, _ = pickle.loads(values.dump_error(Custom("x"), "f"))
    foreign = b"\x80\x05\x8c\x0bno_such_mod\x8c\x01E\x93)R."
    error = values.load_error(pickle.dumps((name, text, pid, ip, foreign)))
    assert isinstance(error, RayTaskError)
    assert "no_such_mod" in str(error.cause)


def test_plain_arguments_cost_no_more_than_pickle() -> None:
    """Guards the fast path: the cloudpickle module is not entered for what handles mostly carry."""
    entered = []

    def trace(frame: Any, event: str, _: Any) -> None:
        if event == "call" and "cloudpickle" in frame.f_code.co_filename:
            entered.append(frame.f_code.co_name)

    sys.setprofile(trace)
    try:
        values.dumps(((b"x", [1, 2.0, {"k": np.zeros(3)}]), {"flag": True}))
    finally:
        sys.setprofile(None)
    assert entered == []
