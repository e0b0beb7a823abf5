"""`choose_replica` while replicas and their deployment go, with a replica whose snapshots the test decides."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from deployed import wait_for
from scripted_replica import Cluster, Replicas, connecting, replicas  # noqa: F401 - fixtures

from rayserve_fast import caller
from rayserve_fast.config import RequestRouterConfig
from rayserve_fast.exceptions import DeploymentUnavailableError
from rayserve_fast.request_router import RequestRouter


class Anybody(RequestRouter):
    """A router of the user's own that minds nothing."""

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        return [candidate_replicas]


class Forgetful(Cluster):
    """Knows no deployment any more once it is told to `forget`."""

    forgotten = False

    def forget(self) -> None:
        self.forgotten = True
        self.push()

    def present(self) -> bytes:
        return json.dumps({"version": [1, self.version]}).encode() if self.forgotten else super().present()


OWN = {"policy": "custom", "custom": RequestRouterConfig(request_router_class=Anybody).plain()["custom"]}


@pytest.mark.parametrize("router", [{"policy": "least_loaded"}, OWN], ids=["built-in", "own"])
@pytest.mark.parametrize("failed", [True, False])
def test_a_choice_that_waits_for_a_slot_ends_with_its_deployment(
    replica: Replicas, connect: Any, router: dict[str, str], failed: bool
) -> None:
    cluster = Forgetful(replica(max_ongoing=1), max_ongoing_requests=1, router=router)
    handle = connect(cluster)

    async def main() -> None:
        async with handle.choose_replica():
            waiting = asyncio.ensure_future(handle.choose_replica().__aenter__())
            assert not (await asyncio.wait([waiting], timeout=0.2))[0]
            if failed:
                cluster.config["unavailable"] = "It has failed to deploy."
                cluster.publish()
            else:
                cluster.forget()
            with pytest.raises(DeploymentUnavailableError, match="failed to deploy" if failed else "was deleted"):
                await asyncio.wait_for(waiting, 10)

    asyncio.run(main())


class Late:
    """A chooser whose replica has left by the time that its slot is reserved."""

    def __init__(self, chooser: Any, cluster: Cluster) -> None:
        self._chooser, self._cluster = chooser, cluster

    def replicas(self, deployment: str) -> Any:
        return self._chooser.replicas(deployment)

    def reserve(self, deployment: str, *wishes: Any) -> Any:
        reservation = self._chooser.reserve(deployment, *wishes)
        if reservation is not None:
            self._cluster.publish()
            wait_for(lambda: self.replicas(deployment) == ([], None))
        return reservation


def test_what_is_known_of_a_chosen_replica_outlives_its_leaving(replica: Replicas, connect: Any) -> None:
    leaving = replica()
    cluster = Cluster(leaving)
    handle = connect(cluster)
    owner: Any = caller.current()
    owner.chooser = Late(owner.chooser, cluster)

    async def main() -> None:
        async with handle.choose_replica() as selection:
            assert (selection.replica_id, selection.node_id) == (leaving.id, "n")

    asyncio.run(main())
