"""Ray Serve's API on a Rust data plane.

`from rayserve_fast import serve` and `import rayserve_fast as serve` give the same namespace, this package, and its
modules stand where those of `ray.serve` stand: `ray.serve.handle` is `rayserve_fast.handle`.

Names are imported when they are first used. The controller, the proxies and the replicas import parts of this package
too, and must not pay for pydantic, FastAPI and Starlette, which only the part that faces the user needs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayserve_fast import (
        batching as batching,
        config as config,
        context as context,
        exceptions as exceptions,
        gang as gang,
        handle as handle,
        schema as schema,
        serve as serve,
        traffic as traffic,
    )
    from rayserve_fast._core import __version__ as __version__
    from rayserve_fast.api import (
        _run as _run,
        _run_many as _run_many,
        delete as delete,
        get_app_handle as get_app_handle,
        get_deployment_handle as get_deployment_handle,
        run as run,
        run_many as run_many,
        shutdown as shutdown,
        shutdown_async as shutdown_async,
        start as start,
        status as status,
    )
    from rayserve_fast.application import RunTarget as RunTarget
    from rayserve_fast.batching import batch as batch
    from rayserve_fast.classic.backends import (
        accept_batch as accept_batch,
        create_backend as create_backend,
        delete_backend as delete_backend,
        get_backend_config as get_backend_config,
        get_current_backend_tag as get_current_backend_tag,
        get_current_replica_tag as get_current_replica_tag,
        list_backends as list_backends,
        update_backend_config as update_backend_config,
    )
    from rayserve_fast.classic.client import (
        connect as connect,
    )
    from rayserve_fast.classic.config import (
        BackendConfig as BackendConfig,
        CondaEnv as CondaEnv,
    )
    from rayserve_fast.classic.deployed import (
        get_deployment as get_deployment,
        list_deployments as list_deployments,
    )
    from rayserve_fast.classic.endpoints import (
        create_endpoint as create_endpoint,
        delete_endpoint as delete_endpoint,
        get_handle as get_handle,
        link as link,
        list_endpoints as list_endpoints,
        route as route,
        split as split,
        stat as stat,
    )
    from rayserve_fast.classic.session import (
        init as init,
    )
    from rayserve_fast.config import ControllerOptions as ControllerOptions, HTTPOptions as HTTPOptions
    from rayserve_fast.context import get_replica_context as get_replica_context
    from rayserve_fast.deployment import (
        Application as Application,
        Deployment as Deployment,
        deployment as deployment,
    )
    from rayserve_fast.ingress import ingress as ingress
    from rayserve_fast.multiplex import (
        get_multiplexed_model_id as get_multiplexed_model_id,
        multiplexed as multiplexed,
    )
    from rayserve_fast.schema import TracingConfig as TracingConfig
    from rayserve_fast.traffic import (
        delete_traffic as delete_traffic,
        get_rollout as get_rollout,
        get_traffic as get_traffic,
        rollout as rollout,
        set_traffic as set_traffic,
        shadow_traffic as shadow_traffic,
    )

# Where each public name lives; the same table as above, for the interpreter.
_HOME = {
    "Application": "deployment",
    "BackendConfig": "classic.config",
    "CondaEnv": "classic.config",
    "ControllerOptions": "config",
    "Deployment": "deployment",
    "HTTPOptions": "config",
    "RunTarget": "application",
    "TracingConfig": "schema",
    "_run": "api",
    "_run_many": "api",
    "accept_batch": "classic.backends",
    "connect": "classic.client",
    "create_backend": "classic.backends",
    "create_endpoint": "classic.endpoints",
    "batch": "batching",
    "delete": "api",
    "delete_backend": "classic.backends",
    "delete_endpoint": "classic.endpoints",
    "delete_traffic": "traffic",
    "deployment": "deployment",
    "get_app_handle": "api",
    "get_backend_config": "classic.backends",
    "get_current_backend_tag": "classic.backends",
    "get_current_replica_tag": "classic.backends",
    "get_deployment": "classic.deployed",
    "get_deployment_handle": "api",
    "get_handle": "classic.endpoints",
    "get_multiplexed_model_id": "multiplex",
    "get_replica_context": "context",
    "get_rollout": "traffic",
    "get_traffic": "traffic",
    "ingress": "ingress",
    "init": "classic.session",
    "link": "classic.endpoints",
    "list_backends": "classic.backends",
    "list_deployments": "classic.deployed",
    "list_endpoints": "classic.endpoints",
    "multiplexed": "multiplex",
    "rollout": "traffic",
    "route": "classic.endpoints",
    "run": "api",
    "run_many": "api",
    "set_traffic": "traffic",
    "shadow_traffic": "traffic",
    "shutdown": "api",
    "shutdown_async": "api",
    "split": "classic.endpoints",
    "start": "api",
    "stat": "classic.endpoints",
    "status": "api",
    "update_backend_config": "classic.backends",
}

# Modules that are there without having been imported, as those of `ray.serve` are: `serve.config.AutoscalingConfig`.
_MODULES = {"batching", "config", "context", "exceptions", "gang", "handle", "schema", "traffic"}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(f"{__name__}._core").__version__
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES, "__version__"})


class _Namespace(ModuleType):
    """This module: importing a submodule never hides the function of the same name (`deployment`, `ingress`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)  # user code refers to `serve`; cloudpickle knows exact modules only


class _ServeAlias(MetaPathFinder, Loader):
    """Makes `rayserve_fast.serve.x` the module `rayserve_fast.x`, instead of a second copy with classes of its own."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.startswith(f"{__name__}.serve.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(spec.name.replace(".serve", "", 1))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # what the import system has just overwritten


serve = sys.modules[__name__]
serve.__class__ = _Namespace
sys.modules[f"{__name__}.serve"] = serve
sys.meta_path.insert(0, _ServeAlias())
