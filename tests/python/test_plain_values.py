"""Values that cross between processes without Python's pickle, and those that only look as if they could."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from typing import Any

import pytest
from handle_replica import called
from hypothesis import given, settings, strategies as st
from scripted_replica import Cluster, Replicas, connecting, replicas  # noqa: F401 - fixtures

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=20)  # lone surrogates too
    | st.binary(max_size=20)
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    ),
    max_leaves=12,
)


class Echo:
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    async def one(self, value: Any) -> Any:
        return value

    async def shared(self) -> list[Any]:
        one: list[int] = [1]
        return [one, one]


def test_plain_values_come_back_as_they_were() -> None:
    with called(Echo) as (handle, _):

        @settings(max_examples=300, deadline=None, database=None)
        @given(st.lists(PLAIN, max_size=3), st.dictionaries(st.text("abc", min_size=1, max_size=3), PLAIN, max_size=2))
        def check(args: list[Any], kwargs: dict[str, Any]) -> None:
            expected = tuple(args), kwargs
            answer = handle.remote(*args, **kwargs).result(timeout_s=10)
            assert answer == expected
            assert repr(answer) == repr(expected)  # True is not 1, and -0.0 not 0.0

        check()


class Color(enum.IntEnum):
    RED = 1


class Named(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Color.RED,
        Named("a"),
        OrderedDict(a=1),
        2**63,
        -(2**63) - 1,
        {1, 2},
        b"x" * 70_000,
        "é" * 40_000,
        list(range(300)),
    ],
    ids=lambda value: f"{type(value).__name__}-{len(str(value))}",
)
def test_what_is_not_small_and_plain_keeps_its_type(value: Any) -> None:
    with called(Echo) as (handle, _):
        answer = handle.one.remote(value).result(timeout_s=10)
        assert (type(answer), answer) == (type(value), value)


def test_nan_and_infinity_travel() -> None:
    with called(Echo) as (handle, _):
        nan, infinity = handle.one.remote([math.nan, -math.inf]).result(timeout_s=10)
        assert math.isnan(nan)
        assert infinity == -math.inf


def test_one_list_in_two_places_stays_one() -> None:
    with called(Echo) as (handle, _):
        one: list[Any] = [1]
        (first, second), _ = handle.remote(one, one).result(timeout_s=10)
        assert first is second
        first, second = handle.shared.remote().result(timeout_s=10)
        assert first is second
        one.append(one)
        again = handle.one.remote(one).result(timeout_s=10)
        assert again[1] is again


def test_containers_may_lie_deeper_than_any_limit_of_ours() -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    with called(Echo) as (handle, _):
        assert handle.one.remote(deep).result(timeout_s=10) == deep


def test_what_is_written_is_a_pickle(replica: Replicas, connect: Any) -> None:
    """For routers of the user's own, for relays and for older replicas, which read it with pickle."""
    server = replica(lambda call: call.reply(None))
    handle = connect(Cluster(server))
    handle.remote(1, "é", None, key=[True, {"a": (2.5, b"b")}]).result(timeout_s=10)
    call = server.calls.get(timeout=5)
    assert (call.args, call.kwargs) == ((1, "é", None), {"key": [True, {"a": (2.5, b"b")}]})
