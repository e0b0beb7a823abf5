"""Calls from a driver over real sockets: answers, waiting, refusals, deaths. The replica's frames are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from scripted_replica import (
    BUSY,
    CANCEL,
    CREDIT,
    DRAIN,
    FAST,
    GRANTED,
    PING,
    PONG,
    RETURNED,
    TOKEN,
    UNUSED,
    Call,
    Cluster,
    ScriptedReplica,
)
from worker_replica import TOKEN as WORKER_TOKEN, serving

from rayserve_fast import caller, values
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.spec import DeploymentID
from rayserve_fast.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from rayserve_fast.handle import DeploymentHandle, DeploymentResponse, new_request_id

Replicas = Callable[..., ScriptedReplica]


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replicas]:
    made: list[ScriptedReplica] = []

    def make(handler: Callable[[Call], None] | None = None, **options: Any) -> ScriptedReplica:
        made.append(ScriptedReplica(tmp_path, f"r{len(made)}", handler, **options))
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(OSError):
            each.die()


@pytest.fixture
def connect() -> Iterator[Callable[[Cluster], DeploymentHandle]]:
    def to(cluster: Cluster) -> DeploymentHandle:
        caller._set(caller.Caller("n", TOKEN, cluster))
        return DeploymentHandle("D", "app")

    yield to
    caller.reset()


def silent(call: Call) -> None:
    """Takes a call and never answers."""


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
    time.sleep(0.05)
    assert server.calls.empty(), "the limit holds"
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
    with pytest.raises(TimeoutError, match=r"D\.__call__"):
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


def test_a_begun_call_whose_replica_dies_raises_and_the_next_goes_elsewhere(replica: Replicas, connect: Any) -> None:
    dying, spare = replica(silent), replica()
    cluster = Cluster(dying)
    handle = connect(cluster)
    response = handle.remote()
    dying.calls.get(timeout=5)
    cluster.publish(spare)
    dying.die()
    with pytest.raises(ActorDiedError, match="r0"):
        response.result(timeout_s=5)
    assert handle.remote("next").result(timeout_s=5) == ("next",)


def test_a_death_right_behind_an_answer_is_noticed(replica: Replicas, connect: Any) -> None:
    dying, spare = replica(silent), replica()
    cluster = Cluster(dying)
    handle = connect(cluster)
    first = handle.remote("warm")
    dying.calls.get(timeout=5).reply("up")
    assert first.result(timeout_s=5) == "up"
    answered, lost = handle.remote(1), handle.remote(2)
    cluster.publish(spare)
    calls = [dying.calls.get(timeout=5) for _ in range(2)]
    calls[0].reply("last word")
    dying.die()  # before anybody has read it
    with pytest.raises(ActorDiedError):
        lost.result(timeout_s=5)
    assert answered.result(timeout_s=5) == "last word"


def test_queued_calls_move_to_another_replica_when_theirs_dies(replica: Replicas, connect: Any) -> None:
    dying, spare = replica(silent, max_ongoing=1), replica()
    cluster = Cluster(dying, max_ongoing_requests=1)
    handle = connect(cluster)
    begun = handle.remote(0)
    dying.calls.get(timeout=5)
    queued = [handle.remote(i) for i in range(1, 5)]
    cluster.publish(spare)
    dying.die()
    assert [r.result(timeout_s=5) for r in queued] == [(i,) for i in range(1, 5)]
    with pytest.raises(ActorDiedError):
        begun.result(timeout_s=5)


def test_a_call_that_was_not_wholly_sent_is_not_begun(replica: Replicas, connect: Any, tmp_path: Path) -> None:
    stuck = threading.Event()

    def block(call: Call) -> None:
        stuck.wait(10)  # the link's thread reads no further

    dying, spare = replica(block), replica()
    cluster = Cluster(dying)
    handle = connect(cluster)
    begun = handle.remote()
    dying.calls.get(timeout=5)
    large = handle.remote(b"x" * 50_000_000)
    cluster.publish(spare)
    dying.die()
    stuck.set()
    assert len(large.result(timeout_s=20)[0]) == 50_000_000
    with pytest.raises(ActorDiedError):
        begun.result(timeout_s=5)


def test_a_draining_replica_gives_back_what_it_held_and_gets_nothing_more(replica: Replicas, connect: Any) -> None:
    leaving, spare = replica(silent), replica()
    cluster = Cluster(leaving)
    handle = connect(cluster)
    running, held = handle.remote("running"), handle.remote("held")
    first, second = leaving.calls.get(timeout=5), leaving.calls.get(timeout=5)
    cluster.publish(leaving, spare)  # the snapshot still lists it; DRAIN outranks that
    first.link.send(DRAIN)
    second.send(RETURNED, flags=1)
    assert held.result(timeout_s=5) == ("held",)
    for i in range(5):
        assert handle.remote(i).result(timeout_s=5) == (i,)
    assert leaving.calls.empty()
    first.reply("finished")
    assert running.result(timeout_s=5) == "finished"


def test_a_refused_call_uses_the_credit_it_is_given(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server))
    response = handle.remote("x")
    server.calls.get(timeout=5).send(BUSY, flags=1)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.1)
    assert server.calls.empty(), "nothing is sent before the credit"
    server.links[0].send(CREDIT, aux=2)
    again = server.calls.get(timeout=5)
    assert again.flags & GRANTED
    assert server.frames.get(timeout=5) == (UNUSED, 0, 1)
    again.reply("served")
    assert response.result(timeout_s=5) == "served"


def test_a_refused_call_goes_to_a_replica_with_room(replica: Replicas, connect: Any) -> None:
    full = replica(lambda call: call.send(BUSY, flags=1, load=5))
    spare = replica()
    cluster = Cluster(full)
    handle = connect(cluster)
    response = handle.remote("x")
    full.calls.get(timeout=5)
    cluster.publish(full, spare)
    full.links[0].send(DRAIN)
    assert response.result(timeout_s=5) == ("x",)


def test_pings_are_answered_while_somebody_waits(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    response = connect(Cluster(server)).remote()
    call = server.calls.get(timeout=5)
    call.link.send(PING, aux=77)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.2)
    assert server.frames.get(timeout=5) == (PONG, 0, 77)


def test_max_queued_requests_refuses_with_back_pressure(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    backpressure = {"status_code": 429, "retry_after_s": 2.0}
    handle = connect(Cluster(server, max_ongoing_requests=1, max_queued_requests=2, backpressure=backpressure))
    handle.remote()
    server.calls.get(timeout=5)
    waiting = [handle.remote() for _ in range(2)]
    with pytest.raises(BackPressureError, match="max_queued_requests=2") as raised:
        handle.remote().result(timeout_s=5)
    assert (raised.value.status_code, raised.value.retry_after_s) == (429, 2.0)
    for response in waiting:
        response.cancel()
    handle.remote()  # there is room again


def test_cancel_ends_a_queued_call_before_it_starts(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))
    handle.remote("first")
    first = server.calls.get(timeout=5)
    response = handle.remote("never")
    response.cancel()
    with pytest.raises(RequestCancelledError, match=response.request_id):
        response.result(timeout_s=5)
    assert response.cancelled()
    handle.remote("third")
    first.reply(None)
    assert server.calls.get(timeout=5).args == ("third",)


def test_cancel_tells_the_replica_and_the_slot_comes_back_with_its_last_frame(replica: Replicas, connect: Any) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, max_ongoing_requests=1))
    response = handle.remote("running")
    running = server.calls.get(timeout=5)
    response.cancel()
    with pytest.raises(RequestCancelledError):
        response.result(timeout_s=5)
    assert server.frames.get(timeout=5) == (CANCEL, running.stream, 0)
    waiting = handle.remote("next")
    time.sleep(0.05)
    assert server.calls.empty()
    running.fail(4, b"")
    server.calls.get(timeout=5).reply("served")
    assert waiting.result(timeout_s=5) == "served"


@pytest.mark.parametrize("waiters", [1, 3])
def test_cancel_wakes_whoever_waits(replica: Replicas, connect: Any, waiters: int) -> None:
    handle = connect(Cluster(replica(silent)))
    with ThreadPoolExecutor(waiters) as pool:  # threads that get no signals, and so sleep as long as they may
        responses = [handle.remote() for _ in range(waiters)]
        waits = [pool.submit(response.result) for response in responses]
        time.sleep(0.2)
        for response, wait in zip(responses, waits, strict=True):
            response.cancel()
            with pytest.raises(RequestCancelledError):
                wait.result(timeout=5)


def test_a_call_to_an_unknown_deployment_is_sorted_out_while_the_tender_attends_another(
    replica: Replicas, connect: Any
) -> None:
    server = replica(silent)
    cluster = Cluster(server)
    handle = connect(cluster)
    handle.remote("nobody waits for this one")
    server.calls.get(timeout=5)
    time.sleep(0.2)  # the tender has the turn by now
    asked = cluster.asked
    dropped = DeploymentHandle("Missing", "app").remote()
    deadline = time.monotonic() + 5
    while cluster.asked == asked and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cluster.asked > asked
    with pytest.raises(DeploymentUnavailableError):
        dropped.result(timeout_s=5)


def test_a_deployment_that_does_not_exist_says_so(replica: Replicas, connect: Any) -> None:
    connect(Cluster(replica()))
    with pytest.raises(DeploymentUnavailableError, match=r"Missing.*does not exist"):
        DeploymentHandle("Missing", "app").remote().result(timeout_s=5)


def test_why_a_deployment_is_unavailable_survives_pickling() -> None:
    error = DeploymentUnavailableError._because(DeploymentID("D", "app"), "it was deleted")
    assert str(pickle.loads(pickle.dumps(error))) == "it was deleted"
    assert "failed to deploy" in str(DeploymentUnavailableError(DeploymentID("D", "app")))


def test_a_deployment_that_failed_to_deploy_says_so(connect: Any) -> None:
    handle = connect(Cluster(unavailable="Deployment D is unavailable because it failed to deploy."))
    with pytest.raises(DeploymentUnavailableError, match="failed to deploy"):
        handle.remote().result(timeout_s=5)


def test_a_call_waits_for_the_first_replica(replica: Replicas, connect: Any) -> None:
    cluster = Cluster()
    response = connect(cluster).remote("early")
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.1)
    cluster.publish(replica())
    assert response.result(timeout_s=10) == ("early",)


def test_a_controller_that_cannot_be_asked_fails_new_calls_in_the_end(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster()
    cluster.crash(ConnectionError("no controller"))
    with pytest.raises(DeploymentUnavailableError, match="no controller"):
        connect(cluster).remote().result(timeout_s=20)


def test_a_call_outwaits_a_controller_that_restarts(replica: Replicas, connect: Any) -> None:
    cluster = Cluster(replica())
    cluster.crash(ConnectionError("no controller"))
    response = connect(cluster).remote(1)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.5)
    cluster.down = None
    assert response.result(timeout_s=5) == (1,)


def test_known_replicas_are_called_while_the_controller_is_away(replica: Replicas, connect: Any) -> None:
    first, second = replica(), replica()
    cluster = Cluster(first)
    handle = connect(cluster)
    handle.remote().result(timeout_s=5)
    cluster.crash(ConnectionError("no controller"))
    for i in range(100):
        assert handle.remote(i).result(timeout_s=5) == (i,)
    cluster.down = None
    cluster.publish(second)
    deadline = time.monotonic() + 10
    while second.calls.empty() and time.monotonic() < deadline:
        handle.remote().result(timeout_s=5)
    assert not second.calls.empty(), "news are heard again"


def test_a_cluster_that_is_gone_ends_its_calls(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    cluster = Cluster(server)
    response = connect(cluster).remote()
    server.calls.get(timeout=5)
    cluster.crash(client.NotRunningError("Serve is gone"))
    with pytest.raises(RayServeException, match="shut down"):
        response.result(timeout_s=5)
    assert not caller.exists(), "the next call finds the next cluster"


def test_new_replicas_are_used_without_being_looked_for(replica: Replicas, connect: Any) -> None:
    first, second = replica(), replica()
    cluster = Cluster(first)
    handle = connect(cluster)
    handle.remote().result(timeout_s=5)
    asked = cluster.asked
    cluster.publish(first, second)
    deadline = time.monotonic() + 5
    while second.calls.empty() and time.monotonic() < deadline:
        handle.remote().result(timeout_s=5)
    assert not second.calls.empty()
    assert cluster.asked == asked + 1, "one answer, to the question that was waiting"


def test_a_replica_with_another_token_is_not_trusted(replica: Replicas, connect: Any) -> None:
    server = replica()
    caller._set(caller.Caller("n", b"another token", Cluster(server)))
    response = DeploymentHandle("D", "app").remote()
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0.3)
    assert server.calls.empty()


@pytest.mark.parametrize(
    ("node_id", "unix"),
    [("elsewhere", "real"), ("n", "/nowhere/r.sock"), ("n", None)],
    ids=["other node", "gone", "none"],
)
def test_a_replica_that_has_no_path_is_reached_by_its_address(connect: Any, node_id: str, unix: str | None) -> None:
    async def double(value: Any) -> Any:
        return value * 2

    with serving(double) as server:
        path = server.address.unix if unix == "real" else unix
        cluster = Cluster()
        cluster.replicas = [{"id": "r1", "node_id": node_id, "unix": path, "tcp": server.address.tcp}]
        caller._set(caller.Caller("n", WORKER_TOKEN, cluster))
        handle = DeploymentHandle("D", "app")
        assert handle.remote(21).result(timeout_s=10) == 42
        large = np.ones(3_000_000)
        np.testing.assert_array_equal(handle.remote(large).result(timeout_s=20), large * 2)


def test_the_first_call_of_a_replica_asks_ray_nothing_on_its_loop(
    replica: Replicas, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(replica())
    asking: list[str] = []

    def next_snapshot(newer_than: Any) -> Any:
        asking.append(threading.current_thread().name)
        return cluster.next(newer_than)

    def present(timeout_s: float) -> bytes:
        asking.append(threading.current_thread().name)
        return cluster.present()

    monkeypatch.setattr(client, "next_snapshot", next_snapshot)
    monkeypatch.setattr(client, "snapshot", present)
    monkeypatch.setattr(client, "cluster_token", lambda: 1 / 0)
    monkeypatch.setattr(caller, "_identity", None)
    caller.introduce("n", TOKEN)

    async def main() -> Any:
        return await DeploymentHandle("D", "app").remote(1)

    assert asyncio.run(main()) == (1,)
    assert set(asking) == {"rayserve-fast-calls"}


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


def test_request_ids_are_random_uuids() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(uuid.UUID(each).version == 4 and uuid.UUID(each).variant == uuid.RFC_4122 for each in ids)


def test_a_handle_is_no_container_and_no_callable() -> None:
    handle = DeploymentHandle("D", "app")
    for wrong in (lambda: handle(), lambda: len(handle), lambda: handle["x"], lambda: handle.__wrapped__):
        with pytest.raises((TypeError, AttributeError)):
            wrong()


def test_what_is_not_there_yet_says_so(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica()))
    with pytest.raises(RayServeException, match="not implemented"):
        handle.options(stream=True).remote()
    with pytest.raises(RayServeException, match="pass its value"):
        handle.remote(handle.remote())
    with pytest.raises(RayServeException, match="not serializable"):
        pickle.dumps(handle.remote())
    with pytest.raises(TypeError):
        handle.options(no_such_option=1)
