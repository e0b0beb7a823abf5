"""Building: the graph that `bind` made becomes deployments whose arguments hold handles."""

from __future__ import annotations

import collections.abc
import importlib.util
import logging
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from ray import cloudpickle

from rayserve_fast import RunTarget, serve
from rayserve_fast.application import build, build_target, call_builder
from rayserve_fast.controlplane.spec import ApplicationSpec, Definition
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.handle import DeploymentHandle


@serve.deployment
class Leaf:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


@serve.deployment
class Root:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Box:
    """Something of the user's that holds an application."""

    def __init__(self, content: Any) -> None:
        self.content = content


def opened(spec: ApplicationSpec, name: str) -> Definition:
    definition = next(d.definition for d in spec.deployments if d.name == name)
    return cloudpickle.loads(definition)  # type: ignore[no-any-return]


def names(spec: ApplicationSpec) -> list[str]:
    return [deployment.name for deployment in spec.deployments]


def test_a_single_deployment() -> None:
    spec = build(Leaf.bind(1, key="value"), "app", "/x")
    assert (spec.name, spec.route_prefix, spec.ingress, names(spec)) == ("app", "/x", "Leaf", ["Leaf"])
    definition = opened(spec, "Leaf")
    assert definition.func_or_class.__name__ == "Leaf"
    assert (definition.init_args, definition.init_kwargs) == ((1,), {"key": "value"})


def test_applications_are_replaced_by_handles_at_any_depth() -> None:
    nested = {"list": [Leaf.bind(2), ({"key": Leaf.bind(3)},)], "object": Box(Leaf.bind(4))}
    spec = build(Root.bind(Leaf.bind(1), nested=nested))
    assert spec.ingress == "Root"
    assert names(spec) == ["Leaf", "Leaf_1", "Leaf_2", "Leaf_3", "Root"]
    definition = opened(spec, "Root")
    arguments = definition.init_kwargs["nested"]
    found = [
        definition.init_args[0],
        arguments["list"][0],
        arguments["list"][1][0]["key"],
        arguments["object"].content,
    ]
    assert all(isinstance(handle, DeploymentHandle) for handle in found)
    assert [handle.deployment_name for handle in found] == ["Leaf", "Leaf_1", "Leaf_2", "Leaf_3"]
    assert [opened(spec, name).init_args for name in names(spec)[:-1]] == [(1,), (2,), (3,), (4,)]


def test_the_same_application_twice_is_one_deployment() -> None:
    leaf = Leaf.bind()
    spec = build(Root.bind(leaf, [leaf], Root.options(name="Middle").bind(leaf)))
    assert names(spec) == ["Leaf", "Middle", "Root"]
    arguments = opened(spec, "Root").init_args
    assert arguments[0] is arguments[1][0]


def test_equal_names_are_numbered_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        spec = build(Leaf.bind(Leaf.bind(Leaf.bind())))
    assert names(spec) == ["Leaf", "Leaf_1", "Leaf_2"]
    assert spec.ingress == "Leaf_2"  # callees are named first
    assert [r.getMessage() for r in caplog.records] == [
        f"application 'default' has several deployments named 'Leaf'; one is renamed to 'Leaf_{n}'." for n in (1, 2)
    ]


def test_an_application_bound_to_itself_is_refused() -> None:
    arguments: list[Any] = []
    application = Leaf.bind(arguments)
    arguments.append(application)
    with pytest.raises(ValueError, match="bound, through its own arguments, to itself"):
        build(application)


def test_an_application_that_code_merely_refers_to_is_none_of_its_arguments() -> None:
    elsewhere = Leaf.bind()

    @serve.deployment
    def refers() -> Any:
        return elsewhere

    spec = build(refers.bind())
    assert names(spec) == ["refers"]
    assert isinstance(opened(spec, "refers").func_or_class(), type(elsewhere))


def test_an_ingress_is_known_with_its_docs() -> None:
    api = FastAPI(docs_url="/manual")

    @serve.deployment
    @serve.ingress(api)
    class Api:
        @api.get("/")
        def read(self) -> str:
            return ""

    ingress, leaf = build(Api.bind()).deployments[0], build(Leaf.bind()).deployments[0]
    assert (ingress.is_asgi, ingress.docs_path) == (True, "/manual")
    assert (leaf.is_asgi, leaf.docs_path) == (False, None)


def test_an_application_has_one_asgi_ingress() -> None:
    first = serve.deployment(serve.ingress(FastAPI())(type("First", (), {})))
    second = serve.deployment(serve.ingress(FastAPI())(type("Second", (), {})))
    with pytest.raises(RayServeException, match='Found multiple FastAPI deployments in application "app"'):
        build(first.bind(second.bind()), "app")


def test_building_twice_gives_different_code_versions() -> None:
    application = Leaf.bind()
    assert build(application).deployments[0].code_version != build(application).deployments[0].code_version


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(TypeError, match=r"the arguments bound to the deployment Leaf: cannot pickle '_thread\.lock'"):
        build(Leaf.bind(threading.Lock()))
    lock = threading.Lock()

    @serve.deployment
    def locks() -> None:
        lock.acquire()

    with pytest.raises(TypeError, match=r"the deployment locks: cannot pickle '_thread\.lock'"):
        build(locks.bind())


@pytest.mark.parametrize("target", [Leaf, "Leaf", None, Leaf.func_or_class])
def test_only_an_application_can_be_run(target: Any) -> None:
    with pytest.raises(TypeError, match=r"`serve.run` expects an `Application` returned by `Deployment.bind\(\)`."):
        build(target)


def test_an_application_needs_a_name() -> None:
    with pytest.raises(RayServeException, match="Application name must a non-empty string"):
        build(Leaf.bind(), "")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: build(Leaf.bind(), 3), TypeError, "name: must be a string, got int"),
        (lambda: build(Leaf.bind(), "a\ud800"), ValueError, r"name: 'a\\ud800' cannot be encoded as UTF-8"),
        (lambda: build(Leaf.bind(), "a", 3), TypeError, "route_prefix: must be a string, got int"),
        (lambda: build(Leaf.bind(), "a", "/\udfff"), ValueError, "route_prefix: .* lone surrogate at index 1"),
        (lambda: Leaf.options(name="\ud800"), ValueError, "name: .* cannot be encoded as UTF-8"),
    ],
)
def test_names_and_prefixes_are_text_that_travels(
    make: collections.abc.Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("prefix", ["x", "", "/x/", "/{x}", "/a}"])
def test_a_bad_route_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="Invalid route_prefix"):
        build(Leaf.bind(), "app", prefix)


@pytest.mark.parametrize("prefix", ["/", "/x", "/x/y", None])
def test_a_good_route_prefix_is_kept(prefix: str | None) -> None:
    assert build(Leaf.bind(), "app", prefix).route_prefix == prefix


@pytest.mark.parametrize(
    ("own", "default", "expected"),
    [
        (None, {}, None),
        (None, {"working_dir": "gcs://d", "env_vars": {"A": "1"}}, {"working_dir": "gcs://d", "env_vars": {"A": "1"}}),
        ({"env_vars": {"B": "2"}}, {"env_vars": {"A": "1"}}, {"env_vars": {"B": "2"}}),
        ({"env_vars": {"B": "2"}}, {"working_dir": "gcs://d"}, {"env_vars": {"B": "2"}, "working_dir": "gcs://d"}),
        ({"working_dir": "gcs://o"}, {"working_dir": "gcs://d", "pip": ["x"]}, {"working_dir": "gcs://o"}),
        ({}, {"working_dir": "gcs://d", "pip": ["x"]}, {"working_dir": "gcs://d"}),
    ],
)
def test_the_drivers_runtime_env_is_the_default(own: Any, default: dict[str, Any], expected: Any) -> None:
    deployment = Leaf if own is None else Leaf.options(ray_actor_options={"runtime_env": own})
    spec = build(deployment.bind(), default_runtime_env=default).deployments[0]
    assert spec.config.ray_actor_options.get("runtime_env") == expected
    assert spec.driver.runtime_env == default
    assert spec.driver.cwd == str(Path.cwd())


def test_a_spec_travels_by_plain_pickle() -> None:
    spec = build(Root.bind(Leaf.bind()))
    assert pickle.loads(pickle.dumps(spec)) == spec


# Which code travels how


def test_an_importable_class_travels_by_reference() -> None:
    spec = build(serve.deployment(Path).bind())
    assert b"pathlib" in spec.deployments[0].definition
    assert len(spec.deployments[0].definition) < 300


def test_classes_of_the_standard_library_travel_by_reference_under_every_name() -> None:
    class Sequence(collections.abc.Sequence):  # by value, and with it a reference to its base
        def __len__(self) -> int:
            return 1

        def __getitem__(self, at: Any) -> Any:
            return at

    definition = cloudpickle.loads(build(serve.deployment(Sequence).bind()).deployments[0].definition)
    assert definition.func_or_class.__mro__[1] is collections.abc.Sequence


def test_code_that_the_replica_cannot_import_travels_by_value(tmp_path: Path) -> None:
    """As of a test module under `--import-mode=importlib`: in `sys.modules`, but on no path."""
    file = tmp_path / "loaded_by_path.py"
    file.write_text(
        "CONSTANT = 7\ndef helper():\n    return CONSTANT\nclass Service:\n    answer = staticmethod(helper)\n"
    )
    spec = importlib.util.spec_from_file_location("loaded_by_path", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["loaded_by_path"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        built = build(serve.deployment(module.Service).bind(module.helper))
    finally:
        del sys.modules["loaded_by_path"]
    definition = opened(built, "Service")
    assert definition.func_or_class.answer() == definition.init_args[0]() == 7
    from ray.cloudpickle import cloudpickle as implementation

    assert "loaded_by_path" not in implementation._PICKLE_BY_VALUE_MODULES  # nothing is left registered


def test_a_script_travels_by_value(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from rayserve_fast import serve\n"
        "from rayserve_fast.application import build\n"
        "class Settings:\n    value = 3\n"
        "@serve.deployment\nclass Service:\n    def __init__(self, settings): self.settings = settings\n"
        "sys.stdout.buffer.write(build(Service.bind(Settings())).deployments[0].definition)\n"
    )
    written = subprocess.run([sys.executable, str(script)], check=True, capture_output=True).stdout
    definition = cloudpickle.loads(written)
    assert definition.func_or_class(*definition.init_args).settings.value == 3


# The rest of `serve.run`


def test_a_wrong_logging_config_of_an_application_is_refused() -> None:
    with pytest.raises(ValidationError, match="log_level"):
        build_target(RunTarget(Leaf.bind(), logging_config={"log_level": "LOUD"}))


@pytest.mark.parametrize(
    ("options", "replicas"),
    [
        ({}, 1),
        ({"num_replicas": 3}, 3),
        ({"num_replicas": "auto"}, 1),
        ({"num_replicas": "auto", "autoscaling_config": {"min_replicas": 4}}, 4),
        ({"autoscaling_config": {"min_replicas": 2, "max_replicas": 9}}, 2),
        ({"autoscaling_config": {"min_replicas": 2, "initial_replicas": 5, "max_replicas": 9}}, 5),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 9}}, 1),  # nothing would ever start another
        ({"autoscaling_config": {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 9}}, 1),
    ],
)
def test_replicas_to_run_while_nothing_scales(options: dict[str, Any], replicas: int) -> None:
    assert build(Leaf.options(**options).bind()).deployments[0].config.num_replicas == replicas


# Application builders


class Arguments(BaseModel):
    size: int
    name: str = "n"


def from_dict(args: dict[str, str]) -> Any:
    return Leaf.bind(args)


def from_model(args: Arguments) -> Any:
    return Leaf.bind(args.size, args.name)


def test_a_builder_gets_a_dict() -> None:
    assert call_builder(from_dict, {"a": "1"})._bound_deployment.init_args == ({"a": "1"},)


def test_a_builder_gets_its_model_also_by_a_textual_annotation() -> None:
    assert from_model.__annotations__["args"] == "Arguments"
    assert call_builder(from_model, {"size": "2"})._bound_deployment.init_args == (2, "n")
    with pytest.raises(ValidationError, match="size"):
        call_builder(from_model, {})


def test_an_application_needs_no_builder() -> None:
    application = Leaf.bind()
    assert call_builder(application, {}) is application
    with pytest.raises(ValueError, match="Arguments can only be passed to an application builder"):
        call_builder(application, {"a": "1"})


@pytest.mark.parametrize(
    ("builder", "text"),
    [
        (Leaf, "Expected an Application or an application builder function"),
        (lambda: Leaf.bind(), "exactly one parameter"),
        (lambda a, b: Leaf.bind(), "exactly one parameter"),
        (lambda args: Leaf, "must return an `Application`"),
    ],
)
def test_what_is_no_builder_is_refused(builder: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call_builder(builder, {})
