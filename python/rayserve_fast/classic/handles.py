"""The older handles: their calls give `ray.ObjectRef`s, which `ray.get`, `ray.wait`, Ray's tasks and `await` take.

Adapters on a `DeploymentHandle`, which knows whom to call and how; `bridge.py` makes the calls. Everything else
gives today's handles, see docs/classic.md for who gets which.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rayserve_fast.classic import bridge

if TYPE_CHECKING:
    from ray import ObjectRef

    from rayserve_fast.handle import DeploymentHandle

_UNSET: Any = object()
Handle = TypeVar("Handle", bound="RayServeHandle")


class RayServeHandle:
    """Calls a deployment as Ray Serve's handles did before 2.7.

    Args:
        handle: whom to call, and how.
        sync: `.remote()` returns the ObjectRef; otherwise what is awaited once for it.
        http_method: for targets that take a request also from handles (the Client API): its method.
        http_headers: the headers of such a request.

    >>> from rayserve_fast.handle import DeploymentHandle
    >>> handle = RayServeHandle(DeploymentHandle("Model", "Model"), sync=True)
    >>> handle.predict, handle.options(method_name="predict", shard_key="user-7").method_name
    (RayServeHandle(deployment='Model'), 'predict')
    """

    __module__ = "rayserve_fast.handle"  # where users find it

    def __init__(
        self,
        handle: DeploymentHandle,
        sync: bool = False,
        http_method: str = "GET",
        http_headers: Mapping[str, str] | None = None,
    ) -> None:
        self._handle = handle
        self._sync = sync
        self._http_method = http_method
        self._http_headers = dict(http_headers or {})

    @property
    def deployment_name(self) -> str:
        """The deployment that is called."""
        return self._handle.deployment_name

    @property
    def method_name(self) -> str:
        """The method that is called."""
        return self._handle._options.method_name

    @property
    def is_sync(self) -> bool:
        """Whether `.remote()` returns the ObjectRef itself."""
        return self._sync

    def options(
        self: Handle,
        *,
        method_name: str = _UNSET,
        http_method: str = _UNSET,
        shard_key: str = _UNSET,
        http_headers: Mapping[str, str] = _UNSET,
        multiplexed_model_id: str = _UNSET,
    ) -> Handle:
        """A copy of this handle with other options.

        Args:
            method_name: the method to call; `__call__` if never set.
            http_method, http_headers: see the class.
            shard_key: calls with the same one go to the same replica, and to the same target of an endpoint.
            multiplexed_model_id: the model that the call is for.
        """
        asked = {"method_name": method_name, "session_id": shard_key, "multiplexed_model_id": multiplexed_model_id}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not _UNSET}
        return type(self)(
            self._handle.options(**given) if given else self._handle,
            self._sync,
            self._http_method if http_method is _UNSET else http_method,
            self._http_headers if http_headers is _UNSET else http_headers,
        )

    def __getattr__(self: Handle, name: str) -> Handle:
        # Copying, pickling and inspection ask for such names, before __init__ has run even; none is a method to call.
        if name.startswith("_") and name != "__call__":
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return self.options(method_name=name)

    def remote(self, *args: Any, **kwargs: Any) -> ObjectRef[Any] | Coroutine[Any, Any, ObjectRef[Any]]:
        """Call the deployment; the call is on its way when this returns.

        Args:
            *args, **kwargs: what the method is called with. An ObjectRef at the top level arrives as its value.

        Returns:
            The `ray.ObjectRef` of the answer, or with `sync=False` what gives it when awaited. `ray.get` of it raises
            what the method raised, as its own type and as a `RayTaskError`; `ray.cancel` cancels the call.

        Raises:
            TypeError, RayServeException: an argument cannot be sent.
        """
        ref: ObjectRef[Any] = bridge.call(self._handle, *self._arguments(args, kwargs))
        return ref if self._sync else _given(ref)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the target is called with; handles of endpoints make a request of it."""
        return args, kwargs

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._handle, self._sync, self._http_method, self._http_headers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(deployment='{self.deployment_name}')"


class RayServeSyncHandle(RayServeHandle):
    """One whose `.remote()` returns the ObjectRef."""

    __module__ = "rayserve_fast.handle"

    def __init__(self, handle: DeploymentHandle, sync: bool = True, *args: Any) -> None:
        super().__init__(handle, sync, *args)


class RayServeDeploymentHandle(RayServeHandle):
    """One of a deployment in the same application, as constructors were given them: `ref = await handle.remote()`."""

    __module__ = "rayserve_fast.handle"


def older_handle(handle: DeploymentHandle, sync: bool) -> RayServeHandle:
    """What `get_handle(sync=...)` of the older APIs returns; starts the bridge."""
    bridge.prepare()
    return RayServeSyncHandle(handle) if sync else RayServeHandle(handle)


async def _given(ref: ObjectRef[Any]) -> ObjectRef[Any]:
    return ref
