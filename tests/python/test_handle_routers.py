"""Calls of handles whose replica a router of the user's own chooses."""

from __future__ import annotations

from typing import Any

from scripted_replica import Cluster, Replicas, connecting, replicas  # noqa: F401 - fixtures

from rayserve_fast.config import RequestRouterConfig
from rayserve_fast.request_router import ReplicaID, RequestRouter

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
