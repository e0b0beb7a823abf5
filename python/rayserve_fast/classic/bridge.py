"""The answer of a call as a real `ray.ObjectRef`, there before the answer is: what the older handles return.

The one exception to the rule that no request travels through a Ray task, and for those handles only. Ray has no promise
that somebody else could keep, so each call is one call of an actor of this process, the bridge, which makes it on the
data plane as any process would (limits, back-pressure, picking, batching) and returns what came. Hundreds of
microseconds instead of tens; HTTP to the same deployment never comes here.

The bridge opens nothing on its way: arguments are encoded by whoever calls, the answer is decoded by whoever reads the
reference. Only references among the top-level arguments are resolved by Ray before the bridge is called, so that a call
that waits for another holds no slot meanwhile.
"""

from __future__ import annotations

import asyncio
import pickle
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray import ObjectRef
from ray.exceptions import RayTaskError, TaskCancelledError

from rayserve_fast import answers, caller, values
from rayserve_fast.classic.absent import NoArguments
from rayserve_fast.context import _RequestContext, _serve_request_context
from rayserve_fast.controlplane.process import serve_at_normal_priority
from rayserve_fast.own_actor import OwnActor

if TYPE_CHECKING:
    from rayserve_fast.handle import DeploymentHandle

#: What is in every pickle that holds a reference to something of Ray's.
RAYS_OWN = re.compile(rb"ray\._private\.serialization")

#: Deployment, application, key in the snapshot, and method.
Callee = tuple[str, str, str, str]
#: Request id, route and application of the caller, model, and session.
Texts = tuple[str, str, str, str, str]


def call(handle: DeploymentHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what `handle` calls.

    Args:
        handle: with its options; it may stream nothing.
        args, kwargs: of the method. References and answers of other calls at the top level arrive as values.

    Returns:
        The `ray.ObjectRef` of the answer, at once.

    Raises:
        DeploymentUnavailableError: this process is not connected to Ray.
        TypeError, RayServeException: an argument cannot be sent.
        RuntimeError: in local testing mode, where there is no Ray.
    """
    if handle._local:
        raise RuntimeError("There are no ObjectRefs in local testing mode: use a DeploymentHandle there.")
    handle._check_ray()
    callee, texts = _described(handle)
    args, kwargs = tuple(map(_reference, args)), {name: _reference(value) for name, value in kwargs.items()}
    if any(isinstance(value, ObjectRef) for value in (*args, *kwargs.values())):
        return _own.actor().call_with_values.remote(callee, texts, *args, **kwargs)
    try:
        packed = _pack(callee, args, kwargs)
    except Exception as error:
        unsent = handle._unsent(error)
        raise unsent from unsent.__cause__  # which may be the error itself, and must not be its own cause
    buffers = [pickle.PickleBuffer(buffer) for buffer in packed.buffers]
    return _own.actor().call.remote(callee, texts, _beside(packed.pickle), buffers, packed.refs)


def prepare() -> None:
    """Start the bridge now, so that the first call need not wait for its process."""
    _own.actor()


def end() -> None:
    """End the bridge, whose cluster is being shut down."""
    _own.end()


def _described(handle: DeploymentHandle) -> tuple[Callee, Texts]:
    from rayserve_fast.handle import new_request_id

    options, context = handle._options, _serve_request_context.get()
    texts = (
        (context.request_id if context else "") or new_request_id(),
        context.route if context else "",
        context.app_name if context else "",
        options.multiplexed_model_id,
        options.session_id,
    )
    return (handle.deployment_name, handle.app_name, handle._key, options.method_name), texts


def _reference(value: Any) -> Any:
    """The reference that stands for an answer of today's handles; anything else is itself."""
    from rayserve_fast.response import DeploymentResponse

    return value._ref_now() if isinstance(value, DeploymentResponse) else value


def _pack(callee: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> answers.Packed:
    if args or kwargs or callee[-1] != "__call__":
        return answers.pack(args, kwargs)
    return answers.Packed(pickle.dumps((NoArguments(), {}), 5))


def _beside(encoded: Any) -> Any:
    return pickle.PickleBuffer(encoded) if memoryview(encoded).nbytes >= values.BESIDE_BYTES else encoded


class Bridge:
    """Runs in the actor; everything on its one loop.

    Args:
        path: the `sys.path` of its owner: what arguments and exceptions are made of must be importable here too.
    """

    def __init__(self, path: Sequence[str]) -> None:
        serve_at_normal_priority()
        sys.path.extend(part for part in path if part not in sys.path)

    def __repr__(self) -> str:
        """What Ray prints in front of each line of this process's log."""
        return "ServeBridge"

    async def call(
        self, callee: Callee, texts: Texts, encoded: Any, buffers: Sequence[Any], refs: Sequence[Any]
    ) -> Sealed:
        """Make a call whose arguments are encoded; what it raises is raised here."""
        packed = answers.Packed(bytes(encoded), [memoryview(buffer) for buffer in buffers], refs=refs)
        return await _made(callee, texts, packed)

    async def call_with_values(self, callee: Callee, texts: Texts, /, *args: Any, **kwargs: Any) -> Sealed:
        """Make a call for which Ray has resolved the references among the arguments."""
        return await _made(callee, texts, answers.pack(args, kwargs))


async def _made(callee: Callee, texts: Texts, packed: answers.Packed) -> Sealed:
    from rayserve_fast.handle import DeploymentHandle
    from rayserve_fast.response import DeploymentResponse

    # The first time it asks Ray for the cluster's secret, which may take a while.
    owner = caller.current() if caller.exists() else await asyncio.to_thread(caller.current)
    deployment, app, key, method = callee
    request_id, route, calling_app, model, session = texts
    context = _RequestContext(route=route, request_id=request_id, app_name=calling_app)
    called = owner.client.callee(key, method, model, session, False, False, None)
    begun = called.begin(packed.pickle, packed.buffers, context, (), packed.refs or None)
    assert begun is not None, "a call without relayed arguments begins at once"
    try:
        if not begun.ready():
            await owner.watch(asyncio.get_running_loop()).wait(begun)
    except asyncio.CancelledError:  # by ray.cancel(ref)
        begun.cancel()
        raise
    outcome = begun.sealed_outcome()
    if outcome[0] != "value":
        handle = DeploymentHandle(deployment, app).options(method_name=method)
        try:
            DeploymentResponse(handle, owner, begun)._raise(*outcome)
        except TaskCancelledError:
            raise
        except Exception as error:
            raise _Passed.of(error) from None
    return Sealed(*outcome[1:])


class _Passed(RayTaskError):  # type: ignore[misc]
    """What a call has raised, on its way through the bridge; who reads the reference gets an error of its `cause`.

    Ray puts the frames between its own code and a `raise` in front of the text. Here they are the same for each error
    and would hide those of the method: this one has none.
    """

    __traceback__ = None

    @classmethod
    def of(cls, error: Exception) -> _Passed:
        """Named as `error` is, as the name begins the text."""
        kind = type(error)
        named = type(kind.__name__, (cls,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
        return named(error)  # type: ignore[no-any-return]

    def __init__(self, error: Exception) -> None:
        self.cause = error.cause if isinstance(error, RayTaskError) else error
        self._text = str(error)

    def __str__(self) -> str:
        # Ray takes the second and third line of a task's error for frames of its own, and cuts them out.
        first, line, further = self._text.partition("\n")
        return f"{first}\n\n\n{further}" if line else first


class Sealed:
    """An encoded value. Pickling it gives what whoever unpickles it decodes: the value itself."""

    def __init__(self, encoded: Any, buffers: Sequence[Any] = ()) -> None:
        self._encoded = encoded
        self._buffers = buffers

    def __reduce__(self) -> tuple[Any, ...]:
        if RAYS_OWN.search(memoryview(self._encoded)):
            # Ray must see the references in it, to keep what they refer to for whoever reads this one.
            return _itself, (values.loads(self._encoded, self._buffers),)
        return values.loads, (_beside(self._encoded), [pickle.PickleBuffer(buffer) for buffer in self._buffers])


def _itself(value: Any) -> Any:
    return value


_own = OwnActor(Bridge, sys.path)
