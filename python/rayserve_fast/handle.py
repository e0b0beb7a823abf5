"""Handles: calling a deployment from Python, over the same frames and the same router as HTTP requests.

`.remote()` puts the call on its way before it returns, whether or not anybody waits for the answer. `.result()` reads
the answer on the thread that waits, `await` on the loop that waits. No Ray task is involved.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Generator, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from ray.exceptions import ActorDiedError

from rayserve_fast import answers, caller, promises, values
from rayserve_fast.context import _serve_request_context
from rayserve_fast.controlplane.spec import DeploymentID
from rayserve_fast.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from rayserve_fast.selection import DeploymentBroadcastResponse, ReplicaSelection

if TYPE_CHECKING:
    from rayserve_fast import _core
    from rayserve_fast.local import Applications, LocalCall

    AnyCaller: TypeAlias = caller.Caller | Applications
    AnyCall: TypeAlias = _core.Call | LocalCall

__all__ = ["DeploymentBroadcastResponse", "DeploymentHandle", "DeploymentResponse", "DeploymentResponseGenerator"]

_UNSET: Any = object()


@dataclass(frozen=True)
class _Options:
    """What `options()` changes; the serialization options are accepted and mean nothing here: see `values.py`."""

    method_name: str = "__call__"
    multiplexed_model_id: str = ""
    session_id: str = ""
    stream: bool = False
    _prefer_local_routing: bool = False
    _by_reference: bool = True
    request_serialization: str = "cloudpickle"
    response_serialization: str = "cloudpickle"


class DeploymentHandle:
    """Calls a deployment; cheap to make, to copy and to send to another process.

    Args:
        deployment_name: the deployment's name.
        app_name: its application's.

    >>> handle = DeploymentHandle("Model", "default")
    >>> handle.predict
    DeploymentHandle(deployment='Model')
    >>> handle.options(method_name="predict").deployment_name
    'Model'
    """

    #: The replica that answers all calls, if it is not for the router to choose.
    _target: str | None = None

    def __init__(
        self,
        deployment_name: str,
        app_name: str = "default",
        *,
        _options: _Options | None = None,
        _handle_id: str | None = None,
        _local: bool = False,
    ) -> None:
        self.deployment_id = DeploymentID(name=deployment_name, app_name=app_name)
        self.handle_id = _handle_id or f"{random.getrandbits(40):010x}"
        self._options = _options or _Options()
        self._local = _local
        self._key = f"{app_name}#{deployment_name}"

    @property
    def deployment_name(self) -> str:
        """The deployment that is called."""
        return self.deployment_id.name

    @property
    def app_name(self) -> str:
        """The application of that deployment."""
        return self.deployment_id.app_name

    def options(
        self,
        *,
        method_name: str = _UNSET,
        multiplexed_model_id: str = _UNSET,
        session_id: str = _UNSET,
        stream: bool = _UNSET,
        _prefer_local_routing: bool = _UNSET,
        _by_reference: bool = _UNSET,
        request_serialization: str = _UNSET,
        response_serialization: str = _UNSET,
    ) -> DeploymentHandle:
        """A copy of this handle with other options.

        Args:
            method_name: the method to call; `__call__` if never set.
            multiplexed_model_id: the model that `serve.get_multiplexed_model_id()` returns in the replica.
            session_id: the session that the replica's request context holds.
            stream: call a generator and receive its items.
            request_serialization, response_serialization: accepted for compatibility; the values decide.
        """
        given = {name: value for name, value in locals().items() if name != "self" and value is not _UNSET}
        options = replace(self._options, **given)
        return DeploymentHandle(
            self.deployment_name, self.app_name, _options=options, _handle_id=self.handle_id, _local=self._local
        )

    def __getattr__(self, name: str) -> DeploymentHandle:
        # Copying, pickling and inspection ask for dunder names, before __init__ has run even; none is a method to call.
        if name.startswith("__") and name != "__call__":
            raise AttributeError(f"'DeploymentHandle' has no attribute {name!r}")
        # Kept under its name, so that the next time does not come here.
        method = self.__dict__[name] = self.options(method_name=name)
        return method

    def remote(self, *args: Any, **kwargs: Any) -> DeploymentResponse | DeploymentResponseGenerator:
        """Call the deployment.

        Args:
            *args, **kwargs: what the method is called with; it gets copies.

        Returns:
            The answer to come, or with `options(stream=True)` the items. Dropping it does not cancel the call.

        Raises:
            RayServeException: Serve is not running, or an argument is of a kind that does not travel.
        """
        options = self._options
        kind = DeploymentResponseGenerator if options.stream else DeploymentResponse
        context = _serve_request_context.get()
        request_id = (context.request_id if context else "") or new_request_id()
        try:
            packed = answers.pack(args, kwargs)
        except Exception as error:
            return kind(self, request_id, None, None, self._unsent(error))
        texts = (
            options.method_name,
            request_id,
            context.route if context else "",
            context.app_name if context else "",
            options.multiplexed_model_id,
            options.session_id,
        )
        owner = self._caller()
        arguments = (packed.pickle, packed.buffers, options.stream, context, packed.calls, packed.refs or None)
        target = () if self._target is None else (self._target,)
        call = owner.client.begin(self._key, texts, *arguments, *target)
        if call is None:
            answers.settle(packed.answers)
            return self.remote(*args, **kwargs)
        response = kind(self, request_id, owner, call)
        if packed.answers:
            response._answers = packed.answers
        return response

    def _unsent(self, error: Exception) -> BaseException:
        """What becomes of a call whose arguments cannot be sent."""
        if isinstance(error, answers.FailedAnswerError) and error.__cause__ is not None:
            return error.__cause__
        if isinstance(error, RayServeException) or type(error) is RuntimeError:
            return error
        failure = TypeError(f"The arguments of {self._described()} cannot be pickled: {error}")
        failure.__cause__ = error
        return failure

    def _aimed(self, replica_id: str) -> DeploymentHandle:
        """A copy whose calls go to that replica."""
        copy = self.options()
        copy._target = replica_id
        return copy

    def broadcast(self, method_name: str, *args: Any, **kwargs: Any) -> DeploymentBroadcastResponse:
        """Call a method of every replica: for rare things, such as emptying caches.

        Each replica gets the call once, when it has a free slot; `max_queued_requests` does not count.

        Args:
            method_name: the method.
            *args, **kwargs: what it is called with.

        Returns:
            The answers to come.
        """
        return DeploymentBroadcastResponse(self.options(method_name=method_name, stream=False), args, kwargs)

    def choose_replica(self, *args: Any, **kwargs: Any) -> AbstractAsyncContextManager[ReplicaSelection]:
        """Let the router choose a replica now and call it later, with `dispatch`, inside this context.

        Args:
            *args, **kwargs: what a router of one's own may look at.

        Returns:
            A context manager for `async with`; a slot of the chosen replica is reserved until `dispatch` or its end.

        Raises:
            DeploymentUnavailableError: the deployment failed to deploy, or does not exist.
        """
        from rayserve_fast.selection import choose

        return choose(self, args, kwargs)

    def dispatch(
        self, selection: ReplicaSelection, *args: Any, **kwargs: Any
    ) -> DeploymentResponse | DeploymentResponseGenerator:
        """Call the replica that `choose_replica` has chosen, with the method and options that this handle had then.

        Raises:
            ValueError: another deployment's replica was chosen.
            RuntimeError: the selection has been used.

        Awaiting the answer raises `ReplicaUnavailableError` if the replica has gone meanwhile.
        """
        return selection._dispatch(self, args, kwargs)

    def _described(self) -> str:
        return f"'{self.deployment_name}.{self._options.method_name}'"

    @property
    def is_initialized(self) -> bool:
        """Whether this process has called anything yet; there is nothing to initialize in a handle itself."""
        return self._local or caller.exists()

    def running_replicas_populated(self) -> bool:
        """Whether this process holds a link to a replica."""
        return self.is_initialized and self._caller().client.counters()["links"] > 0

    def _caller(self) -> AnyCaller:
        """What calls are made with: this process's caller, or its applications in local testing mode."""
        if not self._local:
            return caller.current()
        from rayserve_fast.local import applications

        return applications

    def _init(self, **_: Any) -> None:
        """Accepted for compatibility: handles need no initialization."""

    def shutdown(self) -> None:
        """Accepted for compatibility: links belong to the process, not to a handle."""

    async def shutdown_async(self) -> None:
        """See `shutdown`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.deployment_name, self.app_name, asdict(self._options), self._local)

    def __repr__(self) -> str:
        return f"DeploymentHandle(deployment='{self.deployment_name}')"


def _unpickle(deployment_name: str, app_name: str, options: dict[str, Any], local: bool) -> DeploymentHandle:
    return DeploymentHandle(deployment_name, app_name, _options=_Options(**options), _local=local)


def new_request_id() -> str:
    """A random UUID (version 4), as the proxy makes them; `uuid.uuid4` takes four times as long."""
    bits = f"{random.getrandbits(128):032x}"
    return f"{bits[:8]}-{bits[8:12]}-4{bits[13:16]}-{'89ab'[int(bits[16], 16) & 3]}{bits[17:20]}-{bits[20:]}"


class _Response:
    """A call that is on its way, and how one waits for it and reads what became of it."""

    #: Its arguments that are answers of other calls.
    _answers: list[tuple[int, answers.Answer]] = []  # noqa: RUF012 - never changed, only replaced

    def __init__(
        self,
        handle: DeploymentHandle,
        request_id: str,
        owner: AnyCaller | None,
        call: AnyCall | None,
        error: BaseException | None = None,
    ) -> None:
        self._handle = handle
        self._caller = owner
        self._request_id = request_id
        self._call = call
        self._error: BaseException | None = error
        self._cancelled = False

    @property
    def request_id(self) -> str:
        """The id of the request that the call belongs to."""
        return self._request_id

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

    def _read(self, kind: str, *rest: Any) -> Any:
        """The value of an outcome of the native client, or the exception that it stands for."""
        if kind == "value":
            return values.loads(*rest)
        if kind == "end":
            return None
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
            raise RequestCancelledError(self._request_id)
        if kind == "closed":
            raise RayServeException(f"{self._handle._described()} has not answered: Serve has been shut down.")
        raise RayServeException(f"{self._handle._described()}: {rest[0]}")

    def _raise_fault(self, fault: int, payload: bytes) -> NoReturn:
        """Raise what an ERROR frame says; the numbers are `Fault` of the wire format."""
        if fault == 2:
            raise values.load_error(payload)
        if fault == 4:
            raise RequestCancelledError(self._request_id)
        text = payload.decode("utf-8", "replace")
        if fault == 5:
            raise TimeoutError(text)
        if fault in (7, 8):
            raise values.task_error(TypeError(text), self._handle._options.method_name)
        raise values.task_error(RayServeException(text), self._handle._options.method_name)

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}(deployment='{self._handle.deployment_name}', request_id='{self._request_id}')"


class DeploymentResponse(_Response, answers.Answer, promises.ReferableValue):
    """The answer to a call, which is on its way already; made by `DeploymentHandle.remote`.

    The answer is read when it is asked for, once; asking again gives the same value or raises the same error.
    """

    _value: Any = None

    def result(self, *, timeout_s: float | None = None) -> Any:
        """Wait for the answer and return it.

        Args:
            timeout_s: seconds to wait; None: as long as it takes. The call goes on when the time is over.

        Raises:
            TimeoutError: there is no answer yet.
            RuntimeError: the thread runs an asyncio loop, which would stand still; use `await`.
            RayTaskError: the method raised; the error is also an instance of the type that it raised.
            ActorDiedError: the replica died during the call.
            RequestCancelledError: the call was cancelled.
            BackPressureError: `max_queued_requests` calls of this process wait already.
            DeploymentUnavailableError: the deployment failed to deploy, or does not exist.
        """
        if (call := self._call) is not None:
            if not self._wait_here(call, timeout_s, "await response"):
                raise TimeoutError(f"{self._handle._described()} has not answered within {timeout_s} s.")
            self._settle(call)
        return self._answer()

    def __await__(self) -> Generator[Any, None, Any]:
        if (call := self._call) is not None:
            if not call.ready():
                yield from self._waiting(call).__await__()
            self._settle(call)
        return self._answer()

    def _answer(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def _settle(self, call: AnyCall) -> None:
        try:
            self._value = self._read(*call.outcome())
        except Exception as error:
            self._error = error
        self._call = None
        self._answers = []

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

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._items: deque[Any] = deque()

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
            self._items.extend(items)
        elif outcome is not None:
            self._call = None
            self._read(*outcome)

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
    return values.loads(item) if type(item) is bytes else values.loads(*item)
