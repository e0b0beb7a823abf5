"""How code reaches the replicas: from scripts, importable modules, modules loaded by path, runtime environments."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from rayserve_fast import serve

MODULE = """
from dataclasses import dataclass
from rayserve_fast import serve

@dataclass
class Settings:
    value: int

def double(value):
    return 2 * value

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Service:
    def __init__(self, settings):
        assert isinstance(settings, Settings)
        self.settings = settings
    def __call__(self):
        return double(self.settings.value)

class Plain:
    def __call__(self):
        return __name__
"""


def test_code_of_an_importable_module_reaches_the_replica(
    serve_instance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importable_service.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import importable_service as module  # type: ignore[import-not-found]

    assert serve.run(module.Service.bind(module.Settings(4))).remote().result() == 8
    plain = serve.deployment(ray_actor_options={"num_cpus": 0})(module.Plain)
    assert serve.run(plain.bind()).remote().result() == "importable_service"


def test_code_that_only_this_process_has_reaches_the_replica(serve_instance: str, tmp_path: Path) -> None:
    file = tmp_path / "unreachable_service.py"
    file.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("unreachable_service", file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["unreachable_service"] = module
    spec.loader.exec_module(module)
    try:
        assert serve.run(module.Service.bind(module.Settings(5))).remote().result() == 10
    finally:
        del sys.modules["unreachable_service"]


def test_a_script_with_the_drivers_runtime_env(run_script: Any) -> None:
    """Classes of `__main__` both ways; the job's `env_vars` where a deployment has no runtime_env of its own."""
    done = run_script(
        """
import os
from dataclasses import dataclass
import ray
from rayserve_fast import serve

@dataclass
class Point:
    x: int

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Mover:
    def __init__(self, point):
        self.point = point
    def __call__(self, by):
        return Point(self.point.x + by.x), os.environ.get("COLOUR"), os.environ.get("SHAPE")

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"COLOUR": "green"}})
    serve.start(http_options={"port": 0})
    moved, colour, shape = serve.run(Mover.bind(Point(1))).remote(Point(2)).result()
    assert (moved, colour, shape) == (Point(3), "green", None), (moved, colour, shape)
    own = Mover.options(ray_actor_options={"runtime_env": {"env_vars": {"SHAPE": "round"}}})
    moved, colour, shape = serve.run(own.bind(Point(1))).remote(Point(2)).result()
    assert (moved, shape) == (Point(3), "round"), (moved, shape)
    serve.shutdown()
    ray.shutdown()
"""
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_arguments_are_told_before_ray_is_started(run_script: Any) -> None:
    done = run_script(
        """
import ray
from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException

@serve.deployment
def f(): ...

cases = [
    (TypeError, lambda: serve.run(f)),
    (RayServeException, lambda: serve.run(f.bind(), name="")),
    (ValueError, lambda: serve.run(f.bind(), route_prefix="x")),
    (ValueError, lambda: serve.run(f.bind(), logging_config={"log_level": "LOUD"})),
    (ValueError, lambda: serve.run(f.bind(), controller_options={"runtime_env": {"pip": []}})),
    (ValueError, lambda: serve.run_many([])),
    (ValueError, lambda: serve.start(http_options={"port": "x"})),
    (ValueError, lambda: serve.start(http_options={"port": 99999})),
    (TypeError, lambda: serve.start(http_options=3)),
    (ValueError, lambda: serve.init(http_port=99999, ray_init_kwargs={"num_cpus": 1})),
]
for error, case in cases:
    try:
        case()
    except error:
        continue
    raise AssertionError(error)
assert not ray.is_initialized()
"""
    )
    assert done.returncode == 0, done.stdout + done.stderr
