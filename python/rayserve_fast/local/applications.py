"""The applications of this process in local testing mode, and the calls to them.

Names are names: a handle finds the deployment of that name at each call, so handles outlive a redeploy, and calls that
waited go on to the successor. In another process a handle finds nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from rayserve_fast.application import route_of
from rayserve_fast.handle import DeploymentHandle, new_request_id
from rayserve_fast.local.batches import countdown
from rayserve_fast.local.build import LocalBuilder, warn
from rayserve_fast.local.call import LocalCall, LocalHead
from rayserve_fast.local.replica import LocalReplica

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rayserve_fast.application import RunTarget
    from rayserve_fast.context import _RequestContext
    from rayserve_fast.controlplane.spec import ApplicationSpec, DeploymentID
    from rayserve_fast.values import Buffer

logger = logging.getLogger("ray.serve")


class Applications:
    """What `serve.run` deploys and `serve.delete` ends, and what `caller.Caller` is to handles elsewhere."""

    forked = False

    def __init__(self) -> None:
        self._applications: dict[str, ApplicationSpec] = {}
        self._replicas: dict[str, LocalReplica] = {}  # by `app#deployment`
        self._changing = threading.RLock()  # a constructor may deploy another application

    def run(self, target: RunTarget) -> DeploymentHandle:
        """Deploy; what a constructor raises passes through, and the old version, if there is one, serves on."""
        builder = LocalBuilder(target.name)
        spec = builder.build(target.target, route_of(target))
        with self._changing:
            old_spec, before = self._applications.get(target.name), dict(self._replicas)
            dropped = self._keys(target.name).keys() - {deployment.id.key for deployment in spec.deployments}
            self._applications[target.name] = spec
            try:
                for deployment, definition in zip(spec.deployments, builder.definitions, strict=True):
                    warn(deployment)
                    self._replicas[deployment.id.key] = LocalReplica(deployment, definition)
            except BaseException:
                failed, self._replicas = self._replicas, before
                if old_spec is None:
                    del self._applications[target.name]
                else:
                    self._applications[target.name] = old_spec
                self._stop(replica for key, replica in failed.items() if before.get(key) is not replica)
                raise
            for key in dropped:
                del self._replicas[key]
            self._stop(replica for key, replica in before.items() if self._replicas.get(key) is not replica)
        logger.info("Application '%s' is ready in this process.", target.name)
        return self.ingress(target.name)

    def delete(self, name: str) -> None:
        """Let its calls end, then its deployments."""
        with self._changing:
            keys = self._keys(name)
            self._applications.pop(name, None)
            self._stop([self._replicas.pop(key) for key in keys])

    def shutdown(self) -> bool:
        """Delete all of them; whether there were any."""
        names = list(self._applications)
        for name in names:
            self.delete(name)
        return bool(names)

    def __len__(self) -> int:
        return len(self._applications)

    def __contains__(self, name: str) -> bool:
        return name in self._applications

    def ingress(self, name: str) -> DeploymentHandle:
        """The handle to an application's ingress."""
        return DeploymentHandle(self._applications[name].ingress, name, _local=True)

    def deployment(self, deployment: DeploymentID, check_exists: bool) -> DeploymentHandle:
        """The handle to any of its deployments; with `check_exists` KeyError if there is none of this name."""
        if check_exists and deployment.key not in self._replicas:
            raise KeyError(f"{deployment} does not exist.")
        return DeploymentHandle(deployment.name, deployment.app_name, _local=True)

    @property
    def client(self) -> Applications:
        """What begins calls: itself."""
        return self

    def callee(
        self,
        key: str,
        method: str,
        multiplexed_model_id: str,
        session_id: str,
        near: bool,
        stream: bool,
        target: str | None,
    ) -> LocalCallee:
        """What a handle calls; the arguments are those of `_core.Client.callee`."""
        return LocalCallee(self, key, (method, multiplexed_model_id, session_id), stream)

    def begin(self, head: LocalHead, parent: object, needs: Sequence[tuple[int, LocalCall]]) -> LocalCall:
        """Put a call on its way."""
        if isinstance(parent, LocalHead):
            parent.adopt(head)
        if needs:
            self._route_with(head, [(slot, call.head) for slot, call in needs])
        else:
            self._route(head)
        return LocalCall(head)

    def _route_with(self, call: LocalHead, needs: Sequence[tuple[int, LocalHead]]) -> None:
        """Route the call once its arguments are there."""

        def route() -> None:
            if call.outcome is None:
                for slot, need in needs:
                    _, pickle, buffers = need.outcome or ()
                    call.relayed.append((slot, pickle, [bytearray(buffer) for buffer in buffers]))
                self._route(call)

        ended = countdown(len(needs), route)

        def came(index: int, need: LocalHead) -> None:
            if need.outcome is None or need.outcome[0] != "value":
                call.finish("argument", index)
            ended()  # last: whoever routes must see that one has failed

        for index, (_, need) in enumerate(needs):
            need.when_ended(partial(came, index, need))

    def watch(self, loop: asyncio.AbstractEventLoop) -> Applications:
        """What waits for calls in a loop: itself."""
        return self

    async def wait(self, call: LocalCall) -> None:
        """Return when there is something to read; a cancelled wait leaves the call alone."""
        await call.watch()

    def counters(self) -> dict[str, int]:
        """What handles ask for."""
        return {"links": len(self._replicas)}

    def _keys(self, name: str) -> dict[str, None]:
        """The deployments of an application, callers before those that they call."""
        spec = self._applications.get(name)
        return {deployment.id.key: None for deployment in reversed(spec.deployments if spec else ())}

    def _route(self, call: LocalHead) -> None:
        while (replica := self._replicas.get(call.key)) is not None:
            if replica.begin(call):
                return
        call.finish("unknown")

    def _stop(self, replicas: Iterable[LocalReplica]) -> None:
        for replica in replicas:
            for waiting in replica.drain():
                self._route(waiting)
            replica.stop()


class LocalCallee:
    """What `_core.Callee` is elsewhere: a deployment, and how a handle calls it."""

    def __init__(self, owner: Applications, key: str, texts: tuple[str, str, str], stream: bool) -> None:
        self._owner, self._key, self._texts, self._stream = owner, key, texts, stream

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: _RequestContext | None) -> None:
        """None: arguments are always to be packed, whatever they are."""

    def begin(
        self,
        pickle: bytes,
        buffers: Sequence[Buffer],
        context: _RequestContext | None,
        needs: Sequence[tuple[int, LocalCall]],
        keep: object,
    ) -> LocalCall:
        """A call, on its way; the arguments are those of `_core.Callee.begin`."""
        method, model, session = self._texts
        request_id = (context.request_id if context else "") or new_request_id()
        route = context.route if context else ""
        head = LocalHead(self._key, method, (route, request_id, model, session), self._stream)
        head.give(pickle, [bytearray(buffer) for buffer in buffers], keep)
        return self._owner.begin(head, context, needs)


#: Of this process.
applications = Applications()
