"""The user's object of one replica, and everything that is called on it besides its handlers.

Constructor, ``reconfigure``, ``check_health``, ``__del__`` and what it says for routers run on the user's loop; of
these, all but the constructor and ``__del__`` get a thread if they are sync, as they may block. Where requests come
from is not known here: a `ReplicaRuntime` serves them from sockets, `rayserve_fast.local` calls from the same process.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from typing import TYPE_CHECKING, Any

from rayserve_fast import multiplex
from rayserve_fast.classic.parameters import with_older_handles
from rayserve_fast.exceptions import RayServeException

if TYPE_CHECKING:
    from collections.abc import Callable

    from rayserve_fast.context import ReplicaContext
    from rayserve_fast.controlplane.spec import Definition, DeploymentConfig
    from rayserve_fast.replica.asgi import AsgiApp
    from rayserve_fast.replica.loop import UserLoop

logger = logging.getLogger("ray.serve")


class Servable:
    """Nothing until `construct`.

    Args:
        loop: the user's, running.
        context: what `serve.get_replica_context()` returns; it is given the object when there is one.
    """

    target: Any = None  # the instance, or the function
    is_function = False
    asgi: AsgiApp | None = None

    def __init__(self, loop: UserLoop, context: ReplicaContext) -> None:
        self._loop = loop
        self.context = context
        self._config = context._deployment_config

    def construct(self, definition: Definition) -> None:
        """Make the object, start its ASGI application, give it its first configuration; raises what they raise."""
        from rayserve_fast.ingress import asgi_app_of

        self._loop.run(_limit_threads, self._config.max_ongoing_requests)
        self.is_function = inspect.isfunction(definition.func_or_class)
        self.target = definition.func_or_class if self.is_function else self._loop.run(_construct, definition)
        self.context.servable_object = self.target
        if (ingress := asgi_app_of(definition.func_or_class)) is not None:
            from rayserve_fast.replica.asgi import AsgiApp

            self.asgi = AsgiApp(ingress, self.target)
            self._loop.run(self.asgi.start)
        self._reconfigure()

    def reconfigure(self, config: DeploymentConfig) -> None:
        """Apply the limit of threads, and tell the object its `user_config` if that has changed."""
        old, self._config = self._config, config
        if config.max_ongoing_requests != old.max_ongoing_requests:
            self._loop.run(_limit_threads, config.max_ongoing_requests)
        if config.user_config is not None and config.user_config != old.user_config:
            self._reconfigure()

    def check_health(self) -> None:
        """Raises what the user's `check_health` raises; without one it tells whether the loop still turns."""
        check = self.hook("check_health")
        self._loop.run(check or _nothing, in_thread=check is not None)

    def hook(self, name: str) -> Callable[..., Any] | None:
        """A method of the object that is called by other than requests; None: it has none of this name."""
        return None if self.is_function else getattr(self.target, name, None)

    def call_hook(self, name: str) -> Any:
        """What such a method returns, None without one; raises what it raises."""
        hook = self.hook(name)
        return None if hook is None else self._loop.run(hook, in_thread=True)

    def destroy(self) -> None:
        """End its ASGI application, call its ``__del__`` now, once, unload its models, and let go of it."""
        if self.asgi is not None:
            self._loop.run(self.asgi.stop)
        target, self.target = self.target, None
        self._delete(target)
        multiplex.listen(self.context, None)
        if multiplex.held(self.context):
            self._loop.run(multiplex.unload, self.context)

    def _delete(self, target: Any) -> None:
        if target is None or self.is_function or not hasattr(type(target), "__del__"):
            return
        try:
            self._loop.run(target.__del__)
        except BaseException:
            logger.exception("__del__ of %s raised.", self.context.replica_id)
        finally:
            _retire(target)

    def _reconfigure(self) -> None:
        config, deployment = self._config.user_config, self.context.replica_id.deployment_id
        reconfigure = self.hook("reconfigure")
        takes_rank = reconfigure is not None and "rank" in inspect.signature(reconfigure).parameters
        if config is None and not takes_rank:
            return
        if self.is_function:
            raise ValueError("deployment_def must be a class to use user_config or rank")
        if reconfigure is None:
            raise RayServeException(
                f"user_config or rank specified but deployment {deployment} missing reconfigure method"
            )

        def call() -> Any:
            return reconfigure(config, rank=self.context.rank) if takes_rank else reconfigure(config)

        self._loop.run(call, in_thread=True)


def _limit_threads(limit: int) -> None:
    """On the loop's thread: as many sync routes of FastAPI or Starlette run at once as requests do; anyio's is 40."""
    from anyio.to_thread import current_default_thread_limiter

    current_default_thread_limiter().total_tokens = limit


async def _construct(definition: Definition) -> Any:
    """The user's object; its constructor runs on the loop's thread and may be ``async def``."""
    kind: Any = definition.func_or_class
    target = kind.__new__(kind)
    args, kwargs = with_older_handles(kind.__init__, target, definition.init_args, definition.init_kwargs)
    result = target.__init__(*args, **kwargs)
    if inspect.isawaitable(result):
        await result
    return target


def _retire(target: Any) -> None:
    """Keep the interpreter from calling ``__del__`` again when the object goes; its class may have other objects."""
    kind = type(target)
    with contextlib.suppress(TypeError):  # of a layout that no subclass can have
        target.__class__ = type(kind.__name__, (kind,), {"__slots__": (), "__del__": _forget})


def _nothing() -> None:
    pass


def _forget(_self: Any) -> None:
    pass
