"""How a definition, the user's code with its bound arguments, becomes the bytes that only replicas open.

The pickler is Ray's cloudpickle with two habits of its own. Bound applications among the arguments, however deeply they
are nested, are written as the handles that replace them. And code travels by reference only if the replica, which gets
the driver's `sys.path`, can import it: what is importable is imported, everything else (the script itself, a notebook,
a test module that its runner loaded by path) travels by value.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import sysconfig
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from ray import cloudpickle

from rayserve_fast.controlplane.spec import unpack_definition
from rayserve_fast.deployment import Application, Deployment

if TYPE_CHECKING:
    from rayserve_fast.handle import DeploymentHandle


def dumps(deployment: Deployment, replace: Callable[[Application], DeploymentHandle]) -> bytes:
    """The definition of `deployment`; `replace` is asked for the handle of every application among its arguments.

    Raises:
        TypeError: the code or an argument cannot be pickled.
    """
    code, args = deployment.func_or_class, (deployment.init_args, deployment.init_kwargs)
    # The code goes first, by itself: an application that it merely refers to is none of its arguments.
    code_bytes = dump_code(code, None, f"Could not serialize the deployment {deployment.name}")
    problem = f"Could not serialize the arguments bound to the deployment {deployment.name}"
    return dump_code(_Packed(code_bytes, *args), replace, problem)


class _Packed:
    """Pickles as the call that makes a `Definition` again."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack_definition, self._parts


class CodePickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Ray's cloudpickle with the habits that the module's text names."""

    #: Applications that the code mentions are written as those of `serve.ingress` are.
    freezes = True

    def __init__(self, out: io.BytesIO, replace: Callable[[Application], DeploymentHandle] | None) -> None:
        super().__init__(out)
        self._replace = replace
        self._importable: dict[str, bool] = {}
        self.by_value: list[ModuleType] = []

    def reducer_override(self, obj: Any) -> Any:
        if self._replace is not None and isinstance(obj, Application):
            return self._replace(obj).__reduce_ex__(5)
        if isinstance(obj, (type, FunctionType, ModuleType)):
            self._choose(obj.__name__ if isinstance(obj, ModuleType) else obj.__module__)
        elif self.freezes and _is_application(obj):
            from rayserve_fast.ingress import freeze

            return cloudpickle.loads, (freeze(obj),)
        return super().reducer_override(obj)

    def _choose(self, name: str) -> None:
        """Before cloudpickle meets this module's code for the first time: tell it how that travels."""
        module = sys.modules.get(name)
        if module is None or name == "__main__" or name in self._importable:
            return
        self._importable[name] = is_importable(module, name)
        if not self._importable[name]:
            cloudpickle.register_pickle_by_value(module)
            self.by_value.append(module)


class RouterPickler(CodePickler):
    """For code that proxies run: they have no driver's `sys.path`, so what is not installed travels by value."""

    def _choose(self, name: str) -> None:
        module = sys.modules.get(name)
        if module is None or name == "__main__" or name in self._importable:
            return
        paths = sysconfig.get_paths()
        roots = tuple(os.path.realpath(paths[kind]) for kind in ("stdlib", "purelib", "platlib"))
        file: str | None = getattr(module, "__file__", None)
        installed = name.partition(".")[0] == "rayserve_fast" or not file or os.path.realpath(file).startswith(roots)
        self._importable[name] = installed
        if not installed:
            cloudpickle.register_pickle_by_value(module)
            self.by_value.append(module)


def dump_code(
    value: Any,
    replace: Callable[[Application], DeploymentHandle] | None,
    problem: str,
    kind: type[CodePickler] = CodePickler,
) -> bytes:
    """Pickle code for a replica; `problem` begins the text of the TypeError if it cannot be."""
    out = io.BytesIO()
    pickler = kind(out, replace)
    try:
        pickler.dump(value)
    except (TypeError, AttributeError, RecursionError, pickle.PicklingError) as error:
        raise TypeError(f"{problem}: {error}") from error
    finally:
        for module in pickler.by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return out.getvalue()


def _is_application(obj: Any) -> bool:
    starlette = sys.modules.get("starlette.applications")
    return starlette is not None and isinstance(obj, starlette.Starlette)


def is_importable(module: ModuleType, name: str) -> bool:
    """Whether another process with this one's `sys.path` would import `module` under `name`."""
    own: str = getattr(getattr(module, "__spec__", None), "name", name)
    if own != name and own.partition(".")[0] in sys.stdlib_module_names:
        return True  # another name of it, as `collections.abc` is one of `_collections_abc` since Python 3.13
    path: Any = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:end]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    here: str | None = getattr(module, "__file__", None)
    there = spec.origin if spec else None
    if not (here and there and spec and spec.has_location):  # built in, frozen (`os`), or a namespace
        return True
    return os.path.realpath(here) == os.path.realpath(there)


def _find(name: str, path: Any) -> ModuleSpec | None:
    """What `importlib.util.find_spec` does, without looking into `sys.modules`, which the replica does not have."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
        if spec is not None:
            return spec
    return None
