"""Handles: calling a deployment from Python, over the same frames and the same router as HTTP requests.

`.remote()` puts the call on its way before it returns, whether or not anybody waits for the answer; how one waits and
reads it is `response.py`. No Ray task is involved.
"""

from __future__ import annotations

import random
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rayserve_fast import answers, caller
from rayserve_fast.classic.handles import RayServeDeploymentHandle, RayServeHandle, RayServeSyncHandle
from rayserve_fast.context import _serve_request_context
from rayserve_fast.controlplane.spec import DeploymentID
from rayserve_fast.exceptions import DeploymentUnavailableError, RayServeException
from rayserve_fast.response import DeploymentResponse, DeploymentResponseGenerator
from rayserve_fast.selection import DeploymentBroadcastResponse, ReplicaSelection
from rayserve_fast.text import check_text

if TYPE_CHECKING:
    from rayserve_fast.response import AnyCaller

__all__ = [
    "DeploymentBroadcastResponse",
    "DeploymentHandle",
    "DeploymentResponse",
    "DeploymentResponseGenerator",
    "RayServeDeploymentHandle",
    "RayServeHandle",
    "RayServeSyncHandle",
]

_UNSET: Any = object()
#: The options that are text.
_TEXTS = ("method_name", "multiplexed_model_id", "session_id")


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
    #: Whether `_init` comes too late.
    _initialized = False

    def __init__(
        self,
        deployment_name: str,
        app_name: str = "default",
        *,
        _options: _Options | None = None,
        _handle_id: str | None = None,
        _local: bool = False,
        _key: str | None = None,
    ) -> None:
        self.deployment_id = DeploymentID(name=deployment_name, app_name=app_name)
        self.handle_id = _handle_id or f"{random.getrandbits(40):010x}"
        self._options = _options or _Options()
        self._local = _local
        #: What the snapshot knows it by; `split:{name}` for traffic that several deployments share.
        self._key = _key or self.deployment_id.key
        self._kind = DeploymentResponseGenerator if self._options.stream else DeploymentResponse
        #: Whom the last call went through, and what it called there.
        self._owner: AnyCaller | None = None
        self._callee: Any = None

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
            _prefer_local_routing: call replicas of this process's node while one has room; a model or session id
                outranks it.
            request_serialization, response_serialization: accepted for compatibility; the values decide.

        Raises:
            TypeError: a name or an id is no str.
            ValueError: one cannot be encoded as UTF-8.
        """
        given = {name: value for name, value in locals().items() if name != "self" and value is not _UNSET}
        for name in _TEXTS:
            text = given.get(name, "")
            if not isinstance(text, str):
                raise TypeError(f"handle.options: {name} must be a str, got {text!r}.")
            check_text(name, text)
        copy = DeploymentHandle(
            self.deployment_name,
            self.app_name,
            _options=replace(self._options, **given),
            _handle_id=self.handle_id,
            _local=self._local,
            _key=self._key,
        )
        self._initialized = copy._initialized = True
        return copy

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
            DeploymentUnavailableError: this process is not connected to Ray.
            RayServeException: Serve is not running, or an argument is of a kind that does not travel.
        """
        owner = self._owner
        if owner is None or owner is not caller._current:
            owner = self._meet()
        context = _serve_request_context.get()
        call = self._callee.call(args, kwargs, context)
        if call is None:
            return self._pack(owner, args, kwargs, context)
        return self._kind(self, owner, call)

    def _meet(self) -> AnyCaller:
        """Find out whom calls go through from now on."""
        owner, options = self._find_caller(), self._options
        self._callee = owner.client.callee(
            self._key,
            options.method_name,
            options.multiplexed_model_id,
            options.session_id,
            options._prefer_local_routing,
            options.stream,
            self._target,
        )
        self._owner, self._initialized = owner, True
        return owner

    def _pack(
        self, owner: AnyCaller, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> DeploymentResponse | DeploymentResponseGenerator:
        """Make a call with arguments that are not all plain."""
        try:
            packed = answers.pack(args, kwargs)
        except Exception as error:
            request_id = (context.request_id if context else "") or new_request_id()
            return self._kind._of_error(self, request_id, self._unsent(error))
        call = self._callee.begin(packed.pickle, packed.buffers, context, packed.calls, packed.refs or None)
        if call is None:
            answers.settle(packed.answers)
            return self._pack(owner, args, kwargs, context)
        response = self._kind(self, owner, call)
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

        self._initialized = True
        return choose(self, args, kwargs)

    def dispatch(
        self, selection: ReplicaSelection, *args: Any, **kwargs: Any
    ) -> DeploymentResponse | DeploymentResponseGenerator:
        """Call the replica that `choose_replica` has chosen, with the method and options that this handle had then.

        Raises:
            ValueError: another deployment's replica was chosen.
            RuntimeError: the selection has been used, or its `async with` block has ended.

        Awaiting the answer raises `ReplicaUnavailableError` if the replica has gone meanwhile.
        """
        return selection._dispatch(self, args, kwargs)

    def _described(self) -> str:
        return f"'{self.deployment_name}.{self._options.method_name}'"

    @property
    def is_initialized(self) -> bool:
        """Whether `_init`, `options` or a call has been asked of this handle: `_init` then raises."""
        return self._initialized

    def running_replicas_populated(self) -> bool:
        """Whether this process holds a link to a replica."""
        begun = self._initialized and (self._local or caller.exists())
        return begun and self._find_caller().client.counters()["links"] > 0

    def _find_caller(self) -> AnyCaller:
        """What calls are made with: this process's caller, or its applications in local testing mode."""
        if not self._local:
            self._check_ray()
            return caller.current()
        from rayserve_fast.local import applications

        return applications

    def _check_ray(self) -> None:
        if not caller.can_connect():
            why = f"{self.deployment_id} cannot be called: this process is not connected to Ray."
            raise DeploymentUnavailableError._because(self.deployment_id, why)

    def _init(
        self, *, _prefer_local_routing: bool = _UNSET, _source: Any = None, _run_router_in_separate_loop: bool = True
    ) -> None:
        """Set, once and before anything else is done with this handle, what then holds for it and its copies.

        Args:
            _prefer_local_routing: see `options`.
            _source, _run_router_in_separate_loop: accepted for compatibility.

        Raises:
            RuntimeError: it is too late.
        """
        if self._initialized:
            raise RuntimeError(
                "Handle has already been initialized: `_init` is for once, and comes before `options`, methods by name "
                "and calls. Take another handle, or `options(_prefer_local_routing=...)`."
            )
        if _prefer_local_routing is not _UNSET:
            self._options = replace(self._options, _prefer_local_routing=_prefer_local_routing)
        self._initialized = True

    def shutdown(self) -> None:
        """Accepted for compatibility: links belong to the process, not to a handle."""

    async def shutdown_async(self) -> None:
        """See `shutdown`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.deployment_name, self.app_name, asdict(self._options), self._local, self._key)

    def __repr__(self) -> str:
        return f"DeploymentHandle(deployment='{self.deployment_name}')"


def _unpickle(deployment_name: str, app_name: str, options: dict[str, Any], local: bool, key: str) -> DeploymentHandle:
    return DeploymentHandle(deployment_name, app_name, _options=_Options(**options), _local=local, _key=key)


def new_request_id() -> str:
    """A random UUID (version 4), as the proxy makes them; `uuid.uuid4` takes four times as long."""
    bits = f"{random.getrandbits(128):032x}"
    return f"{bits[:8]}-{bits[8:12]}-4{bits[13:16]}-{'89ab'[int(bits[16], 16) & 3]}{bits[17:20]}-{bits[20:]}"
