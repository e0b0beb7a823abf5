"""What a restarted controller must know, kept in the key-value store of Ray's GCS.

Four kinds of keys: `meta` (epoch, cluster token), `app:{name}` (the target of one application), `traffic` (splits,
endpoints, rollouts and the last orders), `replicas` (which replica actors exist and what they run). A replica list is
written before its actors are made, so that no actor can exist that a restarted controller does not look for. Values are
pickles of this package's own plain classes.
"""

from __future__ import annotations

import pickle
import secrets
from dataclasses import dataclass

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from rayserve_fast.controlplane.options import NAMESPACE
from rayserve_fast.controlplane.state import Application, Deployment, Replica
from rayserve_fast.controlplane.traffic import Traffic

_SPACE = NAMESPACE.encode()


@dataclass
class Meta:
    """The epoch is raised at every start of a controller; the token never changes while Serve runs."""

    epoch: int
    token: bytes


def open_epoch() -> Meta:
    """Raise and persist the epoch; make the token at the very first start."""
    raw = _internal_kv_get(b"meta", namespace=_SPACE)
    last = pickle.loads(raw) if raw else Meta(0, secrets.token_bytes(32))
    meta = Meta(last.epoch + 1, last.token)
    _internal_kv_put(b"meta", pickle.dumps(meta), overwrite=True, namespace=_SPACE)
    return meta


def save_application(app: Application) -> None:
    """Remember the targets of an application; its replicas are kept apart."""
    bare = Application(app.spec, app.deployed_at, deleting=app.deleting, former=app.former)
    for name, d in app.deployments.items():
        bare.deployments[name] = Deployment(**{**vars(d), "replicas": {}})
    _internal_kv_put(_key(app.name), pickle.dumps(bare), overwrite=True, namespace=_SPACE)


def forget_application(name: str) -> None:
    """The application is gone."""
    _internal_kv_del(_key(name), namespace=_SPACE)


def save_replicas(apps: dict[str, Application]) -> None:
    """Remember which replicas exist."""
    deployments = [d for app in apps.values() for d in app.deployments.values()]
    rows = [(d.spec.app, d.spec.name, r) for d in deployments for r in d.replicas.values()]
    _internal_kv_put(b"replicas", pickle.dumps(rows), overwrite=True, namespace=_SPACE)


def load() -> dict[str, Application]:
    """The applications with their replicas, as they were last saved; empty at the first start."""
    apps: dict[str, Application] = {}
    for key in _internal_kv_list(b"app:", namespace=_SPACE):
        if raw := _internal_kv_get(key, namespace=_SPACE):
            app: Application = pickle.loads(raw)
            apps[app.name] = app
    raw = _internal_kv_get(b"replicas", namespace=_SPACE)
    rows: list[tuple[str, str, Replica]] = pickle.loads(raw) if raw else []
    for app_name, deployment, r in rows:
        if app_name in apps and deployment in apps[app_name].deployments:
            apps[app_name].deployments[deployment].replicas[r.id] = r
    return apps


def save_traffic(traffic: Traffic) -> None:
    """Remember the splits, the endpoints and what else is of traffic."""
    _internal_kv_put(b"traffic", pickle.dumps(traffic), overwrite=True, namespace=_SPACE)


def load_traffic() -> Traffic:
    """What `save_traffic` was last given; nothing at the first start."""
    raw = _internal_kv_get(b"traffic", namespace=_SPACE)
    traffic: Traffic = pickle.loads(raw) if raw else Traffic()
    return traffic


def clear() -> None:
    """Serve was shut down: leave nothing."""
    for key in _internal_kv_list(b"", namespace=_SPACE):
        _internal_kv_del(key, namespace=_SPACE)


def _key(name: str) -> bytes:
    return f"app:{name}".encode()
