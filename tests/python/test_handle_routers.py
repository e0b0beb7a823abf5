"""Calls of handles whose replica a router of the user's own chooses."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import pytest
from deployed import wait_for
from scripted_replica import (  # noqa: F401 - fixtures
    BUSY,
    CREDIT,
    FIN,
    RESULT,
    Call,
    Cluster,
    Replicas,
    connecting,
    replicas,
    silent,
)
from wire_client import value_bytes

from rayserve_fast import caller, values
from rayserve_fast.config import RequestRouterConfig
from rayserve_fast.request_router import ReplicaID, RequestRouter

ITEM = 33


class Anybody(RequestRouter):
    """Every replica will do; notes whose requests have ended."""

    def initialize_state(self) -> None:
        self.done: list[str] = []

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        return [candidate_replicas]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.done.append(internal_request_id)


ANYBODY = RequestRouterConfig(request_router_class=Anybody).plain()
ROUTER = {key: ANYBODY[key] for key in ("policy", "custom")}


def test_a_call_that_ends_before_its_router_is_asked_keeps_no_other_from_it(replica: Replicas, connect: Any) -> None:
    handle = connect(Cluster(replica(), router=ROUTER))
    assert handle.remote(0).result(timeout_s=10) == (0,)
    for i in range(100):  # the tender is quicker now and then
        gone, stays = handle.remote(), handle.remote(i)
        gone.cancel()
        assert stays.result(timeout_s=5) == (i,)


def test_a_call_that_comes_back_finds_its_router_again_also_if_nobody_waits_for_it(
    replica: Replicas, connect: Any
) -> None:
    server = replica(silent)
    connect(Cluster(server, router=ROUTER)).remote("dropped")
    refused = server.calls.get(timeout=10)
    time.sleep(0.2)  # the tender has the turn by now
    refused.send(BUSY, flags=FIN)
    refused.link.send(CREDIT, aux=1)
    assert server.calls.get(timeout=5).args == ("dropped",)


def test_a_call_is_shown_to_its_router_at_once_also_while_the_tender_attends_another(
    replica: Replicas, connect: Any
) -> None:
    def answer(call: Call) -> None:
        if call.args:
            call.reply(None)

    server = replica(answer)
    handle = connect(Cluster(server, router=ROUTER))
    handle.remote()
    server.calls.get(timeout=10)
    took = [1.0]
    while min(took) >= 0.009 and len(took) < 50:  # a busy machine may hold some of them up
        time.sleep(0.05)  # the tender has the turn by now
        began = time.monotonic()
        handle.remote("shown").result(timeout_s=5)
        took.append(time.monotonic() - began)
    assert min(took) < 0.009, "less than the tender's patience"


def items(call: Call) -> None:
    for i in range(3):
        call.send(ITEM, payload=value_bytes(values.dumps(i)[0], []))
    call.send(RESULT, flags=FIN)


def test_the_items_of_a_stream_wait_for_who_takes_them_when_its_router_has_heard_of_its_end(
    replica: Replicas, connect: Any
) -> None:
    handle = connect(Cluster(replica(items), router=ROUTER))
    stream = handle.options(stream=True).remote()
    routers = caller.current().routers
    wait_for(lambda: "app#D" in routers._customs, 10)
    router: Any = routers._customs["app#D"].router
    wait_for(lambda: stream.request_id in router.done, 10)
    routers.submit(asyncio.sleep(0)).result(timeout=5)  # whoever has told it is done with the call
    assert list(stream) == [0, 1, 2]


class GivesUp(RequestRouter):
    """Ends each choice by what is no `Exception`."""

    def initialize_state(self, error: str) -> None:
        self.error = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}.get(
            error, asyncio.CancelledError
        )

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error", [*(["CancelledError"] * (sys.version_info >= (3, 11))), "SystemExit", "KeyboardInterrupt"]
)
def test_whatever_a_router_raises_its_calls_are_made(replica: Replicas, connect: Any, error: str) -> None:
    gives_up = RequestRouterConfig(request_router_class=GivesUp, request_router_kwargs={"error": error}).plain()
    handle = connect(Cluster(replica(), router={key: gives_up[key] for key in ("policy", "custom")}))
    for i in range(2):
        assert handle.remote(i).result(timeout_s=10) == (i,)
