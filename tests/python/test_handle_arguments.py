"""Answers of calls as arguments of other calls: nobody waits for them, and their bytes pass through unread."""

from __future__ import annotations

import asyncio
import pickle
import queue
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handle_replica import called
from hypothesis import HealthCheck, given, settings, strategies as st
from scripted_replica import FIN, RESULT, Call, Cluster, Replicas, connecting, replicas, silent  # noqa: F401 - fixtures
from wire_client import value_bytes

from rayserve_fast import values
from rayserve_fast.exceptions import BackPressureError, RayServeException, RequestCancelledError
from rayserve_fast.handle import DeploymentHandle


def bomb() -> None:
    raise AssertionError("decoded in the middle process")


class Bomb:
    def __reduce__(self) -> Any:
        return bomb, ()


def taken(server: Any) -> Call:
    """The next call at the replica."""
    call: Call = server.calls.get(timeout=5)
    return call


def nothing_comes(server: Any) -> bool:
    try:
        server.calls.get(timeout=0.05)
    except queue.Empty:
        return True
    return False


def test_remote_returns_at_once_and_the_call_starts_with_its_argument(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    inner = handle.first.remote()
    outer = handle.second.remote(1, inner, key="k")
    first = taken(server)
    assert first.method == "first"
    assert nothing_comes(server)
    first.reply({"a": [1, 2]})
    second = taken(server)
    assert (second.args, second.kwargs) == ((1, {"a": [1, 2]}), {"key": "k"})
    second.reply("done")
    assert outer.result(timeout_s=5) == "done"
    assert inner.result() == {"a": [1, 2]}


def test_the_bytes_pass_through_as_they_came(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    outer = handle.second.remote(handle.first.remote())
    first = taken(server)
    encoded, buffers = pickle.dumps(Bomb(), 5), [b"x" * 5, bytes(200_000), b""]
    server_side: list[Any] = []
    values_load, values.load_arguments = values.load_arguments, lambda *parts: server_side.append(parts) or ((), {})
    try:
        first.send(RESULT, payload=value_bytes(encoded, buffers), flags=FIN)
        second = taken(server)
    finally:
        values.load_arguments = values_load
    assert second.relayed == [(0, encoded, [bytearray(buffer) for buffer in buffers])]
    second.reply(None)
    assert outer.result(timeout_s=5) is None


def test_one_answer_may_be_many_arguments(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply((call.args, call.kwargs)))))
    one = handle.remote(1)
    assert handle.remote(one, 2, one, x=3, y=one).result() == (
        (((1,), {}), 2, ((1,), {})),
        {"x": 3, "y": ((1,), {})},
    )


def test_an_answer_that_was_read_is_an_argument_like_any_other(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply(call.args))))
    inner = handle.remote(np.zeros(100_000))
    array = inner.result()[0]
    array[0] = 5
    assert handle.remote(inner).result()[0][0][0] == 5


def test_whoever_reads_the_answer_does_not_change_what_is_passed_on(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))
    inner = handle.remote()
    outer = handle.remote(inner)
    between = handle.remote()
    taken(server).reply(np.zeros(100_000))
    inner.result(timeout_s=5)[:] = 7  # `between` may hold the only slot; the argument waits here
    for _ in range(2):
        call = taken(server)
        call.reply(float(call.args[0][0]) if call.args else None)
    assert outer.result(timeout_s=5) == 0.0
    assert between.result(timeout_s=5) is None


def test_an_arguments_error_is_the_calls_error(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    inner = handle.remote()
    outer, later = handle.remote(inner, handle.remote()), None
    taken(server).fail(2, values.dump_error(KeyError("lost"), "f"))
    with pytest.raises(KeyError) as caught:
        outer.result(timeout_s=5)
    with pytest.raises(KeyError) as again:
        inner.result(timeout_s=5)
    assert caught.value is again.value
    later = handle.remote(inner)
    with pytest.raises(KeyError):
        later.result(timeout_s=5)
    taken(server).reply(None)
    assert nothing_comes(server)


def test_the_death_of_an_arguments_replica_is_told_apart(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    outer = handle.remote(handle.remote())
    taken(server)
    server.die()
    with pytest.raises(RayServeException, match="died before"):
        outer.result(timeout_s=5)


def test_cancelling_an_argument_ends_the_call(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    inner = handle.remote()
    outer = handle.remote(inner)
    taken(server)
    inner.cancel()
    with pytest.raises(RequestCancelledError):
        outer.result(timeout_s=5)
    with pytest.raises(RequestCancelledError):
        handle.remote(inner).result(timeout_s=5)
    assert nothing_comes(server)


def test_cancelling_the_call_leaves_its_argument_alone(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    inner = handle.remote()
    outer = handle.remote(inner)
    outer.cancel()
    with pytest.raises(RequestCancelledError):
        outer.result(timeout_s=5)
    taken(server).reply(11)
    assert inner.result(timeout_s=5) == 11
    assert nothing_comes(server)


def test_a_long_chain_needs_nobody_to_wait(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply(call.args[0] + 1))))
    response = handle.remote(0)
    for _ in range(300):
        response = handle.remote(response)
    assert response.result(timeout_s=30) == 301


def test_waiting_calls_do_not_count_as_queued(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1, max_queued_requests=1))
    inner = handle.remote("inner")
    first = taken(server)
    outer = handle.remote(inner)
    queued = handle.remote("queued")
    with pytest.raises(BackPressureError):
        handle.remote("too many").result(timeout_s=5)
    first.reply(1)
    taken(server).reply(2)
    taken(server).reply(3)
    assert (queued.result(timeout_s=5), outer.result(timeout_s=5)) == (2, 3)


def test_streams_and_nested_answers_are_refused_as_arguments(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    items = handle.options(stream=True).remote()
    with pytest.raises(RuntimeError, match="iterate it"):
        handle.remote(items).result(timeout_s=5)
    for nested in ([handle.remote()], {"x": handle.remote()}, (handle.remote(),)):
        with pytest.raises(RayServeException, match="top-level argument"):
            handle.remote(nested).result(timeout_s=5)


def test_answers_are_awaited_and_passed_on_in_a_loop(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply(sum(call.args)))))

    async def fan_in() -> Any:
        parts = [handle.remote(i) for i in range(32)]
        return await handle.remote(*parts), await parts[3]

    assert asyncio.run(fan_in()) == (sum(range(32)), 3)


def test_reading_and_passing_on_may_race(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply(call.args[0]))))
    with ThreadPoolExecutor(2) as pool:
        for i in range(200):
            inner = handle.remote(np.full(10_000, i))
            start = threading.Barrier(2)
            read = pool.submit(lambda: (start.wait(), inner.result(timeout_s=5)))  # noqa: B023 - done below
            sent = pool.submit(lambda: (start.wait(), handle.remote(inner).result(timeout_s=5)))  # noqa: B023
            assert read.result()[1][0] == sent.result()[1][0] == i


class Echo:
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def same(self, value: Any) -> Any:
        return value


plain = st.integers() | st.text(max_size=5) | st.binary(max_size=30) | st.lists(st.integers(), max_size=3)
shapes = st.integers(0, 40_000).map(lambda size: np.arange(size, dtype=np.float32))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b)) and b.flags.writeable and b.flags.aligned
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.fixture(name="echo", scope="module")
def echoing() -> Any:
    with called(Echo, max_ongoing_requests=100) as (handle, _):
        yield handle


@given(
    st.lists(st.tuples(st.booleans(), plain | shapes), max_size=5),
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.booleans(), plain | shapes), max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_of_values_and_answers_arrives(echo: DeploymentHandle, args: Any, kwargs: Any) -> None:
    def sent(given: tuple[bool, Any]) -> Any:
        relayed, value = given
        return echo.same.remote(value) if relayed else value

    response = echo.remote(*map(sent, args), **{key: sent(given) for key, given in kwargs.items()})
    expected = (tuple(value for _, value in args), {key: value for key, (_, value) in kwargs.items()})
    assert equal(expected, response.result(timeout_s=20))


@pytest.mark.parametrize("size", [1_000, 100_000, 1_000_000, 30_000_000])
def test_large_arrays_arrive_aligned_writable_and_in_the_memory_that_was_read(echo: Any, size: int) -> None:
    array = np.arange(size // 8)
    back = echo.same.remote(array).result(timeout_s=60)
    np.testing.assert_array_equal(back, array)
    back[0] = 42
    assert array[0] == 0
    assert back.flags.aligned
    if size > 500_000:
        owner = back
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert type(getattr(owner, "obj", owner)).__name__ == "Memory"


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_large_bytes_arrive(echo: Any, kind: type) -> None:
    value = kind(range(256)) * 20_000
    back = echo.same.remote(value).result(timeout_s=60)
    assert type(back) is kind
    assert back == value


def test_memory_stays_flat_over_many_large_values(echo: Any) -> None:
    def resident_kib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024

    array = np.ones(1 << 17)

    def rounds(count: int) -> None:
        for _ in range(count):
            first = echo.same.remote(array)
            assert echo.same.remote(first).result(timeout_s=30)[-1] == 1.0
            echo.same.remote(array)  # nobody reads it

    rounds(50)
    before = resident_kib()
    rounds(500)  # more than a GiB in each direction
    assert resident_kib() - before < 64 << 10
