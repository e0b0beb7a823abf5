"""Ray ObjectRefs for the answers of handle calls, for whoever wants to pass them to Ray's tasks and actors.

Answers do not come by way of Ray, so a reference needs somebody in Ray's world who owns the value to come: an actor of
this process, made when the first reference is asked for and gone with the process. A thread waits for the answer and
hands it to the actor, whose method call is the reference. What Ray Serve gets for nothing costs a task here.

Invariant: each promise is kept or broken. Whatever keeps a value from the actor breaks its promise, and the reason
travels as bytes, which always arrive. Ray starts no task that has an error of Ray's own or a failed reference among its
arguments; nothing that is told is an argument by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from rayserve_fast import values
from rayserve_fast.exceptions import RayServeException, RequestCancelledError
from rayserve_fast.own_actor import OwnActor

#: How long to look away from a call that no replica has yet, seconds.
GLANCE_S = 0.002


class _Promises:
    """Runs in the actor; everything on its one loop."""

    def __init__(self) -> None:
        self._kept: dict[int, asyncio.Queue[tuple[str, Any]]] = {}

    def _queue(self, key: int) -> asyncio.Queue[tuple[str, Any]]:
        return self._kept.setdefault(key, asyncio.Queue())

    async def keep(self, key: int, kept: tuple[str, Any]) -> None:
        """A value or an item, an error's bytes, or the end of a stream."""
        self._queue(key).put_nowait(kept)

    async def value(self, key: int) -> Any:
        """The value, once it is kept."""
        word, what = await self._queue(key).get()
        del self._kept[key]
        if word == "error":
            raise _broken(what)
        return what

    async def items(self, key: int) -> AsyncIterator[Any]:
        """The items, as they are kept."""
        while True:
            word, what = await self._queue(key).get()
            if word == "value":
                yield what
                continue
            del self._kept[key]
            if word == "error":
                raise _broken(what)
            return


def _broken(encoded: bytes) -> BaseException:
    """What to raise in the actor, so that Ray makes a RayTaskError of it again."""
    error = values.load_error(encoded)
    if isinstance(error.cause, (Exception, asyncio.CancelledError)):
        return error.cause
    return RayServeException(str(error))  # its cause would end the actor, such as SystemExit


_own = OwnActor(_Promises)
_keys = itertools.count()
_passing: set[asyncio.Future[None]] = set()


def of_value(result: Callable[[], Any]) -> Any:
    """A reference to what `result` returns or raises; it may take its time."""
    actor, key = _own.actor(), next(_keys)
    ref = actor.value.remote(key)
    _fulfil(actor, key, lambda: _keep(actor, key, "value", result()))
    return ref


def of_awaitable(answer: Awaitable[Any]) -> Any:
    """A reference to what `answer` gives; it is awaited in the running loop, by a task of its own."""
    actor, key = _own.actor(), next(_keys)
    ref = actor.value.remote(key)

    async def pass_on() -> None:
        try:
            await actor.keep.remote(key, ("value", await answer))
        except BaseException as error:
            _fail(actor, key, error)

    task = asyncio.ensure_future(pass_on())
    _passing.add(task)  # the loop itself does not keep its tasks
    task.add_done_callback(_passing.discard)
    return ref


def of_items(items: Callable[[], Any]) -> Any:
    """A generator of references to what iterating `items()` gives."""
    actor, key = _own.actor(), next(_keys)
    refs = actor.items.options(num_returns="streaming").remote(key)

    def pass_on() -> None:
        for item in items():
            _keep(actor, key, "value", item)
        _keep(actor, key, "end", None)

    _fulfil(actor, key, pass_on)
    return refs


def _fulfil(actor: Any, key: int, pass_on: Callable[[], Any]) -> None:
    def run() -> None:
        try:
            pass_on()
        except BaseException as error:
            _fail(actor, key, error)

    threading.Thread(target=run, name="rayserve-fast-promise", daemon=True).start()


def _keep(actor: Any, key: int, word: str, what: Any) -> None:
    """Return when the actor has it, as calls of such an actor may overtake each other; raise why it cannot have it."""
    actor.keep.remote(key, (word, what)).future().result()


def _fail(actor: Any, key: int, error: BaseException) -> None:
    actor.keep.remote(key, ("error", values.dump_error(error, "response")))


class _Referable:
    """What both kinds of responses need for it."""

    _handle: Any
    _call: Any
    _cancelled: bool
    _ref: Any = None
    request_id: Any

    def _open(self) -> bool:
        """Whether no replica has the call yet."""
        call = self._call
        if self._handle._local:
            raise RuntimeError("There are no ObjectRefs in local testing mode: pass the response or its value.")
        return call is not None and not call.assigned()

    def _refer(self, make: Callable[[Any], Any], what: Any) -> Any:
        if self._ref is None:
            if self._cancelled:
                raise RequestCancelledError(self.request_id)
            self._ref = make(what)
        return self._ref

    def _until_assigned(self, timeout_s: float | None, instead: str, in_loop: bool) -> None:
        if asyncio._get_running_loop() is not None and not in_loop:
            raise RuntimeError(
                f"Sync methods should not be called from within an `asyncio` event loop. Use `await {instead}` instead."
            )
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while self._open():
            if until is not None and time.monotonic() >= until:
                raise TimeoutError("No replica has taken the call in time.")
            time.sleep(GLANCE_S)

    async def _assigned(self) -> None:
        while self._open():
            await asyncio.sleep(GLANCE_S)


class ReferableValue(_Referable):
    """The part of `DeploymentResponse` that makes an ObjectRef of it, as soon as a replica has the call."""

    result: Callable[[], Any]

    def _ref_now(self) -> Any:
        """A `ray.ObjectRef` to the answer, whether or not a replica has the call."""
        self._open()
        return self._refer(of_value, self.result)

    async def _to_object_ref(self) -> Any:
        """A `ray.ObjectRef` to the answer."""
        await self._assigned()
        return self._refer(of_value, self.result)

    def _to_object_ref_sync(self, _timeout_s: float | None = None, _allow_running_in_event_loop: bool = False) -> Any:
        """The same from a thread without a running loop."""
        self._until_assigned(_timeout_s, "response._to_object_ref()", _allow_running_in_event_loop)
        return self._refer(of_value, self.result)


class ReferableItems(_Referable):
    """The part of `DeploymentResponseGenerator` that makes ObjectRefs of its items, which nobody else may take then."""

    __iter__: Callable[[], Any]

    async def _to_object_ref_gen(self) -> Any:
        """A `ray.ObjectRefGenerator` of the items."""
        await self._assigned()
        return self._refer(of_items, self.__iter__)

    def _to_object_ref_gen_sync(
        self, _timeout_s: float | None = None, _allow_running_in_event_loop: bool = False
    ) -> Any:
        """The same from a thread without a running loop."""
        self._until_assigned(_timeout_s, "response._to_object_ref_gen()", _allow_running_in_event_loop)
        return self._refer(of_items, self.__iter__)
