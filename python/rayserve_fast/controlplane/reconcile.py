"""Decisions of the control plane: what exists and what is wanted -> what to do next.

Pure: no Ray, no clock (the caller passes `now`), no I/O. `decide` is called after every event and returns only what
is to be done now; the events (`deployed`, `ready`, `start_failed`, `died`, ...) record what has happened. Invariants:
a rolling update never has more than max(int(rolling_update_percentage * target), 1) replicas in transition; a replica
that serves is stopped only when it is outdated, surplus or its deployment is being deleted; a given-up rollout starts
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rayserve_fast.controlplane import transitions
from rayserve_fast.controlplane.spec import DeploymentSpec
from rayserve_fast.controlplane.state import Application, Deployment, Replica, versions

#: A replica that dies sooner than this after it was ready counts as an early death: the third in a row backs off.
EARLY_DEATH_S = 10.0
MAX_BACKOFF_S = 64.0


@dataclass(frozen=True)
class Start:
    """Start one replica of the current target, with this rank."""

    rank: int


@dataclass(frozen=True)
class Stop:
    """Stop a replica; without `graceful` it has nothing to finish."""

    replica_id: str
    graceful: bool = True


@dataclass(frozen=True)
class Reconfigure:
    """Give a running replica the current settings; no restart."""

    replica_id: str


Action = Start | Stop | Reconfigure


def decide(d: Deployment, now: float) -> list[Action]:
    """What is to be done for one deployment now."""
    if d.deleting:
        return [_stop(r) for r in _live(d)]
    if d.failed:
        return [_stop(r) for r in d.among("STARTING")]
    stops = [*_outdated(d), *_surplus(d)]
    gone = {s.replica_id for s in stops}
    stay = [r for r in _live(d) if r.id not in gone]
    current = [r for r in stay if r.version == d.version and r.state == "RUNNING"]
    in_place = [Reconfigure(r.id) for r in current if r.config != d.config]
    starts: list[Start] = []
    if now >= d.not_before:
        taken = {r.rank for r in stay}
        free = (rank for rank in range(d.target) if rank not in taken)
        starts = [Start(next(free)) for _ in range(d.target - len(stay))]
    return [*stops, *in_place, *starts]


def active(app: Application) -> Iterator[Deployment]:
    """The deployments that may act now, so that nobody is left calling a deployment that stops.

    When the application is deleted, callers stop before the deployments that they call. One that a redeploy has
    dropped stops once the others have replaced what may still call it, or find no room while it is there.
    """
    if app.deleting:
        for d in reversed(app.deployments.values()):
            yield d
            if any(not r.idle for r in d.replicas.values()):
                return
    else:
        wanted = [d for d in app.deployments.values() if not d.deleting]
        yield from wanted
        if all(d.status == "HEALTHY" for d in wanted) or any(d.cramped for d in wanted):
            yield from (d for d in app.deployments.values() if d.deleting)


def deployed(app: Application | None, spec: DeploymentSpec) -> Deployment:
    """The deployment with `spec` as its new target; keeps the replicas that there are."""
    version, config = versions(spec)
    target = spec.config.num_replicas
    d = app.deployments.get(spec.name) if app else None
    if d is None:
        return Deployment(spec, version, config, target)
    only_scaled = (version, config) == (d.version, d.config) and target != d.target and not (d.failed or d.deleting)
    if d.deleting:
        d.deleting, d.status, d.trigger = False, "UPDATING", "CONFIG_UPDATE_STARTED"
    _apply(d, ("scale_up" if target > d.target else "scale_down") if only_scaled else "deploy")
    if version != d.version or d.failed:
        d.failures, d.failure, d.started = 0, "", False
        d.rolling = bool(d.among("RUNNING", "UPDATING"))
    d.spec, d.version, d.config, d.target = spec, version, config, target
    d.not_before, d.early_deaths = 0.0, 0
    for r in d.replicas.values():
        if r.version == version:
            r.grace_s = spec.config.graceful_shutdown_timeout_s
    return d


def born(d: Deployment, id: str, rank: int) -> Replica:
    """A replica of the current target, in the deployment's books before there is an actor."""
    r = d.replicas[id] = Replica(id, d.version, d.config, rank, d.spec.config.graceful_shutdown_timeout_s)
    return r


def delete(d: Deployment, force: bool = False) -> None:
    """The deployment is not wanted any more; with `force`, neither is what its replicas are at."""
    d.deleting = True
    for r in d.replicas.values() if force else ():
        r.grace_s = 0.0
    _apply(d, "delete")


def ready(d: Deployment, r: Replica, now: float) -> None:
    """The replica has started, or was reconfigured, and every live proxy is linked to it."""
    if r.state in ("STARTING", "UPDATING", "RECOVERING"):
        r.state, r.ready_at = "RUNNING", now
        if r.version == d.version:
            d.started = True
            if not d.rolling:
                d.failures = 0


def told(d: Deployment, error: str) -> str:
    """What the log says of a start that has just failed: the same error in a row only once."""
    if not d.failures or d.failure != error:
        return f"failed to start:\n{error}"
    attempt = d.failures + 1
    limit = f" of {d.threshold}" if attempt <= d.threshold else ""
    return f"failed to start: attempt {attempt}{limit} failed in the same way."


def start_failed(d: Deployment, r: Replica, error: str, now: float) -> None:
    """The replica's process or constructor failed before it was ready; it is gone."""
    d.replicas.pop(r.id, None)
    if d.deleting or r.version != d.version or r.state == "STOPPING":
        return
    _count_failure(d, error, now)


def reconfigure_failed(d: Deployment, r: Replica, error: str, now: float) -> None:
    """The user's `reconfigure` raised: the replica cannot serve the new settings and is to be stopped."""
    if r.version == d.version and not d.deleting:
        d.rolling = True  # it shares the budget of a rolling update, so that it ends
        _count_failure(d, error, now)


def died(d: Deployment, r: Replica, now: float) -> None:
    """A replica's process has ended, wanted or not."""
    d.replicas.pop(r.id, None)
    if d.deleting or r.state == "STOPPING" or r.version != d.version:
        return
    if d.rolling and d.status == "UPDATING":
        _count_failure(d, "A replica of the new version died.", now)
        return
    d.early_deaths = d.early_deaths + 1 if now - r.ready_at < EARLY_DEATH_S else 0
    if d.early_deaths >= 3:
        d.not_before = now + _backoff(d.early_deaths - 3)
    _apply(d, "replica_lost", f"Replica {r.id} died; a new one is being started.")


def settle(d: Deployment) -> None:
    """Bring the status in line with what there is; called after events and actions."""
    if d.deleting:
        return
    if d.failed:
        during = "during a rolling update " if d.rolling else ""
        serving = any(r.version != d.version for r in d.among("RUNNING"))
        kept = "; replicas of the previous version keep serving" if serving else ""
        after = f" The update has stopped{kept}." if d.rolling else ""
        _apply(
            d,
            "start_failed",
            f"The deployment failed to start {d.failures} times in a row {during}because its constructor or its"
            f" initial health check fails.{after} Error:\n{d.failure}",
        )
    elif not d.among("STARTING", "UPDATING", "RECOVERING", "STOPPING"):
        current = [r for r in d.replicas.values() if (r.version, r.config) == (d.version, d.config)]
        if len(current) == len(d.replicas) == d.target:
            d.rolling, d.failures = False, 0
            _apply(d, "healthy")


def _live(d: Deployment) -> list[Replica]:
    return [r for r in d.replicas.values() if r.state != "STOPPING"]


def _stop(r: Replica) -> Stop:
    return Stop(r.id, graceful=r.address is not None)


def _outdated(d: Deployment) -> list[Stop]:
    """Replicas of other versions that may stop now; those that never served do not count against the budget."""
    old = [r for r in _live(d) if r.version != d.version]
    unborn = [r for r in old if r.state == "STARTING"]
    serving = [r for r in old if r.state != "STARTING"]
    current = [r for r in _live(d) if r.version == d.version and r.state != "STARTING"]
    in_transition = d.target - len(current) - len(serving)
    budget = max(int(d.spec.config.rolling_update_percentage * d.target), 1) - in_transition
    if d.target < len(serving) + len(current):  # shrink first, `_surplus` takes the outdated ones
        budget = 0
    return [_stop(r) for r in (*unborn, *serving[: max(budget, 0)])]


def _surplus(d: Deployment) -> list[Stop]:
    """Replicas beyond the target: outdated before current, unready before ready, young before old."""
    counted = [r for r in _live(d) if r.version == d.version or r.state != "STARTING"]
    counted.sort(key=lambda r: (r.version == d.version, r.state != "STARTING", -r.ready_at))
    return [_stop(r) for r in counted[: max(len(counted) - d.target, 0)]]


def _count_failure(d: Deployment, error: str, now: float) -> None:
    d.failures += 1
    d.failure = error
    left = max(d.threshold - d.failures, 0)
    if d.failures > d.threshold:
        d.not_before = now + _backoff(d.failures - d.threshold - 1)
    again = "" if d.started and not d.rolling else f" {left} more time(s)"
    d.message = f"A replica failed to start. Retrying{again}. Error:\n{error}"


def _backoff(n: int) -> float:
    return min(2.0 ** min(n, 16), MAX_BACKOFF_S)


def _apply(d: Deployment, event: transitions.Event, message: str = "") -> None:
    d.status, d.trigger = transitions.transition(d.status, d.trigger, event)
    if d.status != "HEALTHY" or event == "healthy":
        d.message = message
