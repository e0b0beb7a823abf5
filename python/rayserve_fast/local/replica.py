"""One deployment in local testing mode: admits calls as a replica does, runs them on a loop and threads of its own.

There is one replica whatever `num_replicas` says, and the queue in front of it is that of the only caller, this
process: `max_ongoing_requests` calls run, `max_queued_requests` wait. A slot comes back when the user's code has ended,
not when a call is cancelled. With `max_batch_size` a slot is a batch's (`batches`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

from rayserve_fast.context import ReplicaContext, _local_replica, _serve_request_context
from rayserve_fast.controlplane.spec import ReplicaID, ReplicaRank
from rayserve_fast.local.batches import Batcher, LocalGroup, countdown
from rayserve_fast.local.call import LocalHead, wait_for
from rayserve_fast.replica.batches import Batches, Group, enter
from rayserve_fast.replica.calls import Calls
from rayserve_fast.replica.loop import UserLoop
from rayserve_fast.replica.servable import Servable
from rayserve_fast.replica.sync_pool import SyncPool

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import Definition, DeploymentSpec

logger = logging.getLogger("ray.serve")

#: Who is told how a job on a thread has ended: with a result, which its context comes with, or with an error.
Ends: TypeAlias = "tuple[Callable[[Any, Context], None], Callable[[BaseException], None]]"


class LocalReplica:
    """Constructed when this returns; raises what the user's constructor or `reconfigure` raises.

    Args:
        spec: the deployment; its `definition` is not read.
        definition: the user's code itself, and the arguments bound to it.
    """

    def __init__(self, spec: DeploymentSpec, definition: Definition) -> None:
        self._config = spec.config
        self._context = ReplicaContext(
            replica_id=ReplicaID(secrets.token_hex(4), spec.id),
            servable_object=None,
            _deployment_config=spec.config,
            rank=ReplicaRank(0, 0, 0),
            world_size=1,
            code_version=spec.code_version,
        )
        self._changed = threading.Condition()  # guards the next five
        self._running: set[LocalHead] = set()
        self._groups: set[LocalGroup] = set()  # that run: a loop keeps no task alive, and nobody else knows theirs
        self._waiting: deque[LocalHead] = deque()
        self._open = True
        batched = spec.config.max_batch_size is not None
        self._batcher = Batcher(spec.config, self._waiting, self._look_later) if batched else None
        self._loop = UserLoop(f"serve-{spec.name}")
        self._jobs = _Jobs(SyncPool(f"serve-{spec.name}-sync", self._loop.loop))
        self._user = Servable(self._loop, self._context)
        self._loop.start()
        try:
            self._within(self._user.construct, definition)
        except BaseException:
            self._end()
            raise
        self._calls = Calls(self._user.target, self._user.is_function)

    def begin(self, call: LocalHead) -> bool:
        """Run the call, let it wait or refuse it; on any thread. False: the replica is leaving."""
        call.replica = self
        try:
            self._calls.find_method(call.method, call.streaming)
        except Exception as error:
            self._tell(call, None, error)
            return True
        limit = self._config.max_queued_requests
        with self._changed:
            if not self._open:
                return False
            if self._batcher is not None:
                queued = len(self._waiting) - self._batcher.forming
                if 0 <= limit <= queued:
                    return self._refuse(call, queued)
                call.since = time.monotonic()
                self._waiting.append(call)
                released = self._release(self._batcher)
            elif len(self._running) >= self._config.max_ongoing_requests:
                if 0 <= limit <= len(self._waiting):
                    return self._refuse(call, len(self._waiting))
                self._waiting.append(call)
                return True
            else:
                self._running.add(call)
        if self._batcher is None:
            self._start(call)
        else:
            self._start_batches(released)
        return True

    def _refuse(self, call: LocalHead, queued: int) -> bool:
        policy = self._config.backpressure
        call.finish("backpressure", queued, self._config.max_queued_requests, policy.status_code, policy.retry_after_s)
        return True

    def cancel(self, call: LocalHead) -> None:
        """A call that has been ended by its caller: a waiting one never starts, a coroutine is cancelled."""
        with self._changed:
            if call in self._waiting:
                self._waiting.remove(call)
                return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the task has ended
            self._loop.loop.call_soon_threadsafe(lambda: call.task and call.task.cancel())

    def drain(self) -> deque[LocalHead]:
        """Take no more calls; those that wait."""
        with self._changed:
            self._open = False
            waiting, self._waiting = self._waiting, deque()
            return waiting

    def stop(self) -> None:
        """After `drain`: let the calls that run come to their end, cut off those that do not, end the user's object."""
        with self._changed:
            wait_for(self._changed, lambda: not self._running, self._config.graceful_shutdown_timeout_s)
            left = list(self._running)
        for call in left:
            call.cut_off("its deployment has been deleted or replaced")
        self._end()

    def _end(self) -> None:
        try:
            self._within(self._user.destroy)
        finally:
            self._jobs.stop()
            self._loop.stop()

    def _within(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` where `serve.get_replica_context()` gives this replica and nothing of the caller's shows."""
        context = Context()
        context.run(_local_replica.set, self._context)
        return context.run(function, *args)

    def _enter(self, call: LocalHead) -> None:
        _local_replica.set(self._context)
        _serve_request_context.set(call)

    def _start(self, call: LocalHead) -> None:
        """Run a call that has a slot."""
        if self._calls.find_method(call.method, call.streaming)[1]:
            self._jobs.put(self._run, call, (partial(self._ran, call), partial(self._ended, call, None)))
        else:
            self._loop.loop.call_soon_threadsafe(self._begin, call, context=Context())

    def _look_later(self, seconds: float) -> None:
        loop = self._loop.loop
        loop.call_soon_threadsafe(loop.call_later, seconds, self._look)

    def _look(self) -> None:
        """A window is over."""
        with self._changed:
            released = self._release(self._batcher) if self._batcher is not None and self._open else []
        self._start_batches(released)

    def _release(self, batcher: Batcher) -> list[list[LocalHead]]:
        released = batcher.take()
        for batch in released:
            self._running.update(batch)
        return released

    def _start_batches(self, released: list[list[LocalHead]]) -> None:
        for batch in released:
            self._loop.loop.call_soon_threadsafe(self._begin_batch, batch, context=Context())

    def _begin_batch(self, batch: list[LocalHead]) -> None:
        """On the loop's thread."""
        _local_replica.set(self._context)
        groups, failures = Batches(self._calls).group([call for call in batch if call.outcome is None])
        for call, error in failures:
            self._tell(call, None, error)
        served: list[LocalGroup] = []
        ended = countdown(len(groups), partial(self._batch_ended, batch, served))
        served += [LocalGroup(group, self._enter_group, self._tell, ended) for group in groups]
        with self._changed:
            self._groups.update(served)
        if not served:
            self._batch_ended(batch, served)
        for local in served:
            if local.sync:
                self._jobs.put(LocalGroup.run, local, (partial(local.ran, loop=self._loop.loop), local.fail))
            else:
                local.start()

    def _enter_group(self, group: Group) -> None:
        _local_replica.set(self._context)
        enter(self._context.app_name, len(group.heads), group.model_id)

    def _tell(self, call: LocalHead, result: Any, error: BaseException | None) -> None:
        if call.outcome is None:
            call.finish(*self._answer(call, result, error))

    def _batch_ended(self, batch: list[LocalHead], served: list[LocalGroup]) -> None:
        """All of its calls are answered: its slot goes to the next."""
        with self._changed:
            self._running.difference_update(batch)
            self._groups.difference_update(served)
            served.clear()  # they hold this list by what they call at their end
            released = []
            if self._batcher is not None:
                self._batcher.running -= 1
                released = self._release(self._batcher) if self._open else []
            self._changed.notify_all()
        self._start_batches(released)

    def _run(self, call: LocalHead) -> Any:
        """On a thread of the pool."""
        self._enter(call)
        return self._calls.run(call) if call.outcome is None else None

    def _begin(self, call: LocalHead) -> None:
        """On the loop's thread."""
        self._enter(call)
        if call.outcome is not None:  # cancelled before its first step
            return self._ended(call)
        try:
            return self._follow(call, self._calls.begin(call))
        except BaseException as error:
            return self._ended(call, error=error)

    def _follow(self, call: LocalHead, coroutine: Coroutine[Any, Any, Any]) -> None:
        """On the loop's thread, in the call's context: run the coroutine as a task."""
        call.task = asyncio.get_running_loop().create_task(coroutine)
        if call.outcome is not None:
            call.task.cancel()
        call.task.add_done_callback(lambda task: self._ended_task(call, task))

    def _ran(self, call: LocalHead, result: Any, context: Context) -> None:
        """A sync function has returned; if it is a coroutine, the loop goes on with it."""
        if inspect.iscoroutine(result):
            self._loop.loop.call_soon_threadsafe(self._follow, call, result, context=context)
        else:
            self._ended(call, result)

    def _ended_task(self, call: LocalHead, task: asyncio.Task[Any]) -> None:
        try:
            result = task.result()
        except BaseException as error:
            self._ended(call, error=error)
        else:
            self._ended(call, result)

    def _ended(self, call: LocalHead, result: Any = None, error: BaseException | None = None) -> None:
        """Answer the call, unless it was cancelled, and give its slot to the next."""
        self._tell(call, result, error)
        with self._changed:
            self._running.discard(call)
            following = self._waiting.popleft() if self._waiting else None
            if following is None:
                self._changed.notify_all()
            else:
                self._running.add(following)
        if following is not None:
            self._start(following)

    def _answer(self, call: LocalHead, result: Any, error: BaseException | None) -> tuple[Any, ...]:
        if error is None and call.streaming:
            return ("end",)
        if error is None:
            try:
                pickle, buffers = self._calls.dump(result)
                return "value", pickle, [bytearray(buffer) for buffer in buffers]
            except Exception as unsendable:
                error = unsendable
        try:
            return "fault", *self._calls.dump_error(call, error)
        except Exception as broken:  # such as an exception whose text raises
            logger.exception("The error of %s cannot be told.", call.key)
            return "internal", repr(type(broken))


class _Jobs:
    """What `SyncPool` takes its jobs from; there is always a thread for a job, as running calls are bounded."""

    def __init__(self, pool: SyncPool) -> None:
        self._pool = pool
        self._queue: SimpleQueue[tuple[Callable[[Any], Any], object, Ends] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._busy = 0
        pool.worker = self

    def put(self, call: Callable[[Any], Any], argument: object, ends: Ends) -> None:
        """Have a thread call it, and tell one of the two what came of it."""
        with self._lock:
            self._busy += 1
            more = self._busy > self._threads
            self._threads += more
        self._queue.put((call, argument, ends))
        if more:
            self._pool.spawn()

    def stop(self) -> None:
        """End the threads."""
        self._pool.stop()

    def take(self) -> tuple[Callable[[Any], Any], object, Ends] | None:
        return self._queue.get()

    def done(self, head: Ends, result: Any, context: Context) -> None:
        self._leave()
        ran, _ = head
        ran(result, context)

    def fail(self, head: Ends, error: BaseException) -> None:
        self._leave()
        _, failed = head
        failed(error)

    def stop_pool(self) -> None:
        for _ in range(self._threads):
            self._queue.put(None)

    def _leave(self) -> None:
        with self._lock:
            self._busy -= 1
