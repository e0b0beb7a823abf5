"""The package as a namespace: one under all its names, and free for processes that use a part of it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import rayserve_fast

HEAVY = ("fastapi", "numpy", "pydantic", "ray", "starlette")


def run(source: str) -> str:
    return subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True).stdout.strip()


def imported_by(statement: str) -> set[str]:
    return set(run(f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])").split())


@pytest.mark.parametrize(
    ("statement", "cost"),
    [
        ("import rayserve_fast", set()),
        ("from rayserve_fast import serve", set()),
        ("import rayserve_fast.context", set()),
        ("import rayserve_fast.controlplane.spec, rayserve_fast.controlplane.status", set()),
        ("import rayserve_fast.exceptions", {"ray"}),
        ("import rayserve_fast.controlplane.controller, rayserve_fast.controlplane.proxy", {"ray"}),
        ("import rayserve_fast.replica.actor", {"ray"}),
        ("import rayserve_fast.handle", {"ray"}),
        ("from rayserve_fast import get_replica_context", set()),
        ("from rayserve_fast import deployment; deployment(print.__class__)", {"pydantic"}),
    ],
)
def test_import_costs_only_what_it_needs(statement: str, cost: set[str]) -> None:
    assert imported_by(statement) == cost


def test_opening_a_plain_spec_needs_no_pydantic() -> None:
    """What the controller does with what a driver sent."""
    driver = (
        "import pickle, sys; from rayserve_fast import serve\n"
        "class A: pass\n"
        "config = serve.deployment(autoscaling_config={'max_replicas': 3}, user_config=[1])(A)._options.plain()\n"
        "print(pickle.dumps(config).hex())"
    )
    controller = f"import pickle, sys; pickle.loads(bytes.fromhex('{run(driver)}')); print('pydantic' in sys.modules)"
    assert run(controller) == "False"


def test_serve_is_the_package_itself() -> None:
    from rayserve_fast import serve

    assert serve is rayserve_fast
    assert importlib.import_module("rayserve_fast.serve") is rayserve_fast
    assert rayserve_fast.serve.serve is rayserve_fast


def test_code_that_refers_to_the_namespace_travels() -> None:
    """By Ray's cloudpickle, which knows plain modules only."""
    from ray import cloudpickle

    from rayserve_fast import serve

    assert cloudpickle.loads(cloudpickle.dumps(lambda: serve))() is rayserve_fast


def test_modules_under_serve_are_not_copies() -> None:
    under_serve = importlib.import_module("rayserve_fast.serve.config")
    assert under_serve is importlib.import_module("rayserve_fast.config")
    assert under_serve.__spec__.name == "rayserve_fast.config"
    assert (
        importlib.import_module("rayserve_fast.serve.controlplane.spec").__name__ == "rayserve_fast.controlplane.spec"
    )


@pytest.mark.parametrize("name", ["deployment", "ingress"])
def test_submodule_does_not_hide_the_function_of_its_name(name: str) -> None:
    source = f"import rayserve_fast.{name}, rayserve_fast as s; from rayserve_fast import {name} as n"
    source += f"; print(n is s.{name}, callable(n))"
    assert run(source) == "True True"


def test_public_modules_are_attributes_without_being_imported() -> None:
    for name in ("batching", "config", "context", "exceptions", "gang", "handle", "schema"):
        assert run(f"from rayserve_fast import serve; print(serve.{name}.__name__)") == f"rayserve_fast.{name}"
        assert name in dir(rayserve_fast)


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in rayserve_fast.__all__:
        assert getattr(rayserve_fast, name) is not None
        assert name in dir(rayserve_fast)


def test_type_checkers_see_every_public_name() -> None:
    """The table for the interpreter, the imports for type checkers and the stub of `serve` name the same."""
    from pathlib import Path

    package = Path(rayserve_fast.__file__ or "").parent
    for file in ("__init__.py", "serve.pyi"):
        text = (package / file).read_text()
        assert [
            name for name in [*rayserve_fast.__all__, *rayserve_fast._MODULES] if f"{name} as {name}" not in text
        ] == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rayserve_fast.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from rayserve_fast import nothing  # noqa: F401
