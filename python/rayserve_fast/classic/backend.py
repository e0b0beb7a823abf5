"""What a replica of a backend runs: the user's function or object, behind what turns requests into its arguments.

A backend is an application of one deployment, whose class is one of these. An HTTP request arrives as today's
`Request`, a call by a handle of an endpoint as one `HandleRequest`, and with `@serve.accept_batch` either as a list. A
call by one of today's handles passes its arguments through. Which method is called: the handle's, or the one that the
header X-SERVE-CALL-METHOD names.

What is called is sync or async as the user's method is, so that sync code gets a thread and async code the loop. Where
a header asks for a method of the other kind, it goes to the other place. In a batch, what goes wrong before its call
goes wrong for one request alone.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from ray import ObjectRef

from rayserve_fast.classic.requests import MULTIPART, FlaskRequest, HandleRequest, fields_of
from rayserve_fast.classic.session import FLASK
from rayserve_fast.context import _batch_size, _RequestContext, _serve_request_context
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.replica import batches
from rayserve_fast.replica.calls import is_async
from rayserve_fast.replica.request import Request
from rayserve_fast.replica.responses import Refused

#: Over HTTP: the method to call.
CALL_METHOD = b"x-serve-call-method"
#: What is asked for by name but is no handler: the replica's hooks.
_HOOKS = {"check_health", "reconfigure", "record_autoscaling_stats", "record_routing_stats", "record_replica_metadata"}

Arrived: TypeAlias = Request | HandleRequest
Arguments: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]


class NoMethodError(RayServeException, Refused):
    """A client has asked for a method that is not there, which is answered 400."""


class Backend:
    """One replica's object.

    Args:
        func_or_class: the user's.
        init_args: of the class's constructor.
        requests: which requests it gets, `session.FLASK` or `session.STARLETTE`.
    """

    def __init__(self, func_or_class: Callable[..., Any], init_args: tuple[Any, ...], requests: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_function = inspect.isfunction(func_or_class)
        self._user: Any = func_or_class if self._is_function else func_or_class(*init_args)
        self._flask = requests == FLASK
        self._methods: dict[str, Method] = {}

    def __del__(self) -> None:
        """Lets go of the user's object, whose own `__del__` Python then calls: once, when the replica stops."""
        self._methods, self._user = {}, None

    def __dir__(self) -> list[str]:
        return dir(self._user)

    def __getattr__(self, name: str) -> Any:
        """A method of the user's object: as it is if it is a hook, else as what handles call."""
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._user, name)
        if name in _HOOKS or not callable(found):
            return found
        return partial(self._run_async if is_async(found) else self._run_sync, name)

    def _run_sync(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """On a thread of the pool."""
        arrived = _arrived(args, kwargs)
        if arrived is None:
            return self._method(name).call(*args, **kwargs)
        if not isinstance(arrived, list):
            method = self._method(_named(arrived) or name)
            given, named = self._ready(arrived, method) or self._now(self._prepare(arrived, method))
            result = method.call(*given, **named)
            return self._now(result) if method.is_async else result
        results = _entered(arrived)
        for method, places in self._groups(arrived, name, results):
            group = [arrived[place] for place in places]
            prepared = self._all_ready(group, method) or self._now(self._prepare_all(group, method))
            places, rows = _without_failed(results, places, prepared)
            try:
                some = method.call_batch(rows)
                _put(results, places, self._now(some) if method.is_async else some)
            except Exception as error:
                _put(results, places, _for_each(error, places, arrived))
        return results

    async def _run_async(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """On the user's loop."""
        arrived = _arrived(args, kwargs)
        if arrived is None:
            return await _later(self._method(name), args, kwargs)
        if not isinstance(arrived, list):
            method = self._method(_named(arrived) or name)
            given, named = self._ready(arrived, method) or await self._prepare(arrived, method)
            return await (method.call(*given, **named) if method.is_async else _later(method, given, named))
        results = _entered(arrived)
        for method, places in self._groups(arrived, name, results):
            group = [arrived[place] for place in places]
            prepared = self._all_ready(group, method) or await self._prepare_all(group, method)
            places, rows = _without_failed(results, places, prepared)
            try:
                some = method.call_batch(rows) if method.is_async else asyncio.to_thread(method.call_batch, rows)
                _put(results, places, await some)
            except Exception as error:
                _put(results, places, _for_each(error, places, arrived))
        return results

    def _groups(self, batch: list[Arrived], name: str, results: list[Any]) -> Iterator[tuple[Method, list[int]]]:
        """The places in a batch that one call serves: one method, and keyword arguments of the same names.

        Who names a method that is not there has that as the result.
        """
        groups: dict[tuple[str, frozenset[str]], list[int]] = {}
        for place, arrived in enumerate(batch):
            by_name = arrived.query_params if self._flask and isinstance(arrived, HandleRequest) else ()
            groups.setdefault((_named(arrived) or name, frozenset(by_name)), []).append(place)
        for (called, _), places in groups.items():
            try:
                method = self._method(called)
            except Exception as error:
                _put(results, places, [error] * len(places))
                continue
            yield method, places

    def _method(self, name: str) -> Method:
        if self._is_function:
            name = "__call__"  # whatever name was sent: there is one
        if name not in self._methods:
            self._methods[name] = Method(self._user if self._is_function else self._public(name))
        return self._methods[name]

    def _public(self, name: str) -> Callable[..., Any]:
        if name == "__call__" or not (name.startswith("_") or name in _HOOKS):
            found = getattr(self._user, name, None)
            if callable(found):
                return found  # type: ignore[no-any-return]
        public = [attr for attr in dir(self._user) if not attr.startswith("_") and callable(getattr(self._user, attr))]
        # Only a header names a method that is not there. To have no `__call__` is no fault of the client's.
        kind = RayServeException if name == "__call__" else NoMethodError
        raise kind(f"The backend has no method '{name}' to call. Available methods: {public}.")

    def _ready(self, arrived: Arrived, method: Method) -> Arguments | None:
        """The arguments for one request if there is nothing to wait for: the way of nearly all."""
        if isinstance(arrived, HandleRequest):
            values = (arrived.data, *arrived.query_params.values())
            return None if any(type(value) is ObjectRef for value in values) else self._of_call(arrived, method)
        if not (self._flask and method.takes_request):
            return method.given(arrived)
        body = arrived._head.body
        if body is None or _holds_fields(arrived):
            return None
        return method.given(FlaskRequest(arrived, body))

    def _all_ready(self, group: list[Arrived], method: Method) -> list[Arguments] | None:
        """The arguments for each request if all of them are ready."""
        prepared = [self._ready(arrived, method) for arrived in group]
        return None if None in prepared else prepared  # type: ignore[return-value]

    async def _prepare_all(self, group: list[Arrived], method: Method) -> list[Arguments | BaseException]:
        """The arguments for each request, or what keeps it from having some; nobody waits for another's body."""
        return await asyncio.gather(*(self._prepare(arrived, method) for arrived in group), return_exceptions=True)

    async def _prepare(self, arrived: Arrived, method: Method) -> Arguments:
        """The arguments for one request, once all of it is there."""
        if isinstance(arrived, HandleRequest):
            await _resolve(arrived)
            return self._of_call(arrived, method)
        body = await arrived.body()
        return method.given(FlaskRequest(arrived, body, await fields_of(arrived) if _holds_fields(arrived) else ()))

    def _of_call(self, call: HandleRequest, method: Method) -> Arguments:
        return method.called(call, FlaskRequest.of_call(call)) if self._flask else method.given(call)

    def _now(self, result: Any) -> Any:
        """On a thread: what something async comes to, in the context of the request that the thread serves."""
        return asyncio.run_coroutine_threadsafe(_awaited(result), self._loop).result()


class SyncBackend(Backend):
    """One whose `__call__` is sync."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run_sync("__call__", *args, **kwargs)


class AsyncBackend(Backend):
    """One whose `__call__` is async."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self._run_async("__call__", *args, **kwargs)


class Method:
    """How one method of the user's is called.

    Args:
        call: the bound method, or the function.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.is_async = is_async(call)
        self.takes_batch = accepts_batch(call)
        self._signature = inspect.signature(call)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        kinds = [parameter.kind for parameter in self._signature.parameters.values()]
        self.takes_request = any(kind in positional or kind is inspect.Parameter.VAR_POSITIONAL for kind in kinds)

    def given(self, request: Any) -> Arguments:
        """The request, if there is a parameter for it."""
        return ((request,) if self.takes_request else ()), {}

    def called(self, call: HandleRequest, request: FlaskRequest) -> Arguments:
        """The keyword arguments of a call, and the request where they leave a parameter for it."""
        kwargs = call.query_params
        for arguments in (((request,), kwargs), ((), kwargs), ((request,), {})):
            try:
                self._signature.bind(*arguments[0], **arguments[1])
            except TypeError:
                continue
            return arguments
        return (), kwargs  # the call itself says best what is wrong

    def call_batch(self, prepared: list[Arguments]) -> Any:
        """The results of a batch, or what gives them when awaited; one by one if the method takes no batch.

        Args:
            prepared: the arguments for each request, all of the same names.

        Raises:
            RayServeException: the result is no list of the batch's length.
        """
        if not prepared or not self.takes_batch:
            return _each_later(self, prepared) if self.is_async else _each(self, prepared)
        size = len(prepared)
        args = [list(column) for column in zip(*(args for args, _ in prepared), strict=True)]
        kwargs = {name: [kwargs[name] for _, kwargs in prepared] for name in prepared[0][1]}
        if self.is_async:
            return self._checked_later(size, args, kwargs)
        token = _batch_size.set(size)
        try:
            return batches.results(self.call(*args, **kwargs), size)
        finally:
            _batch_size.reset(token)

    async def _checked_later(self, size: int, args: list[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        token = _batch_size.set(size)
        try:
            return batches.results(await self.call(*args, **kwargs), size)
        finally:
            _batch_size.reset(token)


def accepts_batch(function: Callable[..., Any]) -> bool:
    """Whether `@serve.accept_batch` stands over a function, a method, or the `__call__` of a class."""
    call = function.__call__ if inspect.isclass(function) else function
    return bool(getattr(call, "_serve_accept_batch", False))


def _arrived(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arrived | list[Arrived] | None:
    """The request, or the batch of them, that this is a call with; None for the arguments of one of today's handles."""
    if len(args) != 1 or kwargs:
        return None
    first = args[0][0] if type(args[0]) is list and args[0] else args[0]
    return args[0] if type(first) in (Request, HandleRequest) else None


def _entered(batch: list[Arrived]) -> list[Any]:
    """Room for the results of a batch, whose requests have no context in common but how they came."""
    _serve_request_context.set(_RequestContext(is_http_request=type(batch[0]) is Request))
    return [None] * len(batch)


def _put(results: list[Any], places: list[int], some: Iterable[Any]) -> None:
    for place, result in zip(places, some, strict=True):
        results[place] = result


def _without_failed(
    results: list[Any], places: list[int], prepared: Sequence[Arguments | BaseException]
) -> tuple[list[int], list[Arguments]]:
    """The places whose arguments are there, and those; what another has instead is its result."""
    _put(results, places, prepared)
    kept = [(place, one) for place, one in zip(places, prepared, strict=True) if not isinstance(one, BaseException)]
    return [place for place, _ in kept], [arguments for _, arguments in kept]


def _for_each(error: Exception, places: list[int], batch: list[Arrived]) -> list[Exception]:
    """The error of a call as the result of each request that it served.

    Raises:
        Exception: that error, if it served all of them: the replica logs it once then.
    """
    if len(places) == len(batch):
        raise error
    return [error] * len(places)


def _named(arrived: Arrived) -> str | None:
    """The method that the client names."""
    if isinstance(arrived, HandleRequest):
        return None
    value = _header(arrived, CALL_METHOD)
    return None if value is None else value.decode("latin-1")


def _header(request: Request, name: bytes) -> bytes | None:
    """Without the cost of all headers as Starlette has them."""
    return request._head.header(name)  # type: ignore[attr-defined,no-any-return]


def _holds_fields(request: Request) -> bool:
    """Whether the body is a form that has to be taken apart first; types are in any case."""
    kind = _header(request, b"content-type")
    return kind is not None and kind.lower().startswith(MULTIPART.encode())


async def _resolve(call: HandleRequest) -> None:
    """Put values in the place of the references among what a handle was called with."""
    if type(call.data) is ObjectRef:
        call.data = await call.data
    for name, value in call.query_params.items():
        if type(value) is ObjectRef:
            call.query_params[name] = await value


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _each(method: Method, prepared: list[Arguments]) -> list[Any]:
    """The result of a sync method for each request, or the error."""
    results: list[Any] = []
    for args, kwargs in prepared:
        try:
            results.append(method.call(*args, **kwargs))
        except Exception as error:
            results.append(error)
    return results


async def _each_later(method: Method, prepared: list[Arguments]) -> list[Any]:
    """The result of an async method for each request, or the error."""
    return await asyncio.gather(*(_later(method, *arguments) for arguments in prepared), return_exceptions=True)


async def _later(method: Method, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if method.is_async:
        return await method.call(*args, **kwargs)
    return await asyncio.to_thread(method.call, *args, **kwargs)
