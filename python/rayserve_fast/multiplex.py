"""Several models in one replica: `serve.multiplexed` and `serve.get_multiplexed_model_id`.

A loader decorated so keeps the models that it has loaded, the least recently used one leaves first. What a replica
holds is told to its callers, over the links on which they call it, as soon as it changes; their routers prefer a
replica that holds a request's model (ARCHITECTURE.md, "Picking a replica"). Nobody asks the controller.

Everything here runs on the user's event loop, so that a cache needs no lock but the one that keeps loads apart.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, overload

from rayserve_fast.context import (
    ReplicaContext,
    _serve_batch_request_context,
    _serve_request_context,
    get_replica_context,
)
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.text import check_text

__all__ = ["get_multiplexed_model_id", "multiplexed"]

F = TypeVar("F", bound=Callable[..., Any])

#: Every cache of this process, and what each replica of it wants to be told.
_caches: weakref.WeakSet[ModelCache] = weakref.WeakSet()
_listeners: dict[Any, Callable[[list[str]], None]] = {}


@overload
def multiplexed(func: F) -> F: ...
@overload
def multiplexed(func: None = None, max_num_models_per_replica: int = 3) -> Callable[[F], F]: ...
def multiplexed(func: Any = None, max_num_models_per_replica: int = 3) -> Any:
    """Keep what an async loader of models returns, for each model id, at most so many at a time.

    Args:
        func: an async function of the model id, or an async method of the deployment's class.
        max_num_models_per_replica: models that a replica keeps; -1: any number. When there is no room the least
            recently used one is unloaded first: its ``__del__``, which may be async, is called and awaited.

    Raises:
        TypeError: `func` is not async or has other parameters than the model id, or the number is no integer.
        ValueError: the number is 0 or below -1.

    >>> @multiplexed(max_num_models_per_replica=2)
    ... async def load(model_id: str) -> str:
    ...     return f"model {model_id}"
    >>> multiplexed(len)
    Traceback (most recent call last):
    ...
    TypeError: @serve.multiplexed can only be used to decorate async functions or methods.
    """
    if type(max_num_models_per_replica) is not int:
        raise TypeError("max_num_models_per_replica must be an integer.")
    if max_num_models_per_replica != -1 and max_num_models_per_replica <= 0:
        raise ValueError("max_num_models_per_replica must be positive.")
    if func is None:
        return functools.partial(_decorate, limit=max_num_models_per_replica)
    return _decorate(func, limit=max_num_models_per_replica)


def get_multiplexed_model_id() -> str:
    """The model id of the current request: of its header or of its handle's options; empty if it has none.

    In a function of `serve.batch` it is that of all requests of the batch.

    >>> get_multiplexed_model_id()
    ''
    """
    batch = _serve_batch_request_context.get(None)
    context = batch[0] if batch else _serve_request_context.get()
    return "" if context is None else context.multiplexed_model_id


def _decorate(func: Callable[..., Awaitable[Any]], limit: int) -> Callable[..., Coroutine[Any, Any, Any]]:
    if not inspect.iscoroutinefunction(func):
        raise TypeError("@serve.multiplexed can only be used to decorate async functions or methods.")
    parameters = len(inspect.signature(func).parameters)
    if parameters not in (1, 2):
        raise TypeError(
            "@serve.multiplexed can only be used to decorate functions or methods with at least one "
            "'model_id: str' argument."
        )
    # Of a method each object has its own cache, which goes with the object.
    attribute = f"__serve_multiplex_{func.__name__}"

    def cache_of(owner: Any, load: Callable[[str], Awaitable[Any]]) -> ModelCache:
        cache: ModelCache | None = owner.__dict__.get(attribute)
        if cache is None:
            cache = ModelCache(load, limit)
            setattr(owner, attribute, cache)
        return cache

    if parameters == 1:

        @functools.wraps(func)
        async def load(model_id: str) -> Any:
            return await cache_of(load, func).get(model_id)

    else:

        @functools.wraps(func)
        async def load(self: Any, model_id: str) -> Any:
            own = weakref.ref(self)  # the cache hangs on the object
            return await cache_of(self, lambda model_id: func(own(), model_id)).get(model_id)

    return load


class ModelCache:
    """The models of one loader in one replica, and the one that is being loaded.

    Args:
        load: makes a model of its id.
        limit: how many to keep; -1: all.
    """

    def __init__(self, load: Callable[[str], Awaitable[Any]], limit: int) -> None:
        self._replica = _replica()
        self._load = load
        self._limit = limit
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._loading: str | None = None
        self._lock = asyncio.Lock()
        _caches.add(self)

    async def get(self, model_id: str) -> Any:
        """The model, loaded if need be; raises what its loader raises."""
        if type(model_id) is not str:
            raise TypeError("The model ID must be a string.")
        if not model_id:
            raise ValueError("The model ID cannot be empty.")
        if model_id in self._models:
            self._models.move_to_end(model_id)
            return self._models[model_id]
        check_text("model_id", model_id)  # callers are told of it
        async with self._lock:
            if model_id not in self._models:  # somebody may have loaded it meanwhile
                await self._make_room(model_id)
                try:
                    self._models[model_id] = await self._load(model_id)
                finally:
                    self._loading = None
                    if model_id not in self._models:
                        _tell(self._replica)
            self._models.move_to_end(model_id)
            return self._models[model_id]

    async def _make_room(self, coming: str) -> None:
        leaving = []
        while 0 < self._limit <= len(self._models):
            leaving.append(self._models.popitem(last=False)[1])
        self._loading = coming
        _tell(self._replica)  # before the load, which may take long: others that want the model come here
        while leaving:
            await _unload(leaving.pop())

    async def clear(self) -> None:
        """Unload every model."""
        while self._models:
            await _unload(self._models.popitem()[1])

    def ids(self) -> list[str]:
        """The models that are held or being loaded."""
        return [*self._models, *([self._loading] if self._loading is not None else ())]


async def _unload(model: Any) -> None:
    """Call its ``__del__``, once, whoever else still refers to it."""
    from rayserve_fast.replica.servable import _retire

    delete = getattr(type(model), "__del__", None)
    if delete is None:
        return
    try:
        if inspect.iscoroutinefunction(delete):
            await delete(model)
        else:
            await asyncio.to_thread(delete, model)
    finally:
        _retire(model)


def held(replica: ReplicaContext) -> list[str]:
    """The models that a replica of this process holds or loads."""
    caches = sorted((cache for cache in _caches if cache._replica is replica), key=id)
    return list(dict.fromkeys(model for cache in caches for model in cache.ids()))


def listen(replica: ReplicaContext, tell: Callable[[list[str]], None] | None) -> None:
    """Have `tell` called with what `replica` holds when that changes, and now if there is something; None: no more."""
    if tell is None:
        _listeners.pop(id(replica), None)
        return
    _listeners[id(replica)] = tell
    if models := held(replica):
        tell(models)


async def unload(replica: ReplicaContext) -> None:
    """Unload every model of a replica that ends."""
    for cache in [cache for cache in _caches if cache._replica is replica]:
        await cache.clear()


def _tell(replica: ReplicaContext) -> None:
    if (tell := _listeners.get(id(replica))) is not None:
        tell(held(replica))


def _replica() -> ReplicaContext:
    try:
        return get_replica_context()
    except RayServeException:
        raise RuntimeError(
            "`@serve.multiplex` can only be used within a deployment (failed to retrieve Serve replica context)."
        ) from None
