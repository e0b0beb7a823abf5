"""A replica inside the test's own process, without Ray: a runtime around a function or class, and links to it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ray import cloudpickle
from wire_client import Link

from rayserve_fast.controlplane.spec import (
    Definition,
    DeploymentConfig,
    DeploymentSpec,
    DriverEnv,
    ReplicaAddress,
    ReplicaSpec,
)
from rayserve_fast.replica.runtime import ReplicaRuntime

TOKEN = b"a token of the tests"


class Replica:
    """A started runtime."""

    def __init__(self, runtime: ReplicaRuntime, address: ReplicaAddress) -> None:
        self.runtime, self.address = runtime, address
        self.links: list[Link] = []

    def link(self, **kwargs: Any) -> Link:
        assert self.address.unix is not None
        link = Link(self.address.unix, self.address.replica_id, TOKEN, **kwargs)
        self.links.append(link)
        return link


def spec_of(
    func_or_class: Callable[..., Any], socket_dir: str, *args: Any, is_asgi: bool = False, **config: Any
) -> ReplicaSpec:
    deployment = DeploymentSpec(
        app="default",
        name=getattr(func_or_class, "__name__", "deployment"),
        definition=cloudpickle.dumps(Definition(func_or_class, args, {})),
        config=DeploymentConfig(**config),
        driver=DriverEnv(),
        is_asgi=is_asgi,
        docs_path=None,
        code_version="1",
    )
    return ReplicaSpec(replica_id="r1", deployment=deployment, token=TOKEN, socket_dir=socket_dir)


@contextlib.contextmanager
def serving(func_or_class: Callable[..., Any], *args: Any, **config: Any) -> Iterator[Replica]:
    """Serves it, and stops it without a trace afterwards."""
    with tempfile.TemporaryDirectory(prefix="rsf") as socket_dir:
        runtime = ReplicaRuntime(spec_of(func_or_class, socket_dir, *args, **config))
        replica = Replica(runtime, runtime.start())
        try:
            yield replica
        finally:
            for link in replica.links:
                link.close()
            runtime.stop()
