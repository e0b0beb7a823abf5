"""Where the requests of a route or an endpoint go: its targets with their weights, and what may not be asked for.

A *split* belongs to a route (`/models`) or to an endpoint of the older API (a name). Its targets and shadows are
applications by name. `Traffic` holds every split and endpoint of the cluster; each method checks a wish against them
and the applications and takes it whole, or raises and has changed nothing. An application that a split uses cannot be
deleted, and a route that an application owns can only be split with that application among the targets: no request
changes its owner by accident.

Pure: no Ray, no clock, no storage. How requests are spread is the data plane's (`engine/split.rs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rayserve_fast.controlplane.rollout import Plan, Rollout
from rayserve_fast.controlplane.seen import Seen, check_seen
from rayserve_fast.controlplane.spec import ApplicationSpec
from rayserve_fast.controlplane.state import Application
from rayserve_fast.controlplane.traffic_checks import (
    check_route,
    check_share,
    check_weights,
    endpoint_methods,
    endpoint_name,
    endpoint_route,
    is_route,
)
from rayserve_fast.exceptions import RayServeException

#: What holds a name, by the era of the application, and how it is given back.
HOLDERS = {
    "": ("an application", "serve.delete({0!r})"),
    "backend": ("a backend", "serve.delete_backend({0!r})"),
    "deploy": ("a deployment made by .deploy()", "serve.get_deployment({0!r}).delete()"),
}


@dataclass
class Split:
    """What one route or endpoint leads to; `sticky` and `rules` are plain JSON, as they stand in the snapshot."""

    name: str
    weights: dict[str, float]
    sticky: Mapping[str, str] | None = None  # {"header": name} or {"cookie": name}
    rules: Sequence[Mapping[str, str | None]] = ()  # header or cookie, value (None: present), target
    shadows: dict[str, float] = field(default_factory=dict)

    def uses(self, app: str) -> bool:
        """Whether requests can reach the application by this split."""
        return self.weights.get(app, 0) > 0 or app in self.shadows or any(r["target"] == app for r in self.rules)


@dataclass(frozen=True)
class Endpoint:
    """A name of the older API; `route` is a path or a pattern matched as a whole, None: reached by handles only."""

    name: str
    route: str | None
    methods: tuple[str, ...]


@dataclass
class Traffic:
    """Every split and rollout, by its route or endpoint, and every endpoint."""

    splits: dict[str, Split] = field(default_factory=dict)
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    rollouts: dict[str, Rollout] = field(default_factory=dict)  # the last one of each split
    orders: list[str] = field(default_factory=list)  # ids of the last calls that changed any of it

    # -- orders -------------------------------------------------------------------------------------------------

    def assign(
        self,
        name: str,
        weights: Mapping[str, float],
        sticky: Mapping[str, str] | None,
        rules: Sequence[Mapping[str, str | None]],
        apps: Mapping[str, Application],
    ) -> None:
        """Give a route or an endpoint its targets; its shadows stay.

        An application that only a rule names gets the weight 0. `name` may also be a backend and the keys of `weights`
        endpoints, the reversed form of the oldest documents.

        Raises:
            RayServeException: the route or an application is not free for this, or unknown.
            ValueError, TypeError: the weights are wrong, or an endpoint or a backend is unknown.
        """
        if not is_route(name) and name not in self.endpoints:
            for endpoint, turned in self._turned(name, weights, apps).items():
                self.assign(endpoint, turned, sticky, rules, apps)
            return
        if is_route(name):
            check_route(name)
        check_weights(name, weights)
        self._check_no_rollout(name)
        full = {**weights, **{str(r["target"]): 0.0 for r in rules if r["target"] not in weights}}
        for target in full:
            self._check_target(name, target, apps)
        if is_route(name):
            self._check_route(name, full, apps)
        shadows = self.splits[name].shadows if name in self.splits else {}
        self.splits[name] = Split(name, {t: float(w) for t, w in full.items()}, sticky, tuple(rules), shadows)

    def shadow(self, name: str, target: str, share: float, apps: Mapping[str, Application]) -> None:
        """Copy a share of the requests of a route or an endpoint to one more application; 0 stops it.

        Raises:
            RayServeException: nothing serves the route.
            ValueError, TypeError: an endpoint, a backend or the share is wrong.
        """
        check_share(name, share)
        split = self._present(name, apps)
        if share:
            self._check_target(name, target, apps)
            self.splits[name] = replace(split, shadows={**split.shadows, target: float(share)})
            return
        split.shadows.pop(target, None)
        rolling = name in self.rollouts and self.rollouts[name].active
        if is_route(name) and not rolling and _says_nothing(split, _owner(name, apps)):
            self.splits.pop(name, None)  # as it was before the first shadow

    def remove(self, route: str) -> None:
        """Forget the split of a route: its owner, if it has one, gets every request again.

        Raises:
            ValueError: `route` is the name of an endpoint.
            RayServeException: it has no split.
        """
        if not is_route(route):
            raise ValueError(f"route: must start with '/', got {route!r}; an endpoint goes with serve.delete_endpoint.")
        self.split(route)
        self._check_no_rollout(route)
        del self.splits[route]
        self.rollouts.pop(route, None)

    def create_endpoint(
        self,
        name: str,
        route: str | None,
        methods: Sequence[str],
        weights: Mapping[str, float] | None,
        apps: Mapping[str, Application],
    ) -> None:
        """Register an endpoint, without traffic or with `weights` over backends.

        Raises:
            ValueError: the name is not usable, the name or the route is registered, or a backend is unknown.
            TypeError: `route` or `methods` is of the wrong type.
            RayServeException: the route belongs to an application or has a split.
        """
        endpoint = Endpoint(endpoint_name(name), endpoint_route(route), endpoint_methods(methods))
        if route is not None:
            if (holder := self._holder(route)) is not None:
                raise ValueError(
                    f"Cannot create endpoint. Route '{route}' is already registered to endpoint '{holder}'."
                )
            if (owner := _owner(route, apps)) is not None:
                raise RayServeException(
                    f'Cannot create endpoint "{name}". Route {route} is being used by application "{owner}".'
                )
            if route in self.splits:
                raise RayServeException(
                    f'Cannot create endpoint "{name}". Route {route} has traffic settings;'
                    f" serve.delete_traffic({route!r}) removes them."
                )
        if name in self.endpoints:
            raise ValueError(f"Cannot create endpoint. Endpoint '{name}' is already registered.")
        if weights is not None:
            check_weights(name, weights)
            for target in weights:
                self._check_target(name, target, apps)
        self.endpoints[name] = endpoint
        self.splits[name] = Split(name, {t: float(w) for t, w in (weights or {}).items()})

    def delete_endpoint(self, name: str) -> None:
        """Forget an endpoint and its traffic; its backends stay.

        Raises:
            ValueError: there is no such endpoint.
        """
        if name not in self.endpoints:
            raise ValueError(f"Endpoint '{name}' is not registered.")
        self._check_no_rollout(name)
        del self.endpoints[name]
        del self.splits[name]
        self.rollouts.pop(name, None)

    def roll_out(
        self, id: str, name: str, target: str, plan: Plan, now: float, apps: Mapping[str, Application]
    ) -> Rollout:
        """Start a rollout: its target gets the share of the first step. The same `id` again is the same rollout.

        Raises:
            RayServeException: nothing serves the route, it has a rollout that is not over, or the target is unknown.
            ValueError: an endpoint or a backend is unknown, or the target has the share of the first step already.
        """
        if name in self.rollouts and self.rollouts[name].id == id:
            return self.rollouts[name]
        self._check_no_rollout(name)
        split = self._present(name, apps)
        self._check_target(name, target, apps)
        before = {**split.weights, target: split.weights.get(target, 0.0)}
        if not any(split.weights.values()):
            raise ValueError(f"route_or_endpoint: endpoint {name!r} has no traffic that {target!r} could take over.")
        if plan.steps[0] <= before[target]:
            raise ValueError(
                f"steps: the first one is {plan.steps[0]}, but {target!r} gets {before[target]} of {name!r} already;"
                f" begin above that."
            )
        rollout = self.rollouts[name] = Rollout(id, name, target, plan, before, now)
        rollout.start(now)
        self.splits[name] = replace(split, weights=rollout.weights())
        return rollout

    def forget(self, app: str) -> bool:
        """An application that no split uses goes: its weights of 0 go with it. Whether there were any."""
        held = [s for s in self.splits.values() if app in s.weights]
        for split in held:
            del split.weights[app]
        return bool(held)

    # -- questions ----------------------------------------------------------------------------------------------

    def split(self, name: str) -> Split:
        """The split of a route or an endpoint.

        Raises:
            RayServeException, ValueError: there is none.
        """
        if name in self.splits:
            return self.splits[name]
        if not is_route(name):
            raise ValueError(f"Endpoint '{name}' is not registered.")
        self._check_no_endpoint(name)
        raise RayServeException(
            f"Route {name!r} has no traffic settings; serve.set_traffic({name!r}, {{...}}) makes some."
        )

    def check_unused(self, app: Application) -> None:
        """Refuse to delete an application that gets requests by a split.

        Raises:
            ValueError: a backend, with the words of the reference.
            RayServeException: any other application; names the route.
        """
        for name, rollout in self.rollouts.items():
            if rollout.active and app.name in rollout.before:
                raise RayServeException(
                    f'Application "{app.name}" is part of the rollout on {name} and cannot be deleted.'
                    f" Wait for it, or call serve.get_rollout({name!r}).abort() first."
                )
        for name, split in self.splits.items():
            if not split.uses(app.name):
                continue
            if not is_route(name):
                raise ValueError(
                    f"Backend '{app.name}' is used by endpoint '{name}' and cannot be deleted."
                    " Please remove the backend from all endpoints and try again."
                )
            how = (
                f"serve.shadow_traffic({name!r}, {app.name!r}, 0)"
                if app.name in split.shadows
                else f"serve.set_traffic({name!r}, ...) without it or serve.delete_traffic({name!r})"
            )
            raise RayServeException(
                f'Application "{app.name}" is a target of the traffic of route {name} and cannot be deleted.'
                f" Call {how} first."
            )

    def check_deploy(
        self, specs: Iterable[ApplicationSpec], apps: Mapping[str, Application], seen: Seen | None = None
    ) -> None:
        """Refuse applications whose name or route is somebody else's, or that have changed since they were `seen`.

        Raises:
            RayServeException: names the holder.
            OvertakenError: another driver was faster.
        """
        owners = {a.spec.route_prefix: a.name for a in apps.values() if not a.deleting}
        for spec in specs:
            route = spec.route_prefix
            old = apps.get(spec.name)
            if old is not None and not old.deleting and old.spec.era != spec.era:
                what, how = HOLDERS[old.spec.era]
                raise RayServeException(
                    f'The name "{spec.name}" is held by {what}; {how.format(spec.name)} gives it back.'
                )
            check_seen(spec, None if old is None or old.deleting else old.spec, seen or {})
            owner = owners.get(route) if route is not None else None
            if owner is not None and owner != spec.name:
                raise RayServeException(
                    f'Prefix {route} is being used by application "{owner}". '
                    f'Failed to deploy application "{spec.name}".'
                )
            if route is not None:
                self._check_owner(route, spec.name)
            owners[route] = spec.name

    def rollout(self, name: str) -> Rollout:
        """The last rollout of a route or an endpoint, whether it is over or not.

        Raises:
            RayServeException: there was none.
        """
        if name not in self.rollouts:
            raise RayServeException(f"There is no rollout on {name!r}; serve.rollout({name!r}, ...) starts one.")
        return self.rollouts[name]

    def _present(self, name: str, apps: Mapping[str, Application]) -> Split:
        """The split, or for a route without one what its owner gets anyway."""
        if name in self.splits:
            return self.splits[name]
        if not is_route(name):
            raise ValueError(f"Endpoint '{name}' is not registered.")
        self._check_no_endpoint(name)
        if (owner := _owner(name, apps)) is None:
            raise RayServeException(
                f"Nothing serves the route {name!r}. Deploy an application there, or give it targets first:"
                f" serve.set_traffic({name!r}, {{...}})."
            )
        return Split(name, {owner: 1.0})

    def _check_no_rollout(self, name: str) -> None:
        if name in self.rollouts and self.rollouts[name].active:
            raise RayServeException(
                f"A rollout of {self.rollouts[name].target!r} decides over the weights of {name!r}. Wait for it,"
                f" or call serve.get_rollout({name!r}).abort() first."
            )

    def _check_owner(self, route: str, app: str) -> None:
        if (endpoint := self._holder(route)) is not None:
            raise RayServeException(
                f'Prefix {route} is being used by endpoint "{endpoint}". Failed to deploy application "{app}".'
            )
        split = self.splits.get(route)
        if split is not None and app not in split.weights:
            raise RayServeException(
                f"Prefix {route} has traffic settings, and application {app!r} is not one of its targets"
                f" {sorted(split.weights)}. Deploy it with route_prefix=None and add it by serve.set_traffic({route!r},"
                f" ...), or call serve.delete_traffic({route!r}) first."
            )

    def _check_route(self, route: str, weights: Mapping[str, float], apps: Mapping[str, Application]) -> None:
        self._check_no_endpoint(route)
        owner = _owner(route, apps)
        if owner is not None and owner not in weights:
            raise RayServeException(
                f'Route {route} belongs to application "{owner}", which is not among the targets {sorted(weights)}.'
                f" Add it to the weights, with 0 if it shall get nothing."
            )

    def _check_no_endpoint(self, route: str) -> None:
        if (name := self._holder(route)) is not None:
            raise RayServeException(f"Route {route} belongs to endpoint {name!r}; pass that name instead of the route.")

    def _holder(self, route: str) -> str | None:
        return next((e.name for e in self.endpoints.values() if e.route == route), None)

    def _check_target(self, name: str, target: str, apps: Mapping[str, Application]) -> None:
        app = apps.get(target)
        known = app is not None and not app.deleting
        if is_route(name) and not known:
            raise RayServeException(
                f"There is no application {target!r} to be a target of route {name!r}. Deploy it first:"
                f" serve.run(app, name={target!r}, route_prefix=None)."
            )
        if not is_route(name) and not (known and app is not None and app.spec.era == "backend"):
            raise ValueError(f"Attempted to assign traffic to a backend '{target}' that is not registered.")

    def _turned(
        self, backend: str, endpoints: Mapping[str, float], apps: Mapping[str, Application]
    ) -> dict[str, dict[str, float]]:
        """The weights of each endpoint when the names came in the reversed order."""
        app = apps.get(backend)
        is_backend = app is not None and not app.deleting and app.spec.era == "backend"
        if not is_backend or not endpoints or any(e not in self.endpoints for e in endpoints):
            raise ValueError(f"Attempted to assign traffic for an endpoint '{backend}' that is not registered.")
        for endpoint, weight in endpoints.items():
            self._check_no_rollout(endpoint)
            if weight != 1.0:
                raise ValueError(
                    f"set_traffic({backend!r}, ...) names a backend first, which links it to endpoints with a weight"
                    f" of 1.0; for {weight} of endpoint {endpoint!r} call set_traffic({endpoint!r}, {{...}})."
                )
        return {endpoint: {backend: 1.0} for endpoint in endpoints}


def _owner(route: str, apps: Mapping[str, Application]) -> str | None:
    return next((a.name for a in apps.values() if a.spec.route_prefix == route and not a.deleting), None)


def _says_nothing(split: Split, owner: str | None) -> bool:
    """The route alone would do the same."""
    return split.weights == {owner: 1.0} and not (split.sticky or split.rules or split.shadows)
