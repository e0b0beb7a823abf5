"""How a value or an error of a handle call becomes bytes and comes back.

A value is a pickle and its out-of-band buffers. C's pickle writes it when it is made of nothing but builtin scalars
and containers, bytes and numpy arrays, all of their exact types; everything else goes to Ray's cloudpickle, because
plain pickle *succeeds* on a class of the driver's ``__main__`` and then fails at the replica. Small plain values do not
come here: the native code writes and reads their pickles itself (``rust/pyext/src/plain.rs``). Whoever decodes gets
copies, with arrays writable where the original was.

An error travels as its parts with the exception pickled apart, so that one which the other side cannot load still
arrives as a ``RayTaskError`` with its traceback.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import ray.util
from ray import ObjectRef, cloudpickle
from ray.exceptions import RayError, RayTaskError

from rayserve_fast.tracebacks import format_error

Buffer: TypeAlias = "bytes | bytearray | memoryview"

#: Bytes of this length and more travel beside the pickle that they belong to, not within it: that saves copying them.
BESIDE_BYTES = 64 * 1024

_SCALARS = frozenset({bytes, str, int, float, bool, type(None)})

#: Classes of this package whose objects C's pickler may write too, and the functions that make them again.
_own: set[Any] = set()
#: What writes the arguments of a call that has one object of such a class and nothing else; None if it cannot.
ALONE: dict[type, Callable[[Any], bytes | None]] = {}


def pickle_plainly(kind: type, rebuild: Callable[..., Any], alone: Callable[[Any], bytes | None]) -> None:
    """Let C's pickler write the objects of a class, whose `__reduce__` gives `rebuild` and builtin values."""
    _own.update((kind, rebuild))
    ALONE[kind] = alone


class _NotPlain(Exception):
    """The value holds something that plain pickle must not write."""


class _PlainPickler(pickle.Pickler):
    """C's pickler, which asks about whatever is not an exact builtin before it writes it."""

    arrays: type | tuple[()] = ()
    allowed: frozenset[Any] = frozenset()

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is self.arrays or type(obj) in _own or _is_part_of_array(obj, self.allowed):
            return NotImplemented
        raise _NotPlain


class _ArrayPickler(_PlainPickler):
    """The same once numpy has been imported; set up by :func:`_pickler`."""


def _is_part_of_array(obj: Any, allowed: frozenset[Any]) -> bool:
    """Whether pickle met `obj` on its way through an array: a dtype, or one of the globals that rebuild arrays."""
    if isinstance(obj, (type, FunctionType, BuiltinFunctionType)):
        return obj in allowed or obj in _own
    return bool(allowed) and isinstance(obj, sys.modules["numpy"].dtype)


def _pickler() -> type[_PlainPickler]:
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "ndarray"):
        return _PlainPickler  # nobody can hold an array
    if not _ArrayPickler.allowed:
        plain, objects = numpy.empty(1), numpy.empty(1, object)
        rebuild = {array.__reduce_ex__(5)[0] for array in (plain, objects)}
        _ArrayPickler.allowed = frozenset(rebuild | {numpy.ndarray, numpy.dtype})
        _ArrayPickler.arrays = numpy.ndarray
    return _ArrayPickler


def dumps(value: Any, refs: list[ObjectRef[Any]] | None = None) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Encode `value` as a pickle and the buffers that belong beside it; whatever pickling raises passes through.

    The references to Ray objects in it are added to `refs`: they must be kept alive until the other side has them.
    """
    if type(value) in _SCALARS:
        return pickle.dumps(value, 5), []
    buffers: list[pickle.PickleBuffer] = []
    out = io.BytesIO()
    try:
        _pickler()(out, 5, buffer_callback=buffers.append).dump(value)
    except _NotPlain:
        buffers.clear()
        return _dump_objects(value, buffers, refs if refs is not None else []), buffers
    return out.getvalue(), buffers


def _dump_objects(value: Any, buffers: list[pickle.PickleBuffer], refs: list[ObjectRef[Any]]) -> bytes:
    """By cloudpickle. References are collected as for one of Ray's own messages: else Ray keeps them for ever."""
    worker = ray._private.worker.global_worker
    context = worker.get_serialization_context() if worker.connected else None
    if context is None or context.is_in_band_serialization():
        return bytes(cloudpickle.dumps(value, 5, buffer_callback=buffers.append))
    context.set_in_band_serialization()
    try:
        return bytes(cloudpickle.dumps(value, 5, buffer_callback=buffers.append))
    finally:
        context.set_out_of_band_serialization()
        refs.extend(context.get_and_clear_contained_object_refs())


def loads(encoded: Buffer, buffers: Sequence[Buffer] = ()) -> Any:
    """Decode what :func:`dumps` made; arrays live in `buffers`, which the value then owns."""
    return pickle.loads(encoded, buffers=buffers)


def load_arguments(
    encoded: Buffer, buffers: Sequence[Buffer], relayed: Sequence[tuple[int, Buffer, Sequence[Buffer]]] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Decode the pair of arguments of a call, with relayed answers in their places."""
    args, kwargs = pickle.loads(encoded, buffers=buffers)
    if relayed:
        given = [*args, *kwargs.values()]
        for slot, answer, parts in relayed:
            given[slot] = pickle.loads(answer, buffers=parts)
        args, kwargs = tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))
    return args, kwargs


def dump_error(error: BaseException, function_name: str) -> bytes:
    """Encode an exception of the user's code with its traceback, for the payload of an ERROR frame.

    Args:
        error: what was raised; a ``RayTaskError`` of a child call passes on its cause instead of nesting.
        function_name: what failed, for the traceback's first line.
    """
    text = format_error(error)
    cause = error.cause if isinstance(error, RayTaskError) else error
    try:
        encoded = cloudpickle.dumps(cause, 5)
        pickle.loads(encoded)  # an exception whose __init__ asks for more than its args pickles, and fails only here
    except Exception as reason:
        encoded = pickle.dumps(RayError(_unloadable(type(cause).__qualname__, reason, text)))
    return pickle.dumps((function_name, text, os.getpid(), ray.util.get_node_ip_address(), encoded), 5)


def load_error(payload: Buffer) -> RayTaskError:
    """The exception to raise at the caller: an instance of the user's type and of ``RayTaskError``."""
    function_name, text, pid, ip, encoded = pickle.loads(payload)
    try:
        cause = pickle.loads(encoded)
    except Exception as reason:
        cause = RayError(_unloadable("raised remotely", reason, text))
    error = RayTaskError(function_name, text, cause, proctitle=function_name, pid=pid, ip=ip)
    return error.as_instanceof_cause()


def task_error(cause: Exception, function_name: str) -> RayTaskError:
    """An error of the replica's own, in the form of those that the user's code raises."""
    text = f"{function_name}\n{type(cause).__name__}: {cause}"
    return RayTaskError(function_name, text, cause, proctitle=function_name).as_instanceof_cause()


def _unloadable(what: str, reason: Exception, text: str) -> str:
    return f"The exception ({what}) cannot be sent between processes: {reason!r}.\nOriginal traceback:\n{text}"
