"""The part of the controller that takes orders about traffic and endpoints.

An order changes a copy, which is persisted and only then takes the place of what was in force: one that is refused, or
cannot be saved, has changed nothing. It returns when every proxy that listens has the new snapshot, or after
`CONFIRM_S`: a proxy that does not confirm in time gets it as soon as it is heard of again.

Ray repeats a call whose controller died. The last orders are persisted with what they changed, so that one that had
been carried out is not refused the second time, as "already registered", but only waits for the proxies again.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from rayserve_fast.controlplane import snapshot, store
from rayserve_fast.controlplane.figures import (
    Reading,
    RouteTraffic,
    of_targets,
    shadow_traffic,
    target_traffic,
    total,
)
from rayserve_fast.controlplane.proxies import Fleet, within
from rayserve_fast.controlplane.state import Application
from rayserve_fast.controlplane.traffic import Split, Traffic

#: How long an order waits for the proxies to have it.
CONFIRM_S = 2.0
#: So many orders are remembered: more than can wait at the moment when a controller dies.
REMEMBERED = 256


class TrafficOrders:
    """Methods of the controller actor; the attributes are the controller's."""

    _apps: dict[str, Application]
    _fleet: Fleet
    _traffic: Traffic
    _recovered: asyncio.Event

    def publish(self) -> list[Any]:
        """Build a new snapshot and send it to the proxies; the futures end when they have it."""
        raise NotImplementedError

    async def set_traffic(
        self,
        name: str,
        weights: Mapping[str, float],
        sticky: Mapping[str, str] | None = None,
        rules: Sequence[Mapping[str, str | None]] = (),
    ) -> None:
        """Give a route or an endpoint its targets. Raises what `Traffic.assign` raises."""
        await self._order(name, lambda traffic: traffic.assign(name, weights, sticky, rules, self._apps))

    async def shadow_traffic(self, name: str, target: str, share: float) -> None:
        """Copy a share of the requests to one more target. Raises what `Traffic.shadow` raises."""
        await self._order(name, lambda traffic: traffic.shadow(name, target, share, self._apps))

    async def delete_traffic(self, route: str) -> None:
        """Forget the targets of a route. Raises what `Traffic.remove` raises."""
        await self._order(route, lambda traffic: traffic.remove(route))

    async def traffic(self, name: str | None = None) -> dict[str, RouteTraffic]:
        """Targets and counts of one route or endpoint, or of all. Raises what `Traffic.split` raises."""
        await self._recovered.wait()
        splits = list(self._traffic.splits.values()) if name is None else [self._traffic.split(name)]
        reading = await self._fleet.traffic()
        return {split.name: self._figures(split, reading) for split in splits}

    async def create_endpoint(
        self,
        name: str,
        route: str | None = None,
        methods: Sequence[str] = ("GET",),
        traffic: Mapping[str, float] | None = None,
    ) -> None:
        """Register an endpoint, with these weights if given. Raises what `Traffic.create_endpoint` raises."""
        await self._order(name, lambda held: held.create_endpoint(name, route, methods, traffic, self._apps))

    async def delete_endpoint(self, name: str) -> None:
        """Forget an endpoint; its backends stay. Raises ValueError if there is none of that name."""
        await self._order(name, lambda traffic: traffic.delete_endpoint(name))

    async def endpoints(self) -> dict[str, dict[str, Any]]:
        """Each endpoint's `route` (None: handles only), `methods`, `traffic` (weights) and `shadows` (shares)."""
        await self._recovered.wait()
        return {
            name: {
                "route": endpoint.route,
                "methods": list(endpoint.methods),
                "traffic": dict(self._traffic.splits[name].weights),
                "shadows": dict(self._traffic.splits[name].shadows),
            }
            for name, endpoint in self._traffic.endpoints.items()
        }

    def _figures(self, split: Split, reading: Reading) -> RouteTraffic:
        tallies = of_targets(reading, split.name).values()
        rollout = self._traffic.rollouts.get(split.name)
        return RouteTraffic(
            name=split.name,
            targets={
                target: target_traffic(weight, self._ready(target), total(t[target] for t in tallies if target in t))
                for target, weight in split.weights.items()
            },
            shadows={
                target: shadow_traffic(reading, split.name, target, share, self._ready(target))
                for target, share in split.shadows.items()
            },
            sticky=split.sticky,
            rules=split.rules,
            rollout=rollout.state if rollout else None,
        )

    def _ready(self, target: str) -> int:
        app = self._apps.get(target)
        return len(app.deployments[app.routed].among("RUNNING")) if app else 0

    async def _order(self, name: str, change: Callable[[Traffic], object]) -> None:
        """Carry out what a driver asked for the split or endpoint of this name, once, and wait for the proxies."""
        await self._recovered.wait()
        call = ray.get_runtime_context().get_task_id()  # a repeated call has the id of the first

        def once(traffic: Traffic) -> None:
            change(traffic)
            traffic.orders = [*traffic.orders[1 - REMEMBERED :], call]

        if call not in self._traffic.orders:
            self._change(name, once)
        await self._confirmed()

    def _change(self, name: str, change: Callable[[Traffic], object]) -> None:
        """Change what is in force, if the change is allowed, can be read by the proxies and can be saved."""
        changed = copy.deepcopy(self._traffic)
        change(changed)
        snapshot.check(f"The change of the traffic of {name!r}", self._apps, changed)
        store.save_traffic(changed)
        self._traffic = changed

    async def _confirmed(self) -> None:
        await within(CONFIRM_S, self.publish())
