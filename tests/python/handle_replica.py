"""A real replica in the test's own process and a handle to it, without Ray: both ends are the product's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from http_pair import batch_of
from scripted_replica import Cluster
from worker_replica import TOKEN, Replica, serving

from rayserve_fast import caller
from rayserve_fast.controlplane.spec import DeploymentConfig
from rayserve_fast.handle import DeploymentHandle


@contextlib.contextmanager
def called(func_or_class: Callable[..., Any], *args: Any, **config: Any) -> Iterator[tuple[DeploymentHandle, Replica]]:
    """Serves it, and gives the handle and the replica."""
    with serving(func_or_class, *args, **config) as replica:
        address: Any = SimpleNamespace(id=replica.address.replica_id, path=replica.address.unix)
        cluster = Cluster(address, batch=batch_of(DeploymentConfig(**config)), **config)
        caller._set(caller.Caller("n", TOKEN, cluster))
        try:
            yield DeploymentHandle("D", "app"), replica
        finally:
            caller.reset()
