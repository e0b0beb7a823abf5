"""What handles do when the replica of a batch refuses it, gives it back or dies, with replicas that a test scripts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import scripted_replica as wire
from ray.exceptions import ActorDiedError
from scripted_replica import (  # noqa: F401 - fixtures
    Call,
    Cluster,
    Replicas,
    ScriptedReplica,
    connecting,
    replicas,
    silent,
)

BATCH = {"max_size": 8, "wait_s": 0.1, "concurrent": 1}


def batch(replica: ScriptedReplica, count: int) -> tuple[list[Call], int]:
    """The calls of the next batch, and the flags of its BATCH."""
    calls = [replica.calls.get(timeout=10) for _ in range(count)]
    streams, flags = replica.batches.get(timeout=10)
    assert [call.stream for call in calls] == streams
    assert all(call.flags & wire.BATCHED and not call.flags & wire.GRANTED for call in calls)
    return calls, flags


def test_a_batch_goes_in_one_go_and_its_calls_are_answered_in_any_order(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server, batch=BATCH))
    waiting = [handle.remote(n) for n in range(3)]
    calls, flags = batch(server, 3)
    assert not flags & wire.GRANTED
    for call in reversed(calls):
        call.reply(call.args[0] * 10)
    assert [response.result(timeout_s=10) for response in waiting] == [0, 10, 20]


def test_a_refused_batch_goes_again_with_its_credit(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server, batch=BATCH))
    waiting = [handle.remote(n) for n in range(3)]
    refused, _ = batch(server, 3)
    for call in refused:
        call.send(wire.BUSY, flags=wire.FIN, load=1)
    with pytest.raises(TimeoutError):
        waiting[0].result(timeout_s=0.1)
    assert server.calls.empty()
    refused[0].link.send(wire.CREDIT, aux=1)
    calls, flags = batch(server, 3)
    assert flags & wire.GRANTED
    assert [call.args for call in calls] == [(0,), (1,), (2,)]
    for call in calls:
        call.reply("done")
    assert [response.result(timeout_s=10) for response in waiting] == ["done"] * 3


def test_a_returned_batch_goes_to_another_replica(replica: Replicas, connect: Any) -> None:
    leaving, staying = replica(silent), replica(silent)
    cluster = Cluster(leaving, batch=BATCH)
    handle = connect(cluster)
    waiting = [handle.remote(n) for n in range(2)]
    calls, _ = batch(leaving, 2)
    cluster.publish(leaving, staying)
    calls[0].link.send(wire.DRAIN)
    for call in calls:
        call.send(wire.RETURNED, flags=wire.FIN)
    calls, _ = batch(staying, 2)
    for call in calls:
        call.reply("moved")
    assert [response.result(timeout_s=10) for response in waiting] == ["moved"] * 2


def test_a_replica_that_dies_fails_the_calls_of_its_batch_and_no_others(replica: Replicas, connect: Any) -> None:
    dying, successor = replica(silent), replica(silent)
    cluster = Cluster(dying, batch=BATCH)
    handle = connect(cluster)
    begun = [handle.remote(n) for n in range(2)]
    batch(dying, 2)
    waits = handle.remote("waits")
    cluster.publish(successor)
    dying.die()
    for response in begun:
        with pytest.raises(ActorDiedError):
            response.result(timeout_s=10)
    calls, _ = batch(successor, 1)
    calls[0].reply("served")
    assert waits.result(timeout_s=10) == "served"


def test_one_call_of_a_batch_is_cancelled_alone_and_keeps_the_slot(replica: Replicas, connect: Any) -> None:
    server = replica(silent)
    handle = connect(Cluster(server, batch=BATCH))
    waiting = [handle.remote(n) for n in range(2)]
    calls, _ = batch(server, 2)
    waiting[0].cancel()
    assert server.frames.get(timeout=10)[:2] == (wire.CANCEL, calls[0].stream)
    later = handle.remote("later")
    calls[1].reply("alone")
    assert waiting[1].result(timeout_s=10) == "alone"
    with pytest.raises(TimeoutError):
        later.result(timeout_s=0.3)
    calls[0].fail(4, b"")
    calls, _ = batch(server, 1)
    calls[0].reply("later")
    assert later.result(timeout_s=10) == "later"


def test_the_window_of_calls_that_nobody_waits_for_ends_also_if_a_chosen_replica_was_released_meanwhile(
    replica: Replicas, connect: Any
) -> None:
    server = replica(silent, max_ongoing=1)
    handle = connect(Cluster(server, batch={"max_size": 8, "wait_s": 0.6, "concurrent": 1}))

    async def main() -> None:
        async with handle.choose_replica():
            handle.remote("waits")
            await asyncio.sleep(0.3)  # the tender has the turn by now, and nothing to come back for
            assert server.calls.empty()

    asyncio.run(main())
    batch(server, 1)
