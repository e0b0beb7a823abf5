"""Asks replicas for their routing stats, and has what is new told to the routers.

Only replicas whose object has the method are asked, each by one task for as long as it serves, never twice at once. A
snapshot wakes every proxy and every process with handles, so none is made for what has not changed, and what several
replicas say at nearly the same time goes in one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayserve_fast.controlplane.state import Deployment, Replica

logger = logging.getLogger("ray.serve")

#: How long what one replica has said waits for what others say, seconds.
TOGETHER_S = 0.1


class RoutingStats:
    """What replicas say of themselves, over and over.

    Args:
        publish: makes a snapshot and sends it.
    """

    def __init__(self, publish: Callable[[], object]) -> None:
        self._publish = publish
        self._publishing: asyncio.TimerHandle | None = None

    async def follow(self, d: Deployment, r: Replica, ask: Callable[[], Awaitable[str | None]]) -> None:
        """Ask the replica every `request_routing_stats_period_s` of its deployment, until it is to stop.

        Args:
            ask: asks it once.
        """
        loop = asyncio.get_running_loop()
        while r.state != "STOPPING":
            began = loop.time()
            await self._ask(d, r, ask)
            await asyncio.sleep(max(0.0, began + _setting(d, "period") - loop.time()))

    async def _ask(self, d: Deployment, r: Replica, ask: Callable[[], Awaitable[str | None]]) -> None:
        asked = asyncio.ensure_future(ask())
        try:
            limit = _setting(d, "timeout")
            await asyncio.wait([asked], timeout=limit)
            if not asked.done():
                logger.warning(f"record_routing_stats of replica {r.id} of {d.key} takes longer than {limit:g} s.")
                await asyncio.wait([asked])  # calls must not pile up there, but what comes so late does not count
                asked.exception()
            elif asked.exception() is not None:
                logger.warning(f"record_routing_stats of replica {r.id} of {d.key} failed: {asked.exception()}")
            elif (said := asked.result()) not in (None, r.routing_stats):
                r.routing_stats = said
                self._publish_soon()
        finally:
            asked.cancel()

    def _publish_soon(self) -> None:
        if self._publishing is None:
            self._publishing = asyncio.get_running_loop().call_later(TOGETHER_S, self._publish_now)

    def _publish_now(self) -> None:
        self._publishing = None
        self._publish()


def _setting(d: Deployment, name: str) -> float:
    router = d.spec.config.request_router_config
    assert router is not None, "the options of a deployment have a router"
    seconds: float = router[f"request_routing_stats_{name}_s"]
    return seconds
