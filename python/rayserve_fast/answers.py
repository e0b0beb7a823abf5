"""What the arguments of a handle call become: bytes, answers of other calls, and references that must live meanwhile.

An answer that has not been read yet is not an argument's value but a promise of it: the call waits for it in the native
client, which passes its bytes on as they came. One that has been read is pickled again, like any other value. Only
top-level arguments may be answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorDiedError

from rayserve_fast import values
from rayserve_fast.exceptions import RayServeException

if TYPE_CHECKING:
    from ray import ObjectRef


class Answer:
    """Of a call that may still run; the base of `DeploymentResponse`."""

    _call: Any
    _error: BaseException | None
    _value: Any

    def _settle(self, call: Any) -> None:
        """Take over the outcome of the call, which has ended."""
        raise NotImplementedError

    def _failure(self) -> BaseException:
        """The error that this answer turned out to be, for the call that has it for an argument."""
        if (call := self._call) is not None:
            self._settle(call)
        error = self._error or RayServeException("An argument's value has been lost.")
        if isinstance(error, ActorDiedError):
            failure = RayServeException(f"A replica died before it had answered for an argument of this call: {error}")
            failure.__cause__ = error
            return failure
        return error


class FailedAnswerError(Exception):
    """An answer among the arguments is known to be an error."""


class Stream:
    """Of items; the base of `DeploymentResponseGenerator`."""


@dataclass(slots=True)
class Packed:
    """Arguments, ready to be sent."""

    pickle: bytes
    buffers: Sequence[memoryview] = ()
    #: Answers that are to come, each with its place among positional and then keyword arguments.
    answers: Sequence[tuple[int, Answer]] = ()
    #: To be kept alive until the call has ended: nobody else counts references that travel outside of Ray's channels.
    refs: Sequence[ObjectRef[Any]] = ()

    @property
    def calls(self) -> Sequence[tuple[int, Any]]:
        """What the native client waits for."""
        return [(slot, answer._call) for slot, answer in self.answers] if self.answers else ()


def pack(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
    """Encode the arguments of a call.

    Raises:
        FailedAnswerError: with the error of an argument as its cause.
        RuntimeError: an argument is a stream of items.
    """
    if len(args) == 1 and not kwargs and (alone := values.ALONE.get(type(args[0]))) is not None:
        encoded = alone(args[0])
        if encoded is not None:
            return Packed(encoded)
    refs: list[ObjectRef[Any]] = []
    answers: list[tuple[int, Answer]] = []
    if any(isinstance(value, (Answer, Stream)) for value in (*args, *kwargs.values())):
        given = [_of(value, slot, answers) for slot, value in enumerate((*args, *kwargs.values()))]
        args, kwargs = tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))
    pickled, buffers = values.dumps((args, kwargs), refs)
    return Packed(pickled, [buffer.raw() for buffer in buffers], answers, refs)


def _of(value: Any, slot: int, answers: list[tuple[int, Answer]]) -> Any:
    """What stands for an argument in the pickle."""
    if isinstance(value, Stream):
        raise RuntimeError(
            "A streaming response cannot be an argument of another call: iterate it, and pass on what it gives."
        )
    if not isinstance(value, Answer):
        return value
    if value._call is not None:
        answers.append((slot, value))
        return None
    if value._error is not None:
        raise FailedAnswerError from value._failure()
    return value._value


def settle(answers: Sequence[tuple[int, Answer]]) -> None:
    """Read those that are there: another thread has taken the bytes of one of them just now."""
    for _, answer in answers:
        if (call := answer._call) is not None and call.ready():
            answer._settle(call)
