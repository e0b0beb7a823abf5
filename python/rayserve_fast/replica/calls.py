"""Handle calls at the replica: which method, with which arguments, and what its result or its error becomes.

The worker asks :meth:`Calls.find_method` once for each method. It calls an async one itself if the arguments are
plain, else it starts the coroutine that :meth:`Calls.begin` returns, or has a pool thread :meth:`Calls.run` it.
Values travel as ``rayserve_fast.values`` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Coroutine
from types import AsyncGeneratorType, GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias

from ray import ObjectRef

from rayserve_fast import values
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica.lingering import Lingering

if TYPE_CHECKING:
    from rayserve_fast import _core
    from rayserve_fast.local.call import LocalHead

    CallHead: TypeAlias = _core.CallHead | LocalHead

#: Positional and keyword arguments of a call.
Arguments: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"

# The `Fault` codes of the wire that this file gives; ARCHITECTURE.md lists them.
USER, CANCELLED, NO_METHOD, WRONG_KIND, UNPICKLABLE = 2, 4, 6, 7, 8


_lingering = Lingering()


class NoSuchMethodError(RayServeException):
    """The user's object has no such method."""


class WrongKindError(TypeError):
    """A generator was called as a plain method."""


class UnpicklableError(Exception):
    """Arguments cannot be decoded, or the result cannot be encoded."""


class Calls:
    """What answers handle calls.

    Args:
        target: the user's instance, or the function, which then serves every method name.
        is_function: which of the two.
    """

    def __init__(self, target: Any, is_function: bool) -> None:
        self._target = target
        self._is_function = is_function
        self._methods: dict[tuple[str, bool], tuple[Callable[..., Any], bool]] = {}

    def find_method(self, name: str, streaming: bool) -> tuple[Callable[..., Any], bool]:
        """The method of that name, and whether a pool thread runs it.

        Raises:
            NoSuchMethodError: there is none.
            WrongKindError: it is a generator function, and the call is not a streaming one.
        """
        known = self._methods.get((name, streaming))
        if known is None:
            known = self._methods[name, streaming] = self._find(name, streaming)
        return known

    def begin(self, head: CallHead) -> Coroutine[Any, Any, Any]:
        """The coroutine of an async method."""
        method = self._methods[head.method, head.streaming][0]
        args, kwargs = read_arguments(head)
        if head.streaming:
            return _begin_stream(head, method, args, kwargs)
        if has_references(args, kwargs):
            return _with_values(method, args, kwargs)
        coroutine: Coroutine[Any, Any, Any] = method(*args, **kwargs)
        return coroutine

    def run(self, head: CallHead) -> Any:
        """The result of a sync method."""
        args, kwargs = read_arguments(head)
        if has_references(args, kwargs):
            args, kwargs = get_references(args, kwargs)
        result = self._methods[head.method, head.streaming][0](*args, **kwargs)
        return _run_stream(head, result) if head.streaming else result

    def dump(self, result: Any) -> tuple[bytes, list[memoryview]]:
        """A result as the pickle and the buffers beside it."""
        if isinstance(result, (GeneratorType, AsyncGeneratorType)):
            raise WrongKindError  # `dump_error` knows of which method
        return _dump(result)

    def dump_error(self, head: CallHead, error: BaseException) -> tuple[int, bytes]:
        """An error as the code and the payload of an ERROR frame."""
        for kind, fault in _FAULTS.items():
            if isinstance(error, kind):
                return fault, (str(error) or _wrong_kind(head.method)).encode()
        return USER, values.dump_error(error, head.method)

    def _find(self, name: str, streaming: bool) -> tuple[Callable[..., Any], bool]:
        method = self._target if self._is_function else getattr(self._target, name, None)
        if method is None:
            public = [attr for attr in dir(self._target) if not attr.startswith("__")]
            methods = [attr for attr in public if callable(getattr(self._target, attr))]
            raise NoSuchMethodError(
                f"Tried to call a method '{name}' that does not exist. Available methods: {methods}."
            )
        if streaming:
            return method, not is_async(method) and not _any(_is_async_generator, method)
        if _any(inspect.isgeneratorfunction, method) or _any(_is_async_generator, method):
            raise WrongKindError(_wrong_kind(method.__name__))
        return method, not is_async(method)


def handler_of(target: Any) -> Any:
    """What answers its requests: a function itself, else the `__call__` of a class or an instance; None: nothing."""
    return target if inspect.isfunction(target) else getattr(target, "__call__", None)  # noqa: B004


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine; looks through an object to its ``__call__``."""
    return _any(inspect.iscoroutinefunction, function)


def _is_async_generator(function: Any) -> bool:
    """Whether calling it, on the loop, gives an async generator; functions of `serve.batch` say so themselves."""
    return inspect.isasyncgenfunction(function) or getattr(function, "_gives_async_generator", False) is True


def _any(test: Callable[[Any], bool], function: Callable[..., Any]) -> bool:
    return test(function) or test(getattr(function, "__call__", None))  # noqa: B004


def read_arguments(head: CallHead) -> Arguments:
    """The arguments of a call; once.

    Raises:
        UnpicklableError: they cannot be decoded here.
    """
    try:
        args, kwargs = values.load_arguments(*head.arguments())
    except Exception as error:
        raise UnpicklableError(f"The arguments of '{head.method}' cannot be read at the replica: {error!r}") from error
    return args, kwargs


def has_references(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there are references among the top-level arguments: the method gets the values that they stand for."""
    return ObjectRef in map(type, args) or ObjectRef in map(type, kwargs.values())


def get_references(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments with the values of their references; on a thread that may block."""
    import ray

    def value_of(given: Any) -> Any:
        return ray.get(given) if type(given) is ObjectRef else given

    return tuple(map(value_of, args)), {name: value_of(given) for name, given in kwargs.items()}


async def await_references(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The same on a loop."""
    given = (*args, *kwargs.values())
    found = iter(await asyncio.gather(*(_value(value) for value in given)))
    args = tuple(next(found) for _ in args)
    return args, dict(zip(kwargs, found, strict=True))


async def _value(given: Any) -> Any:
    return await given if type(given) is ObjectRef else given


def _dump(result: Any) -> tuple[bytes, list[memoryview]]:
    refs: list[ObjectRef[Any]] = []
    try:
        encoded, buffers = values.dumps(result, refs)
    except Exception as error:
        raise UnpicklableError(f"The result of type {type(result).__qualname__} cannot be sent: {error!r}") from error
    if refs:
        _lingering.keep(refs)
    return encoded, [buffer.raw() for buffer in buffers]


async def _with_values(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = await await_references(args, kwargs)
    return await method(*args, **kwargs)


async def _begin_stream(
    head: CallHead, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Calls an async method of a streaming call, and sends the items of the generator that it gives."""
    if has_references(args, kwargs):
        args, kwargs = await await_references(args, kwargs)
    result = method(*args, **kwargs)
    if not isinstance(result, AsyncGeneratorType):
        result = await result
    if isinstance(result, GeneratorType):
        with contextlib.closing(result):
            for item in result:
                if (pause := head.put_item(*_dump(item))) is not None:
                    await pause
        return
    await _send_items(head, result)


async def _send_items(head: CallHead, generator: Any) -> None:
    if not isinstance(generator, AsyncGeneratorType):
        raise WrongKindError(_no_generator(head.method))
    try:
        async for item in generator:
            if (pause := head.put_item(*_dump(item))) is not None:
                await pause
    except asyncio.CancelledError as error:
        # The caller went away while its window was full: the generator hears of it as if it had been suspended itself.
        with contextlib.suppress(StopAsyncIteration, asyncio.CancelledError):
            await generator.athrow(error)
        raise
    finally:
        await generator.aclose()


def _run_stream(head: CallHead, result: Any) -> Any:
    """Sends the items of a sync method's generator from the pool's thread; an async one is left to the loop."""
    if isinstance(result, AsyncGeneratorType):
        return _send_items(head, result)
    if not isinstance(result, GeneratorType):
        raise WrongKindError(_no_generator(head.method))
    with contextlib.closing(result):
        for item in result:
            head.put_item(*_dump(item))
    return None


def _no_generator(name: str) -> str:
    return f"Called method '{name}' with `handle.options(stream=True)` but it did not return a generator."


def _wrong_kind(name: str) -> str:
    return (
        f"Method '{name}' returned a generator. "
        "You must use `handle.options(stream=True)` to call generators on a deployment."
    )


_FAULTS: dict[type[BaseException], int] = {
    NoSuchMethodError: NO_METHOD,
    WrongKindError: WRONG_KIND,
    UnpicklableError: UNPICKLABLE,
}
