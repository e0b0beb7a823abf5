"""This process's end of all handle calls: one native client, the thread that tends it, the asyncio loops that wait.

A caller comes into being with the first call. Its tender is a Python thread that sleeps in Rust: it looks after calls
that nobody waits for, and takes over snapshots. The controller is always asked for the next one, and answers when there
is one; no call waits for that unless it cannot be sent without, and the tender never does, as others' calls need it. At
exit what has a replica is sent, every waiter is woken and the tender joined, because a thread that comes back to a
finalizing interpreter is killed in the middle of native code. `ray.shutdown` ends a caller, and none comes into being
without Ray, which is not for a call to start. A forked child starts afresh; one whose parent was connected to Ray
cannot, as it has neither a connection of its own nor a use for its parent's, over which every question would wait for
ever.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.util import client as ray_client

from rayserve_fast import _core
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.client import NotRunningError
from rayserve_fast.exceptions import RayServeException

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from concurrent.futures import Future

    from rayserve_fast.routing import Routers

#: `Errand::Fresh` of the native client.
FRESH = 2
#: `Errand::Choose`.
CHOOSE = 3
#: How long the interpreter's exit waits for the tender, seconds; it comes at once unless a Ray call holds it.
EXIT_TIMEOUT_S = 2.0
#: How often a process that is about to end looks whether its calls have left, seconds.
SEND_OFF_LOOK_S = 0.005


class Source(Protocol):
    """Where snapshots come from; used on the tender's thread only, and does not wait."""

    def next(self, newer_than: tuple[int, int] | None) -> Future[bytes]:
        """One that is newer, once there is one; None: the present one.

        Ends with `NotRunningError` if the cluster is gone that the caller knows, also if another is there.
        """


class Caller:
    """The calls of one process to one cluster.

    Args:
        node_id: the Ray node of this process; replicas on it are reached by Unix sockets.
        token: the cluster's secret.
        source: gives the snapshots.
    """

    def __init__(self, node_id: str, token: bytes, source: Source) -> None:
        self.client = _core.Client(node_id, token)
        self.chooser = _core.Chooser(self.client)
        self._routers: Routers | None = None
        self._node_id = node_id
        self.forked = False
        self._source = source
        # The questions that have not been answered.
        self._next: Future[bytes] | None = None
        self._present: Future[bytes] | None = None
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWatch] = weakref.WeakKeyDictionary()
        self._tender = threading.Thread(target=self._tend, name="rayserve-fast-calls", daemon=True)
        self._tender.start()

    def _tend(self) -> None:
        while errand := self.client.tend():
            try:
                if errand == CHOOSE:
                    self._choose()
                else:
                    if errand == FRESH:
                        self._present = self._ask(None)
                    self._hear()  # in any case: after a failure nothing may have been asked for
            except NotRunningError:
                return replace(self)
            except Exception as error:
                self._next = self._present = None
                self.client.unpublished(f"The controller cannot be asked: {error}")
        return None

    def _hear(self) -> None:
        """Take over the snapshots that have come, and ask for the next one."""
        if (present := self._present) is not None and present.done():
            self._present = None
            self.client.publish(present.result(), True)
        if self._next is not None:
            if not self._next.done():
                return
            self.client.publish(self._next.result(), False)
        self._next = self._ask(self.client.version())

    def _ask(self, newer_than: tuple[int, int] | None) -> Future[bytes]:
        answer = self._source.next(newer_than)
        answer.add_done_callback(lambda _: self.client.announce())
        return answer

    @property
    def routers(self) -> Routers:
        """The thread on which routers of the user's own run."""
        if self._routers is None:
            from rayserve_fast.routing import Routers

            self._routers = Routers(self._node_id)
        return self._routers

    def _choose(self) -> None:
        """Hand the calls that wait for their router to it."""
        for asked in self.chooser.choosing():
            self.routers.submit(self._route(*asked))

    async def _route(
        self,
        call: _core.Call,
        deployment: str,
        texts: tuple[str, ...],
        flags: tuple[bool, bool],
        encoded: tuple[Any, ...],
    ) -> None:
        from rayserve_fast.routing import completed, pending_call

        known, assign = partial(self.chooser.replicas, deployment), partial(self.chooser.assign, call)
        pending = pending_call(texts, flags, encoded)
        router, replica_id = await self.routers.place(deployment, known, pending, assign)
        if replica_id is not None:
            await self.watch(asyncio.get_running_loop()).wait_for_end(call)
            completed(router, replica_id, pending.metadata.internal_request_id)

    def watch(self, loop: asyncio.AbstractEventLoop) -> LoopWatch:
        """What calls wait on that are awaited in `loop`, which is the running one."""
        home = _home
        if home is not None and home.loop is loop:
            if home.watch is None or home.watch.client is not self.client:
                home.watch = HomeWatch(self.client, home)
            return home.watch
        watch = self._loops.get(loop)
        if watch is None:
            watch = self._loops[loop] = LoopWatch(self.client, loop)
        return watch

    def send_off(self, timeout_s: float, queued: bool) -> bool:
        """Whether all calls that were begun have left this process within that time.

        Args:
            timeout_s: how long to wait for that.
            queued: also for those that wait for a replica.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            bound, waiting = self.client.unsent()
            if not bound and not (queued and waiting):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(SEND_OFF_LOOK_S)

    def close(self) -> None:
        """End every call and every wait. Calls made later are refused."""
        self.client.close()
        if threading.current_thread() is not self._tender:
            self._tender.join(EXIT_TIMEOUT_S)

    def abandon(self) -> None:
        """In a forked child: leave the sockets to the parent."""
        self.forked = True
        self.client.abandon()


class LoopWatch:
    """Lets one asyncio loop read answers itself, and hear of those that another thread has read."""

    def __init__(self, client: _core.Client, loop: asyncio.AbstractEventLoop) -> None:
        self.client = client
        # Not the loop itself: the watch is the value of a weak dictionary whose key is the loop.
        self._loop = weakref.ref(loop)
        self._mailbox = _core.Mailbox(loop)
        self._reading = False
        loop.add_reader(self._mailbox.fileno(), self.client.pump, self._mailbox)

    def wait(self, call: _core.Call) -> Awaitable[None]:
        """Ends with the call, or with its next item; a cancelled wait leaves the call alone."""
        if not self._reading and (loop := self._loop()) is not None:
            self._reading = True
            loop.add_reader(self.client.fileno(), self._pump)
        return self._mailbox.wait(call)

    def wait_for_end(self, call: _core.Call) -> Awaitable[None]:
        """Ends with the call, for somebody who takes nothing from it and leaves the reading to those who do."""
        return self._mailbox.wait_for_end(call)

    def _pump(self) -> None:
        if self._mailbox.is_empty() and (loop := self._loop()) is not None:
            # Only other threads' answers come now, and they read them themselves.
            self._reading = False
            loop.remove_reader(self.client.fileno())
        else:
            self.client.pump(self._mailbox)


class HomeWatch(LoopWatch):
    """The same for a replica's loop, whose worker reads the answers with the requests."""

    def __init__(self, client: _core.Client, home: _Home) -> None:
        super().__init__(client, home.loop)
        home.worker.adopt(client, self._mailbox)

    def wait(self, call: _core.Call) -> Awaitable[None]:
        return call.waiting() or self._mailbox.wait(call)


@dataclass
class _Home:
    """The replica in this process, if there is one."""

    loop: asyncio.AbstractEventLoop
    worker: _core.Worker
    watch: HomeWatch | None = None


_current: Caller | None = None
_identity: tuple[str, bytes] | None = None
_home: _Home | None = None
_exiting = False
_ray_is_parents = False
_lock = threading.Lock()


def exists() -> bool:
    """Whether this process has made a call."""
    return _current is not None


def can_connect() -> bool:
    """Whether there is a caller or what it takes to make one. Asking a Ray that is not there would start one."""
    return _current is not None or _has_ray()


def _has_ray() -> bool:
    return _identity is not None or ray.is_initialized()  # a replica has one


def current() -> Caller:
    """This process's caller; the first call makes it, and in a driver asks Ray for the cluster's secret."""
    return _current or _connect()


def introduce(node_id: str, token: bytes) -> None:
    """Tell a replica's process what a driver asks Ray for: its first call comes from a loop, which must not block."""
    global _identity
    _identity = node_id, token


def settle(loop: asyncio.AbstractEventLoop, worker: _core.Worker) -> None:
    """The calls of this loop go through this worker's poller from now on."""
    global _home
    _home = _Home(loop, worker)


def unsettle(worker: _core.Worker) -> None:
    """The worker closes."""
    global _home
    if _home is not None and _home.worker is worker:
        _home = None


def _connect() -> Caller:
    with _lock:
        if _current is not None:
            return _current
        if _exiting:
            raise RuntimeError("The interpreter exits: no more calls can be made.")
        if _ray_is_parents:
            raise RuntimeError(
                "Handles do not work in a process that was forked from one that is connected to Ray: make the calls "
                "in the parent or in a Ray task, or start the process with multiprocessing's 'spawn'."
            )
        if ray_client.ray.is_connected():
            raise RayServeException(
                "Handles do not work over Ray Client, as its process cannot reach the replicas' nodes: "
                "make the calls in a Ray task or actor, or use HTTP."
            )
        node_id, token = _identity or (ray.get_runtime_context().get_node_id(), client.cluster_token())
        made = Caller(node_id, token, _Controller(token))
        # Ray tells nobody of its shutdown, but gives up this object then. A Ray without it leaves callers to `reset`.
        of_this_ray = getattr(ray._private.worker.global_worker, "function_actor_manager", None)
        if of_this_ray is not None:
            weakref.finalize(of_this_ray, _leave, weakref.ref(made)).atexit = False
        return _set(made)


class _Controller:
    """The controller as a source."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    def next(self, newer_than: tuple[int, int] | None) -> Future[bytes]:
        # Ray may be left while the tender is on its way to a question, which would connect the process again.
        if not _has_ray():
            raise NotRunningError("This process is not connected to Ray any more.")
        return client.next_snapshot(newer_than, self._token)


def _set(caller: Caller) -> Caller:
    global _current
    _current = caller
    return caller


def _leave(made: weakref.ref[Caller]) -> None:
    """The process has left the cluster of this caller, and would hear of no replica any more."""
    if (old := made()) is not None:
        replace(old)


def replace(old: Caller) -> None:
    """Forget a caller whose cluster is gone; the next call finds the new one."""
    global _current
    if _current is old:
        _current = None
    old.close()


def send_off(timeout_s: float) -> bool:
    """Whether this process's calls have left it within that time, those that wait for a replica included."""
    return _current is None or _current.send_off(timeout_s, queued=True)


def reset() -> None:
    """Close this process's caller, if there is one: Serve is being shut down."""
    if (caller := _current) is not None:
        replace(caller)


def _at_exit() -> None:
    global _exiting
    _exiting = True
    if _current is not None:
        _current.send_off(EXIT_TIMEOUT_S, queued=False)
    reset()


def _after_fork() -> None:
    global _current, _lock, _ray_is_parents
    _lock = threading.Lock()
    _ray_is_parents = ray.is_initialized()
    if _current is not None:
        _current.abandon()
        _current = None


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
