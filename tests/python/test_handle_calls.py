"""Calls from a driver over real sockets: answers, waiting, errors, many at once. The replica's frames are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from ray.exceptions import GetTimeoutError, RayTaskError
from scripted_replica import (  # noqa: F401 - fixtures
    FAST,
    TOKEN,
    Call,
    Cluster,
    Replicas,
    connecting,
    replicas,
    silent,
)

from rayserve_fast import caller, values
from rayserve_fast.exceptions import (
    RayServeException,
    RequestCancelledError,
)
from rayserve_fast.handle import DeploymentHandle, DeploymentResponse, new_request_id


def test_a_call_brings_arguments_there_and_the_answer_back(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply((call.method, call.args, call.kwargs)))))
    assert handle.remote(1, "a", key=b"x").result() == ("__call__", (1, "a"), {"key": b"x"})
    assert handle.predict.remote().result() == ("predict", (), {})
    assert handle.options(method_name="other").remote().result(timeout_s=5)[0] == "other"


def test_a_large_array_comes_back_whole_and_writable(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply(call.args[0] * 2))))
    array = np.arange(2_000_000, dtype=np.int32)  # far above any socket buffer
    doubled = handle.remote(array).result(timeout_s=30)
    np.testing.assert_array_equal(doubled, array * 2)
    doubled[0] = 1


def test_the_answer_is_the_same_whenever_it_is_asked_for(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply([1]))))
    response = handle.remote()
    first = response.result()
    assert response.result() is first

    async def awaited() -> Any:
        return await response

    assert asyncio.run(awaited()) is first


def test_remote_sends_at_once_even_if_nobody_waits(replica: Replicas, connect: Any) -> None:
    server = replica()
    handle = connect(Cluster(server))
    handle.remote("warm").result()
    server.calls.get(timeout=5)
    handle.remote("dropped")
    gc.collect()
    assert server.calls.get(timeout=5).args == ("dropped",)


def test_calls_beyond_the_limit_start_without_anybody_waiting(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=2)
    handle = connect(Cluster(server, max_ongoing_requests=2))
    for i in range(6):
        handle.remote(i)
    started = [server.calls.get(timeout=5) for _ in range(2)]
    with pytest.raises(queue.Empty):  # the limit holds
        server.calls.get(timeout=0.05)
    for call in started:
        call.reply(None)
    assert {server.calls.get(timeout=5).args[0] for _ in range(2)} == {2, 3}


def test_a_fast_replica_is_given_a_backlog(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))
    first = handle.remote()
    server.calls.get(timeout=5).reply(None, flags=FAST)
    first.result()
    for i in range(40):
        handle.remote(i)
    assert [server.calls.get(timeout=5).args[0] for _ in range(33)] == list(range(33))
    assert server.calls.empty()


def test_result_times_out_and_the_call_goes_on(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    response = handle.remote()
    call = server.calls.get(timeout=5)
    with pytest.raises(GetTimeoutError, match=r"D\.__call__"):
        response.result(timeout_s=0.05)
    call.reply("late")
    assert response.result(timeout_s=5) == "late"


def test_waiting_burns_no_cpu(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(silent)))
    response = handle.remote()
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.3)  # the link is up by now
    before = time.process_time()
    with pytest.raises(TimeoutError):
        response.result(timeout_s=1)
    assert time.process_time() - before < 0.1


def test_ctrl_c_reaches_a_thread_that_waits(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    response = handle.remote()
    call = server.calls.get(timeout=5)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        response.result()
    assert time.monotonic() - began < 5
    call.reply("after all")
    assert response.result() == "after all"


def test_ctrl_c_reaches_the_main_thread_while_another_reads(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    reading = threading.Thread(target=handle.remote("read").result)
    reading.start()
    call = server.calls.get(timeout=5)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        handle.remote("follow").result()
    call.reply(None)
    reading.join(5)
    assert not reading.is_alive()


def test_threads_share_a_handle_and_each_gets_its_own_answer(replica: Replicas, connect: Any) -> None:
    servers = [replica(max_ongoing=100) for _ in range(3)]
    handle = connect(Cluster(*servers, max_ongoing_requests=100))

    def work(thread: int) -> bool:
        return all(handle.remote(thread, i).result(timeout_s=20) == (thread, i) for i in range(200))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    counts = [server.calls.qsize() for server in servers]
    assert min(counts) > 3200 / 3 * 0.5, f"the least loaded is picked: {counts}"


def test_answers_come_to_whoever_asks_in_any_order(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(max_ongoing=100), max_ongoing_requests=100))
    responses = [handle.remote(i) for i in range(500)]
    assert [r.result(timeout_s=10) for r in reversed(responses)] == [(i,) for i in reversed(range(500))]


def test_await_works_on_any_loop_beside_threads(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(max_ongoing=100), max_ongoing_requests=100))

    async def many(base: int) -> list[Any]:
        return await asyncio.gather(*(handle.remote(base + i) for i in range(50)))

    async def one_by_one() -> list[Any]:
        return [await handle.remote(i) for i in range(50)]

    def threads() -> list[Any]:
        return [handle.remote(i).result(timeout_s=20) for i in range(200)]

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(threads), pool.submit(asyncio.run, many(1000)), pool.submit(asyncio.run, one_by_one())]
        assert asyncio.run(many(0)) == [(i,) for i in range(50)]
        assert others[0].result(30) == [(i,) for i in range(200)]
        assert others[1].result(30) == [(1000 + i,) for i in range(50)]
        assert others[2].result(30) == [(i,) for i in range(50)]


def test_a_cancelled_await_leaves_the_call_alone(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))

    async def wait() -> Any:
        response = handle.remote()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(response), 0.1)
        server.calls.get(timeout=5).reply("still here")
        return await asyncio.wait_for(_awaited(response), 5)

    assert asyncio.run(wait()) == "still here"


async def _awaited(response: DeploymentResponse) -> Any:
    return await response


def test_result_on_a_loops_thread_is_refused(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica()))

    async def wrong() -> None:
        handle.remote().result()

    with pytest.raises(RuntimeError, match="Use `await response` instead"):
        asyncio.run(wrong())


class Custom(ValueError):
    pass


def test_the_users_exception_arrives_with_its_type_and_traceback(replica: Replicas, connect: Any) -> None:
    def fail(call: Call) -> None:
        try:
            raise Custom("bad")
        except Custom as error:
            call.fail(2, values.dump_error(error, "D.__call__"))

    response = connect(Cluster(replica(fail))).remote()
    for _ in range(2):
        with pytest.raises(Custom, match="in fail") as raised:
            response.result()
        assert isinstance(raised.value, RayTaskError)


@pytest.mark.parametrize(
    ("fault", "error"),
    [(1, RayServeException), (4, RequestCancelledError), (5, TimeoutError), (6, RayServeException), (7, TypeError)],
)
def test_each_fault_has_its_exception(replica: Replicas, connect: Any, fault: int, error: type[Exception]) -> None:
    handle = connect(Cluster(replica(lambda call: call.fail(fault, "für".encode()))))
    with pytest.raises(error):
        handle.remote().result(timeout_s=5)


def test_unpicklable_arguments_are_told_by_the_response(replica: Replicas, connect: Any) -> None:
    response = connect(Cluster(replica())).remote(threading.Lock())
    with pytest.raises(TypeError, match=r"arguments of 'D\.__call__' cannot be pickled"):
        response.result()


def test_ten_thousand_calls_leave_nothing_behind(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(lambda call: call.reply(None), max_ongoing=100), max_ongoing_requests=100))
    descriptors = None
    for _ in range(20):
        responses = [handle.remote(b"x" * 1000) for _ in range(500)]
        for response in responses:
            response.result(timeout_s=20)
        descriptors = descriptors or len(os.listdir("/proc/self/fd"))
    counters = caller.current().client.counters()
    assert counters["outstanding"] == counters["attended"] == 0
    assert len(os.listdir("/proc/self/fd")) <= descriptors, "what earlier tests left may go meanwhile"


def test_a_storm_of_cancels_ends_clean(replica: Replicas, connect: Any) -> None:
    def answer(call: Call) -> None:
        call.reply(None, flags=FAST)

    server = replica(answer, max_ongoing=10)
    handle = connect(Cluster(server, max_ongoing_requests=10))
    outcomes = []

    def storm(seed: int) -> None:
        for i in range(300):
            response = handle.remote(i)
            if (i * seed) % 3:
                response.cancel()
            try:
                response.result(timeout_s=20)
                outcomes.append("answered")
            except RequestCancelledError:
                outcomes.append("cancelled")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storm, range(1, 9)))
    assert set(outcomes) == {"answered", "cancelled"}
    assert handle.remote().result(timeout_s=5) is None
    assert caller.current().client.counters()["outstanding"] == 0


def test_a_forked_child_has_its_own_links_and_leaves_the_parents_alone(replica: Replicas, connect: Any) -> None:
    server = replica()
    cluster = Cluster(server)
    handle = connect(cluster)
    pending = handle.remote("parent")
    pid = os.fork()
    if pid == 0:
        try:
            with contextlib.suppress(RuntimeError):
                pending.result(timeout_s=1)
                os._exit(2)
            caller._set(caller.Caller("n", TOKEN, cluster))
            os._exit(0 if handle.remote("child").result(timeout_s=10) == ("child",) else 1)
        except BaseException:
            os._exit(3)
    assert os.waitpid(pid, 0)[1] == 0
    assert pending.result(timeout_s=5) == ("parent",)
    assert handle.remote("again").result(timeout_s=5) == ("again",)


def test_handles_pickle_to_their_names_and_options() -> None:
    handle = DeploymentHandle("D", "app").options(method_name="m", session_id="s")
    again = pickle.loads(pickle.dumps(handle))
    assert (again.deployment_name, again.app_name) == ("D", "app")
    assert again._options == handle._options
    assert repr(again) == "DeploymentHandle(deployment='D')"


def test_options_of_a_handle_hold_for_its_methods() -> None:
    handle = DeploymentHandle("D", "app")
    assert handle.predict is handle.predict
    named = handle.options(session_id="s")
    assert (named.predict._options.session_id, handle.predict._options.session_id) == ("s", "")
    assert named.predict._options.method_name == "predict"


@pytest.mark.parametrize("option", ["method_name", "multiplexed_model_id", "session_id"])
def test_an_option_that_must_be_text_is_named(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be a str, got 3"):
        DeploymentHandle("D", "app").options(**{option: 3})  # type: ignore[arg-type]


USES: dict[str, Callable[[DeploymentHandle], object]] = {
    "_init": lambda handle: handle._init(),
    "options": lambda handle: handle.options(stream=True),
    "a method": lambda handle: handle.predict,
    "a call": lambda handle: handle.remote(),
    "a choice": lambda handle: handle.choose_replica(),
}


@pytest.mark.parametrize("use", USES)
def test_a_handle_is_initialized_once_and_before_it_is_used(use: str, replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica()))
    assert not handle.is_initialized
    USES[use](handle)
    again = pickle.loads(pickle.dumps(handle))
    for late in (handle, handle.options()):
        assert late.is_initialized
        with pytest.raises(RuntimeError, match="already been initialized"):
            late._init(_prefer_local_routing=True)
    assert not again.is_initialized, "what travels is another handle"
    with pytest.raises(TypeError, match="_prefer_node"):
        again._init(_prefer_node=True)
    again._init(_prefer_local_routing=True, _source="?", _run_router_in_separate_loop=False)
    assert again.predict._options._prefer_local_routing


def test_request_ids_are_random_uuids() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(uuid.UUID(each).version == 4 and uuid.UUID(each).variant == uuid.RFC_4122 for each in ids)


def test_a_handle_is_no_container_and_no_callable() -> None:
    handle = DeploymentHandle("D", "app")
    for wrong in (lambda: handle(), lambda: len(handle), lambda: handle["x"], lambda: handle.__wrapped__):
        with pytest.raises((TypeError, AttributeError)):
            wrong()


def test_responses_cannot_be_pickled_nor_options_invented(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica()))
    with pytest.raises(RayServeException, match="not serializable"):
        pickle.dumps(handle.remote())
    with pytest.raises(TypeError):
        handle.options(no_such_option=1)
