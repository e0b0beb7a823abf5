"""Routers of the user's own that fail, without replicas: each request is placed, and the log says which one and why."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rayserve_fast.config import RequestRouterConfig
from rayserve_fast.controlplane.spec import DeploymentID, ReplicaID
from rayserve_fast.request_router import PendingRequest, RequestMetadata, RequestRouter
from rayserve_fast.routing import Routers, Told

DEPLOYMENT = DeploymentID("D", "app")
TOLD: list[Told] = [(replica, "node", None, True, True, 0, 5, [], None, None) for replica in ("r1", "r2")]


class Uncertain(RequestRouter):
    """Returns or raises what the request says."""

    def initialize_state(self, *, fails: str = "") -> None:
        self.fails = fails
        if fails == "initialize_state":
            raise OSError("no state today")

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        said = pending_request.args[0]
        return said(candidate_replicas) if callable(said) else said

    def update_replicas(self, replicas: Any) -> None:
        if self.fails == "update_replicas":
            raise OSError("no news today")

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        if self.fails == "on_request_routed":
            raise OSError("no thanks")


@pytest.fixture
def routers() -> Any:
    routers = Routers("node")
    yield routers
    routers.loop.call_soon_threadsafe(routers.loop.stop)


def place(routers: Routers, said: Any, fails: str = "") -> tuple[str | None, list[list[str]]]:
    """The replica that gets a request for which the router says so, and what was offered to it."""
    config = RequestRouterConfig(request_router_class=Uncertain, request_router_kwargs={"fails": fails})
    offered: list[list[str]] = []

    def assign(ranks: list[list[str]]) -> str | None:
        offered.extend(ranks)
        return next((replica for rank in ranks for replica in rank), None)

    pending = PendingRequest([said], {}, RequestMetadata("id", "id"))
    coming = routers.submit(routers.place(DEPLOYMENT.key, lambda: (TOLD, config.plain()["custom"]), pending, assign))
    _, replica_id = coming.result(timeout=10)
    assert replica_id == ReplicaID(replica_id.unique_id, DEPLOYMENT)
    return replica_id.unique_id, offered


def test_what_it_ranks_is_tried_in_order(routers: Routers, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        assert place(routers, lambda replicas: ([], (replicas[1],))) == ("r2", [[], ["r2"]])
    assert not caplog.records


@pytest.mark.parametrize("nonsense", [[["x"]], ["r1"], [[None]], None, 3, "r1", [3], lambda replicas: replicas])
def test_nonsense_is_told_and_any_replica_takes_the_request(
    routers: Routers, caplog: pytest.LogCaptureFixture, nonsense: Any
) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        assert place(routers, nonsense) == ("r1", [["r1", "r2"]])
    (record,) = caplog.records
    assert f"Uncertain.choose_replicas of the request router of {DEPLOYMENT} failed" in record.message
    assert "must return lists of RunningReplica, the best first, not" in record.message


@pytest.mark.parametrize(
    ("fails", "text"),
    [
        ("initialize_state", "cannot be made, any replica may do: OSError('no state today')"),
        ("update_replicas", "failed: OSError('no news today')"),
        ("on_request_routed", "failed: OSError('no thanks')"),
    ],
)
def test_a_method_that_raises_is_told_and_costs_no_request(
    routers: Routers, caplog: pytest.LogCaptureFixture, fails: str, text: str
) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        assert place(routers, lambda replicas: [replicas], fails)[0] == "r1"
    (record,) = caplog.records
    assert str(DEPLOYMENT) in record.message
    assert text in record.message
