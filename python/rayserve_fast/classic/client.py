"""The Client API: `serve.start` and `serve.connect` give a `Client`, whose methods are about endpoints and backends.

A client holds no connection; all of them speak of the one instance that runs in the Ray cluster. One that was started
with `detached=False` ends with this process: not with the client, which most programs never kept.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from rayserve_fast.classic import backends, endpoints, session
from rayserve_fast.classic.config import BackendConfig, CondaEnv, given_config
from rayserve_fast.controlplane import client
from rayserve_fast.exceptions import RayServeException


def connect() -> Client:
    """A client of the Serve that runs in this Ray cluster; in a backend, of the one that it belongs to.

    Backends that this process makes with `serve.create_backend` get Starlette's request from here on.

    Raises:
        RayServeException: none runs.
    """
    if not session.running():
        raise RayServeException(
            "Called `serve.connect()` but there is no instance running on this Ray cluster. Please call"
            " `serve.start(detached=True)` to start one."
        )
    return connected()


def connected(tied: bool = False) -> Client:
    """A client of the Serve that is known to run; `tied`: which ends with this process."""
    session.speak(session.STARLETTE)
    if tied:
        atexit.register(_end, session.require()._actor_id)
    return Client()


class Client:
    """What `serve.start` and `serve.connect` return. Backends made through it get Starlette's request.

    Today's functions of the same names (`serve.set_traffic`, `serve.shutdown`) and `serve.run` do what its methods do.
    """

    def create_endpoint(
        self,
        endpoint_name: str,
        *,
        backend: str | None = None,
        route: str | None = None,
        methods: Sequence[str] = ("GET",),
    ) -> None:
        """Register an endpoint whose requests go to a backend.

        Args:
            endpoint_name: its name.
            backend: the tag of the backend.
            route: see `serve.create_endpoint`.
            methods: see `serve.create_endpoint`.

        Raises:
            TypeError: no backend is given, or an argument is of another type.
            ValueError: the name or the route is registered, or there is no such backend.
        """
        if backend is None:
            raise TypeError("backend must be specified when creating an endpoint.")
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a string, got {type(backend).__name__}.")
        endpoints.create(endpoint_name, route, methods, backend)

    def delete_endpoint(self, endpoint: str) -> None:
        """Forget an endpoint; see `serve.delete_endpoint`."""
        endpoints.delete_endpoint(endpoint)

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Every endpoint: `route`, `methods`, `traffic` and `shadows` by backend."""
        found: dict[str, dict[str, Any]] = session.ask("endpoints")
        return found

    def create_backend(
        self,
        backend_tag: str,
        func_or_class: Callable[..., Any],
        *init_args: Any,
        ray_actor_options: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | BackendConfig | None = None,
        env: CondaEnv | None = None,
    ) -> None:
        """Start the replicas of a backend; see `serve.create_backend`."""
        given = given_config(config, "a BackendConfig or a dictionary")
        backends.create(backend_tag, func_or_class, init_args, ray_actor_options, given, env, session.STARLETTE)

    def update_backend_config(self, backend_tag: str, config_options: Mapping[str, Any] | BackendConfig) -> None:
        """Change a backend's configuration; see `serve.update_backend_config`."""
        backends.update_backend_config(backend_tag, config_options)

    def get_backend_config(self, backend_tag: str) -> BackendConfig:
        """A backend's configuration."""
        return backends.get_backend_config(backend_tag)

    def list_backends(self) -> dict[str, BackendConfig]:
        """The configuration of every backend."""
        return {tag: BackendConfig(**labels["config"]) for tag, labels in backends.labels_by_tag().items()}

    def delete_backend(self, backend_tag: str, force: bool = False) -> None:
        """Stop a backend; see `serve.delete_backend`."""
        backends.delete_backend(backend_tag, force)

    def set_traffic(self, endpoint_name: str, traffic_policy_dictionary: Mapping[str, float]) -> None:
        """Split an endpoint's requests over backends, by weights that sum to 1."""
        session.ask("set_traffic", endpoint_name, traffic_policy_dictionary)

    def shadow_traffic(self, endpoint_name: str, backend_tag: str, proportion: float) -> None:
        """Copy a share of an endpoint's requests, 0 to 1, to one more backend, whose answers nobody gets."""
        session.ask("shadow_traffic", endpoint_name, backend_tag, proportion)

    def get_handle(self, endpoint_name: str, missing_ok: bool = False, sync: bool = True) -> endpoints.EndpointHandle:
        """A handle to an endpoint.

        Args:
            endpoint_name: of the endpoint.
            missing_ok: it may be created later.
            sync: `handle.remote()` returns the ObjectRef; else `await handle.remote()` does.

        Raises:
            KeyError: there is no such endpoint.
        """
        return endpoints.handle(endpoint_name, missing_ok, sync)

    def shutdown(self) -> None:
        """End Serve, for everybody; see `serve.shutdown`."""
        from rayserve_fast import api

        api.shutdown()

    def __reduce__(self) -> NoReturn:
        raise RayServeException(
            "Ray Serve client cannot be serialized. Please use serve.connect() to get a client within a backend."
        )


def _end(controller_id: Any) -> None:
    """The program ends, and with it the instance that was tied to it; another one is none of its business."""
    from rayserve_fast import api

    controller = client.find()
    if controller is not None and controller._actor_id == controller_id:
        api.shutdown()
