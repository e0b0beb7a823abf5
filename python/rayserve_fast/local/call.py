"""One handle call in local testing mode: `LocalHead` is a replica's `CallHead`, `LocalCall` a caller's `_core.Call`.

Arguments, results and items cross as the bytes that would have travelled, so both sides get copies, and what cannot be
pickled fails here as it would there. The first outcome counts: a call that was cancelled stays so, whatever its method
goes on to do, and so do the calls that were made for it. A streaming method may be 256 KiB ahead of whoever takes its
items, then it is suspended; once nobody can take them any more it runs to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rayserve_fast import values
from rayserve_fast.context import _RequestContext

if TYPE_CHECKING:
    from rayserve_fast.local.replica import LocalReplica
    from rayserve_fast.values import Buffer

#: Bytes of items that may wait to be taken; the wire's window.
WINDOW = 256 << 10
#: How long a generator may keep the loop without suspending, seconds.
BREATH_S = 0.001


class LocalHead(_RequestContext):
    """A call at the replica, and the context of the request for what it runs.

    Args:
        key: the deployment, `app#name`.
        method: of it.
        texts: route, request id, model and session of the request that the call belongs to.
        stream: the caller wants items.
    """

    def __init__(self, key: str, method: str, texts: tuple[str, str, str, str], stream: bool) -> None:
        route, request_id, model, session = texts
        super().__init__(route, request_id, request_id, key.rpartition("#")[0], model, session)
        self.key = key
        self.method = method
        self.streaming = stream
        self.replica: LocalReplica | None = None  # where it runs or waits
        self.task: asyncio.Task[Any] | None = None  # on the loop of that replica
        self.since = 0.0  # `time.monotonic()` when it came to wait for its batch
        self.outcome: tuple[Any, ...] | None = None  # a word and what belongs to it, see `response._Response`
        self.relayed: list[tuple[int, Buffer, Sequence[Buffer]]] = []  # arguments that other calls have answered
        self._arguments: tuple[bytes, Sequence[Buffer]] = b"", ()
        self._keep: object = None
        self._dependents: list[Callable[[], None]] = []  # once each, after the end
        self._changed = threading.Condition()  # guards what follows, and the outcome
        self._wakers: list[Callable[[], None]] = []  # once each, of the coroutines that wait for a change
        self._items: list[Any] = []
        self._untaken = 0  # their bytes
        self._wanted = True
        self._children: weakref.WeakSet[LocalHead] = weakref.WeakSet()  # what was called on behalf of this call
        self._breath = time.monotonic()

    __eq__ = object.__eq__  # two calls of one request are two
    __hash__ = object.__hash__

    def give(self, pickle: bytes, buffers: Sequence[Buffer], keep: object) -> None:
        """The arguments, as `_core.Callee.begin` gets them; the buffers are the callee's own."""
        self._arguments, self._keep = (pickle, buffers), keep

    def arguments(self) -> tuple[bytes, Sequence[Buffer], list[tuple[int, Buffer, Sequence[Buffer]]]]:
        """The pickle of the pair of arguments, its buffers, and the answers of other calls among them."""
        return *self._arguments, self.relayed

    def finish(self, *outcome: Any) -> bool:
        """End the call. False: it had ended."""
        with self._changed:
            if self.outcome is not None:
                return False
            self.outcome = outcome
            self._wake()
            dependents, self._dependents = self._dependents, []
        for dependent in dependents:
            dependent()
        return True

    def when_ended(self, dependent: Callable[[], None]) -> None:
        """Call `dependent` after the end, or now if that was before."""
        with self._changed:
            if self.outcome is None:
                return self._dependents.append(dependent)
        return dependent()

    def cancel(self) -> bool:
        """End the call and what was called for it: what waits never starts, coroutines are cancelled."""
        if not self.finish("cancelled"):
            return False
        if self.replica is not None:
            self.replica.cancel(self)
        self._cancel_children()
        return True

    def cut_off(self, why: str) -> None:
        """End the call because its replica ends, and cancel what was called for it."""
        self.finish("died", why)
        self._cancel_children()

    def _cancel_children(self) -> None:
        with self._changed:
            children = list(self._children)
        for child in children:
            child.cancel()

    def adopt(self, child: LocalHead) -> None:
        """The child is called by what this call runs."""
        with self._changed:
            self._children.add(child)

    def put_item(self, pickle: bytes, buffers: Sequence[Buffer]) -> Awaitable[None] | None:
        """Send an item; what comes back is to be awaited before the next, a pool thread has waited already."""
        with self._changed:
            if self.outcome is not None:
                raise asyncio.CancelledError
            if self._wanted:
                self._items.append((pickle, [bytearray(buffer) for buffer in buffers]) if buffers else pickle)
                self._untaken += len(pickle) + sum(len(buffer) for buffer in buffers)
                self._wake()
        if asyncio._get_running_loop() is None:
            self.wait(self._is_open, None)
            if self.outcome is not None:
                raise asyncio.CancelledError
        elif not self._is_open():
            return self.watch(self._is_open)
        elif time.monotonic() - self._breath > BREATH_S:
            return self._pause()
        return None

    def take(self) -> list[Any]:
        """The items that have come since the last time."""
        with self._changed:
            items, self._items, self._untaken = self._items, [], 0
            self._wake()
            return items

    def forget(self) -> None:
        """Nobody will take items any more."""
        self._wanted = False
        self.take()

    def is_ready(self) -> bool:
        """Whether there is an outcome, or an item."""
        return self.outcome is not None or bool(self._items)

    def wait(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Whether `condition` comes true within `timeout_s`."""
        with self._changed:
            return wait_for(self._changed, condition, timeout_s)

    async def watch(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` is true; a cancelled wait leaves no trace."""
        loop = asyncio.get_running_loop()
        while True:
            future = loop.create_future()
            with self._changed:
                if condition():
                    return
                self._wakers.append(wake := partial(_wake, loop, future))
            try:
                await future
            finally:
                with self._changed, contextlib.suppress(ValueError):
                    self._wakers.remove(wake)

    def _is_open(self) -> bool:
        return self._untaken < WINDOW or self.outcome is not None

    async def _pause(self) -> None:
        await asyncio.sleep(0)
        self._breath = time.monotonic()

    def _wake(self) -> None:
        self._changed.notify_all()
        wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()


def wait_for(changed: threading.Condition, condition: Callable[[], bool], timeout_s: float | None) -> bool:
    """`changed.wait_for`, which cannot count to a time that nobody outlives."""
    return changed.wait_for(condition, None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))


def _wake(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class LocalCall:
    """The caller's end of a call."""

    def __init__(self, head: LocalHead) -> None:
        self._head = head

    @property
    def head(self) -> LocalHead:
        """The other end."""
        return self._head

    @property
    def request_id(self) -> str:
        """The id of the request that the call belongs to."""
        return self._head.request_id

    def ready(self) -> bool:
        """Whether there is an outcome, or an item of a stream."""
        return self._head.is_ready()

    def waiting(self) -> None:
        """None: there is no quicker way to wait than `watch`."""

    def items(self) -> list[Any]:
        """The items that have come since the last time, each a pickle or a pickle and its buffers."""
        return self._head.take()

    def wait(self, timeout_s: float | None, main: bool) -> bool:
        """Whether it is ready within `timeout_s`. Python's own waits hear of signals, `main` or not."""
        return self._head.wait(self._head.is_ready, timeout_s)

    async def watch(self) -> None:
        """Return when it is ready; a cancelled wait leaves the call alone."""
        await self._head.watch(self._head.is_ready)

    def cancel(self) -> bool:
        """End the call here and tell the replica. False: it had ended."""
        return self._head.cancel()

    def outcome(self) -> Any:
        """What became of it: a word and what belongs to it, such as the value; None: it goes on."""
        outcome = self._head.outcome
        if outcome is not None and outcome[0] == "value":
            return "value", values.loads(*outcome[1:])
        return outcome

    def __del__(self) -> None:
        if self._head.streaming:
            self._head.forget()
