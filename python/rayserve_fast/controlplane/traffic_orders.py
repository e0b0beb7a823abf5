"""The part of the controller that takes orders about traffic and endpoints.

An order is checked by `traffic` and taken whole or refused, is persisted, and then published; it returns when every
proxy that listens has the new snapshot, so that who asked may rely on it. A proxy that does not confirm in time is not
waited for: it gets the snapshot as soon as it is heard of again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from rayserve_fast.controlplane import store
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


class TrafficOrders:
    """Methods of the controller actor; the attributes are the controller's."""

    _apps: dict[str, Application]
    _fleet: Fleet
    _traffic: Traffic
    _recovered: asyncio.Event

    def publish(self) -> list[Any]:
        """Build a new snapshot and send it to the proxies; the references tell when they have it."""
        raise NotImplementedError

    async def set_traffic(
        self,
        name: str,
        weights: Mapping[str, float],
        sticky: Mapping[str, str] | None = None,
        rules: Sequence[Mapping[str, str | None]] = (),
    ) -> None:
        """Give a route or an endpoint its targets. Raises what `Traffic.assign` raises."""
        await self._recovered.wait()
        self._traffic.assign(name, weights, sticky, rules, self._apps)
        await self._take_effect()

    async def shadow_traffic(self, name: str, target: str, share: float) -> None:
        """Copy a share of the requests to one more target. Raises what `Traffic.shadow` raises."""
        await self._recovered.wait()
        self._traffic.shadow(name, target, share, self._apps)
        await self._take_effect()

    async def delete_traffic(self, route: str) -> None:
        """Forget the targets of a route. Raises what `Traffic.remove` raises."""
        await self._recovered.wait()
        self._traffic.remove(route)
        await self._take_effect()

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
        await self._recovered.wait()
        self._traffic.create_endpoint(name, route, methods, traffic, self._apps)
        await self._take_effect()

    async def delete_endpoint(self, name: str) -> None:
        """Forget an endpoint; its backends stay. Raises ValueError if there is none of that name."""
        await self._recovered.wait()
        self._traffic.delete_endpoint(name)
        await self._take_effect()

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

    async def _take_effect(self) -> None:
        store.save_traffic(self._traffic)
        await within(CONFIRM_S, self.publish())
