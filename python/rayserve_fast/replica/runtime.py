"""A replica without its Ray actor: the user's object on its loop, and the worker that serves it over frames.

Starting resolves once what kind of callable answers HTTP (a coroutine function, a sync function, an ASGI application),
so that a request meets no branch in Python. What is called on the user's object besides its handlers: ``servable.py``.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import cloudpickle

from rayserve_fast import caller, multiplex
from rayserve_fast._core import Worker
from rayserve_fast.context import ReplicaContext, _serve_request_context, _set_replica_context
from rayserve_fast.controlplane.options import session_header
from rayserve_fast.controlplane.spec import Definition, DeploymentConfig, ReplicaAddress, ReplicaSpec
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica import batches, responses
from rayserve_fast.replica.calls import Calls, handler_of, is_async
from rayserve_fast.replica.facts import Facts
from rayserve_fast.replica.loop import UserLoop
from rayserve_fast.replica.servable import Servable
from rayserve_fast.replica.sync_pool import SyncPool
from rayserve_fast.tracebacks import from_user_code

if TYPE_CHECKING:
    from rayserve_fast._core import RequestHead

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Hooks:
    """What the worker calls: see ``rust/pyext/src/worker/hooks.rs``."""

    context: Any  # the context variable that holds the head of the current request
    encode: Callable[[Any], Any]
    failed: Callable[[RequestHead, BaseException], responses.Answer]
    spawn: Callable[[], None]
    find_method: Callable[[str, bool], tuple[Callable[..., Any], bool]]
    begin_call: Callable[..., Any]
    run_call: Callable[..., Any]
    dump_result: Callable[..., Any]
    dump_error: Callable[..., Any]
    idle: Callable[[], None]
    enter_batch: Callable[[int, str], None]
    group: Callable[..., Any]
    run_group: Callable[..., Any]
    results: Callable[[Any, int], list[Any]]
    failed_batch: Callable[..., responses.Answer]


@dataclass(frozen=True)
class HttpHandler:
    """How HTTP requests are answered: `handler` is given what `request` makes of the head, or nothing."""

    kind: str  # "async", "sync" or "asgi"
    handler: Callable[..., Any]
    request: Callable[[RequestHead], Any] | None


class ReplicaRuntime:
    """One replica in this process.

    Args:
        spec: the deployment, and the addresses and secrets of the replica.
        loaded: called when the user's code is loaded, before its constructor runs.
    """

    def __init__(self, spec: ReplicaSpec, loaded: Callable[[], object] = lambda: None) -> None:
        self._spec = spec
        self._loaded = loaded
        self._config = spec.deployment.config
        self._loop = UserLoop(f"serve-{spec.deployment.name}")
        self._pool = SyncPool(f"serve-{spec.deployment.name}-sync", self._loop.loop)
        self._user: Servable | None = None
        self._facts: Facts | None = None
        self._worker: Worker | None = None
        self._idle = threading.Event()
        self._stopping = threading.Lock()
        self._stopped = False
        self._unix: str | None = None

    def start(self) -> ReplicaAddress:
        """Construct the user's object and listen; raises what the user's code raises."""
        self._loop.start()
        try:
            user = self._construct()
            facts = self._facts = Facts(user)
            metadata = facts.metadata()
            address: ReplicaAddress = self._loop.run(self._listen, user)
            return replace(address, metadata=metadata, has_routing_stats=facts.has_routing_stats)
        except BaseException:
            self._loop.stop()
            raise

    def reconfigure(self, config: DeploymentConfig) -> None:
        """Apply a new configuration: the limit, and `user_config` if it has changed."""
        self._config = config
        if self._user is not None:
            self._user.reconfigure(config)
        if self._worker is not None:
            self._worker.resize(config.slots)

    def check_health(self) -> None:
        """Raises what the user's `check_health` raises; without one it tells whether the loop still turns."""
        if self._user is not None:
            self._user.check_health()

    def routing_stats(self) -> str | None:
        """What the user's `record_routing_stats` says, for routers; raises what that raises."""
        return None if self._facts is None else self._facts.routing_stats()

    def drain(self) -> None:
        """Take no more requests: callers are told, held requests go back to them."""
        if self._worker is not None:
            self._worker.drain()

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether within `timeout_s` of a drain everything that was begun has ended, and its calls have left.

        A call that nobody has waited for would end here with its process, if no replica had it yet.
        """
        deadline = time.monotonic() + timeout_s
        if self._worker is not None and not self._idle.wait(min(timeout_s, threading.TIMEOUT_MAX)):
            return False
        return caller.send_off(deadline - time.monotonic())

    def stop(self) -> None:
        """Let the user's object clean up, close every socket, end the threads; once, whoever else calls waits."""
        with self._stopping:
            if not self._stopped:
                self._stopped = True
                self._stop()

    def _stop(self) -> None:
        try:
            if self._user is not None:
                self._user.destroy()
        finally:
            if self._worker is not None:
                self._loop.run(self._close)
            self._pool.stop()
            self._loop.stop()
            _set_replica_context(None)

    def counters(self) -> dict[str, int]:
        """What the worker counts: requests, running, held, links, streams, errors and others."""
        return {} if self._worker is None else self._worker.counters()

    def _construct(self) -> Servable:
        definition: Definition = cloudpickle.loads(self._spec.deployment.definition)
        self._loaded()
        context = ReplicaContext(
            replica_id=self._spec.id,
            servable_object=None,
            _deployment_config=self._config,
            rank=self._spec.rank,
            world_size=self._spec.world_size,
            code_version=self._spec.deployment.code_version,
        )
        _set_replica_context(context)
        self._user = Servable(self._loop, context)
        self._user.construct(definition)
        return self._user

    def _listen(self, user: Servable) -> ReplicaAddress:
        """On the loop's thread: everything is ready before the first link can come."""
        spec, http = self._spec, self._http_handler(user)
        calls = Calls(user.target, user.is_function)
        hooks = Hooks(
            context=_serve_request_context,
            encode=responses.encode,
            failed=self._failed,
            spawn=self._pool.spawn,
            find_method=calls.find_method,
            begin_call=calls.begin,
            run_call=calls.run,
            dump_result=calls.dump,
            dump_error=calls.dump_error,
            idle=self._idle.set,
            enter_batch=partial(batches.enter, spec.deployment.app),
            group=batches.Batches(calls).group,
            run_group=batches.run,
            results=batches.results,
            failed_batch=partial(batches.failed, spec.id),
        )
        worker = Worker(
            self._loop.loop,
            hooks,
            app=spec.deployment.app,
            name=spec.deployment.name,
            replica_id=spec.replica_id,
            token=spec.token,
            max_ongoing_requests=self._config.slots,
            batched=self._config.max_batch_size is not None,
            session_header=session_header(),
            kind=http.kind,
            handler=http.handler,
            request=http.request,
        )
        self._worker = self._pool.worker = worker
        host, node_id = _node()
        self._unix = os.path.join(spec.socket_dir, f"r-{spec.replica_id}.sock")
        worker.listen_unix(self._unix)
        tcp = f"{host}:{worker.listen_tcp(host)}" if spec.listen_tcp else None
        worker.attach()
        multiplex.listen(user.context, self._announce)
        self._loop.loop.add_reader(worker.fileno(), worker.tick)
        _abandon_in_child(worker)
        caller.settle(self._loop.loop, worker)
        return ReplicaAddress(spec.replica_id, node_id, self._unix, tcp)

    def _announce(self, models: list[str]) -> None:
        """Tell callers what is held; the user's code may load on a loop of its own."""

        def announce() -> None:
            if self._worker is not None:
                self._worker.announce(models)

        self._loop.call(announce)

    def _http_handler(self, user: Servable) -> HttpHandler:
        if user.asgi is not None:
            return HttpHandler("asgi", user.asgi, None)
        handler = handler_of(user.target)
        if handler is None:
            return HttpHandler("async", self._no_call, None)
        from rayserve_fast.replica.request import Request

        request = Request if inspect.signature(handler).parameters else None
        if is_async(handler):
            return HttpHandler("async", handler, request)
        if request is None:
            return HttpHandler("sync", lambda _head: handler(), None)
        return HttpHandler("sync", handler, request)

    async def _no_call(self) -> None:
        raise RayServeException(f"Tried to call a method '__call__' that does not exist in {self._spec.deployment.id}.")

    def _failed(self, head: RequestHead, error: BaseException) -> responses.Answer:
        """Logs an error of a handler, and gives the answer for the case that none has begun."""
        logger.error(
            "Request %s to %s failed.",
            head.request_id,
            self._spec.id,
            exc_info=(type(error), error, from_user_code(error.__traceback__)),
        )
        return responses.failure(error)

    def _close(self) -> None:
        """On the loop's thread."""
        worker = self._worker
        if worker is not None:
            caller.unsettle(worker)
            self._loop.loop.remove_reader(worker.fileno())
            worker.close()
        if self._unix is not None:
            os.unlink(self._unix)
            self._unix = None
        self._worker = None


def _node() -> tuple[str, str]:
    """This node's address and id; those of the local host without Ray."""
    import ray

    if not ray.is_initialized():
        return "127.0.0.1", ""
    return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()


def _abandon_in_child(worker: Worker) -> None:
    """A process that user code forks must not hold the links: their end would not be noticed."""
    reference = weakref.ref(worker)

    def abandon() -> None:
        alive = reference()
        if alive is not None:
            alive.abandon()

    os.register_at_fork(after_in_child=abandon)
