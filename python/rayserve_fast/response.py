"""What a handle call returns: the answer to come, or the items of a stream, and what becomes of each outcome.

A response reads its call's outcome when it is asked, where it is asked: `.result()` and `for` on the thread that waits,
`await` and `async for` on the loop that waits. How calls are made is `handle.py`, where the public names stand, as in
Ray Serve. Invariant: an outcome is taken from its call once.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from ray.exceptions import ActorDiedError, GetTimeoutError

from rayserve_fast import answers, promises, values
from rayserve_fast.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
    RequestCancelledError,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from rayserve_fast import _core
    from rayserve_fast.caller import Caller
    from rayserve_fast.handle import DeploymentHandle
    from rayserve_fast.local import Applications, LocalCall

    AnyCaller: TypeAlias = Caller | Applications
    AnyCall: TypeAlias = _core.Call | LocalCall


class _Response:
    """A call that is on its way, and how one waits for it and reads what became of it."""

    # What most responses never have is not set on each of them.
    #: Its arguments that are answers of other calls.
    _answers: Sequence[tuple[int, answers.Answer]] = ()
    _error: BaseException | None = None
    _cancelled = False
    #: Of a call that could not be made.
    _request_id = ""

    def __init__(self, handle: DeploymentHandle, owner: AnyCaller | None, call: AnyCall | None) -> None:
        self._handle = handle
        self._caller = owner
        #: None once its outcome was taken.
        self._call = self._made = call

    @classmethod
    def _of_error(cls, handle: DeploymentHandle, request_id: str, error: BaseException) -> Self:
        """The response to a call that could not be made."""
        response = cls(handle, None, None)
        response._request_id, response._error = request_id, error
        return response

    @property
    def request_id(self) -> str:
        """The id of the request that the call belongs to."""
        return self._request_id if self._made is None else self._made.request_id

    @property
    def by_reference(self) -> bool:
        """False: the value itself travels."""
        return False

    def cancel(self) -> None:
        """Cancel the call: a queued one never starts, a running coroutine gets `asyncio.CancelledError`."""
        if (call := self._call) is not None and call.cancel():
            self._cancelled = True

    def cancelled(self) -> bool:
        """Whether `cancel` came before the answer."""
        return self._cancelled

    def _wait_here(self, call: AnyCall, timeout_s: float | None, instead: str) -> bool:
        """Wait on this thread; whether there is something before the time is over."""
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(
                f"Sync methods should not be called from within an `asyncio` event loop. Use `{instead}` instead."
            )
        self._check_process()
        # Signals are for the main thread, which must not sleep through them.
        return call.wait(timeout_s, threading.current_thread() is threading.main_thread())

    def _waiting(self, call: AnyCall) -> Awaitable[None]:
        watch = self._check_process().watch(asyncio.get_running_loop())
        return watch.wait(call)  # type: ignore[arg-type]  # each kind of caller with its own kind of call

    def _check_process(self) -> AnyCaller:
        assert self._caller is not None, "a call has a caller"
        if self._caller.forked:
            raise RuntimeError("The call was made before this process was forked; its answer is the parent's.")
        return self._caller

    def _raise(self, kind: str, *rest: Any) -> NoReturn:
        """Raise what an outcome of the native client stands for that is an error."""
        if kind == "fault":
            self._raise_fault(*rest)
        if kind == "argument":
            raise self._answers[rest[0]][1]._failure()
        if kind == "died":
            error = ActorDiedError()
            error.error_msg = f"{error.error_msg} {self._handle._described()}: {rest[0]}"
            raise error
        if kind == "backpressure":
            raise BackPressureError(*rest)
        if kind == "unavailable":
            raise DeploymentUnavailableError._because(self._handle.deployment_id, rest[0])
        if kind == "unknown":
            raise DeploymentUnavailableError._because(
                self._handle.deployment_id, f"{self._handle.deployment_id} does not exist."
            )
        if kind == "gone":
            raise ReplicaUnavailableError(rest[0])
        if kind == "cancelled":
            if not self._cancelled and asyncio._get_running_loop() is not None:
                raise asyncio.CancelledError  # with the request that the call belongs to, and that waits here
            raise RequestCancelledError(self.request_id)
        if kind == "closed":
            raise RayServeException(f"{self._handle._described()} has not answered: Serve has been shut down.")
        raise RayServeException(f"{self._handle._described()}: {rest[0]}")

    def _raise_fault(self, fault: int, payload: bytes) -> NoReturn:
        """Raise what an ERROR frame says; the numbers are `Fault` of the wire format."""
        if fault == 2:
            raise values.load_error(payload)
        if fault == 4:
            raise RequestCancelledError(self.request_id)
        text = payload.decode("utf-8", "replace")
        if fault == 5:
            raise TimeoutError(text)
        if fault in (7, 8):
            raise values.task_error(TypeError(text), self._handle._options.method_name)
        raise values.task_error(RayServeException(text), self._handle._options.method_name)

    def __str__(self) -> str:
        return f"{self!r} (no value yet: `await` it, or call `.result()`)"  # in Ray's error about a list of these

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}(deployment='{self._handle.deployment_name}', request_id='{self.request_id}')"


class _Explained(type):
    """Of classes whose text says what their objects are not: it stands in Ray's error when `ray.get` is given one."""

    def __str__(cls) -> str:
        return f"{cls!r} (no ObjectRef: `await` it, or call `.result()`)"


class DeploymentResponse(_Response, answers.Answer, promises.ReferableValue, metaclass=_Explained):
    """The answer to a call, which is on its way already; made by `DeploymentHandle.remote`.

    The answer is read when it is asked for, once; asking again gives the same value or raises the same error.
    """

    __module__ = "rayserve_fast.handle"  # where users find it

    _value: Any = None

    def result(self, *, timeout_s: float | None = None) -> Any:
        """Wait for the answer and return it.

        Args:
            timeout_s: seconds to wait; None: as long as it takes. The call goes on when the time is over.

        Raises:
            GetTimeoutError: a TimeoutError; there is no answer yet.
            RuntimeError: the thread runs an asyncio loop, which would stand still; use `await`.
            RayTaskError: the method raised; the error is also an instance of the type that it raised.
            ActorDiedError: the replica died during the call.
            RequestCancelledError: the call was cancelled.
            BackPressureError: `max_queued_requests` calls of this process wait already.
            DeploymentUnavailableError: the deployment failed to deploy, or does not exist.
        """
        if (call := self._call) is not None:
            if not self._wait_here(call, timeout_s, "await response"):
                raise GetTimeoutError(f"{self._handle._described()} has not answered within {timeout_s} s.")
            self._settle(call)
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # or its error's traceback would hold it, and what both hold, until a collection
        return self._value

    def __await__(self) -> Generator[Any, None, Any]:
        if (call := self._call) is not None:
            if not call.ready():
                yield from call.waiting() or self._waiting(call).__await__()
            self._settle(call)
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self
        return self._value

    def _settle(self, call: AnyCall) -> None:
        try:
            outcome = call.outcome()
            if outcome[0] != "value":
                self._raise(*outcome)
            self._value = outcome[1]
        except Exception as error:
            self._error = error.with_traceback(None)  # of this module alone
        self._call = None
        if self._answers:
            self._answers = ()

    def __reduce__(self) -> NoReturn:
        raise RayServeException(
            "`DeploymentResponse` is not serializable. A handle call takes it as a top-level argument, not inside of a "
            "list or another object; elsewhere only its value can be sent: `await` it first."
        )


class DeploymentResponseGenerator(_Response, answers.Stream, promises.ReferableItems):
    """The items of a streaming call, in order; made by `handle.options(stream=True).method.remote()`.

    Iterate it once, with `for` or `async for`; every item is decoded when it is asked for. A method that is far ahead
    of whoever takes its items is suspended.
    """

    __module__ = "rayserve_fast.handle"  # where users find it

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._items: deque[Any] = deque()

    def cancel(self) -> None:
        """Cancel the call, as that of a single answer; items that have come and were not taken are dropped."""
        super().cancel()
        if self._cancelled:
            self._items.clear()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while not self._items:
            if (call := self._call) is None:
                raise self._take_error() or StopIteration
            self._wait_here(call, None, "async for` or `await response.__anext__()")
            self._take(call)
        return _load_item(self._items.popleft())

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            if (call := self._call) is None:
                raise self._take_error() or StopAsyncIteration
            if not call.ready():
                await self._waiting(call)
            self._take(call)
        return _load_item(self._items.popleft())

    def _take_error(self) -> BaseException | None:
        error, self._error = self._error, None
        return error

    def _take(self, call: AnyCall) -> None:
        """Take what has come; the end of the stream is looked at once its last item was taken."""
        outcome = call.outcome()  # asked first: what comes between the two questions must not be lost
        if items := call.items():
            if not self._cancelled:
                self._items.extend(items)
        elif outcome is not None:
            self._call = None
            if outcome[0] != "end":
                self._raise(*outcome)

    def __await__(self) -> NoReturn:
        raise TypeError(
            "`DeploymentResponseGenerator` cannot be awaited directly. "
            "Use `async for` or `await response.__anext__() instead`."
        )

    def result(self, *, timeout_s: float | None = None) -> NoReturn:
        """Always an error: a stream has items and no result."""
        raise TypeError(
            "`DeploymentResponseGenerator` doesn't support `.result()`. Use iteration instead: `for item in response` "
            "(outside deployments) or `async for item in response` (inside deployments)."
        )

    def __reduce__(self) -> NoReturn:
        raise RayServeException(
            "`DeploymentResponseGenerator` is not serializable: its items are taken where it was made."
        )


def _load_item(item: Any) -> Any:
    return values.loads(*item) if type(item) is tuple else values.loads(item)
