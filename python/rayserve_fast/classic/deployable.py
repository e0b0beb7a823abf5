"""The part of `Deployment` that deploys it by itself, as before there was `serve.run`; the work is in `deploy.py`.

Apart from that because a deployment is defined without Ray, which is imported when one is deployed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayserve_fast.classic.spelling import OlderOptions, warn_older

if TYPE_CHECKING:
    from rayserve_fast.controlplane.spec import ApplicationSpec
    from rayserve_fast.handle import RayServeHandle
    from rayserve_fast.options import DeploymentOptions

#: Requests that a replica works on at once if `.deploy()` made it, unless the deployment says otherwise.
MAX_CONCURRENT_QUERIES = 100


class Deployable:
    """What has a name, options and a definition."""

    _name: str
    _options: DeploymentOptions
    _older: OlderOptions

    @property
    def prev_version(self) -> str | None:
        """The version that must be there when `.deploy()` replaces it; None: any."""
        return self._older.prev_version

    @property
    def route_prefix(self) -> str | None:
        """Where `.deploy()` makes it reachable over HTTP: `/{name}` unless it was given; None: nowhere."""
        return f"/{self._name}" if self._older.route is None else self._older.route[0]

    @property
    def max_concurrent_queries(self) -> int:
        """Requests that a replica works on at once if `.deploy()` makes it; 100 unless it was given."""
        return self._deployed_options().max_ongoing_requests

    def deploy(self, *init_args: Any, _blocking: bool = True, **init_kwargs: Any) -> None:
        """Deploy it by itself, as the application of its name; starts Ray and Serve if they do not run.

        Without a `version` each call replaces the replicas. With the version that is there already, code and
        constructor arguments stay as they are and only options are updated.

        Args:
            *init_args, **init_kwargs: of the constructor; those of the decorator or `options()` if there are none.
            _blocking: return when it serves.

        Raises:
            ValueError: `prev_version` is not the version that is there.
            RayServeException: the name, or the route, belongs to somebody else.
            RuntimeError: it failed, with the traceback of the user's code.
        """
        from rayserve_fast.classic import deploy

        warn_older("`Deployment.deploy()`", "`serve.run(Deployment.bind())`")
        given = {"init_args": init_args, "init_kwargs": init_kwargs}
        changes = {part: value for part, value in given.items() if value}
        deploy.deploy(self._copy(**changes) if changes else self, _blocking)

    def delete(self) -> None:
        """Delete what `.deploy()` made; nothing if there is none.

        Raises:
            TimeoutError: it was not gone after 60 s; it goes on leaving.
        """
        from rayserve_fast.classic import deploy

        warn_older("`Deployment.delete()`", "`serve.delete(name)`")
        deploy.delete(self._name)

    def get_handle(self, sync: bool = True) -> RayServeHandle:
        """A handle whose calls give ObjectRefs.

        Args:
            sync: `ray.get(handle.remote())`; otherwise `await (await handle.remote())`, for use in an event loop.

        Raises:
            KeyError: it has not been deployed. A replica's event loop is not held up to ask: a call raises there.
        """
        from rayserve_fast.classic import deploy

        warn_older("`Deployment.get_handle()`", "`serve.get_app_handle(name)`")
        return deploy.handle(self._name, sync)

    def _copy(self, **changes: Any) -> Any:
        """A copy with other parts, which are named as the constructor's parameters."""
        raise NotImplementedError

    def _deployed_options(self) -> DeploymentOptions:
        """The options with this API's own default."""
        if "max_ongoing_requests" in self._options.model_fields_set:
            return self._options
        return self._options.model_copy(update={"max_ongoing_requests": MAX_CONCURRENT_QUERIES})

    def _built(self, runtime_env: dict[str, Any]) -> ApplicationSpec:
        """What is deployed; `runtime_env` is this driver's."""
        from rayserve_fast.application import RunTarget, build_target
        from rayserve_fast.deployment import Application

        deployment = self._copy(options=self._deployed_options(), older=OlderOptions())
        return build_target(RunTarget(Application(deployment), self._name, self.route_prefix), runtime_env)
