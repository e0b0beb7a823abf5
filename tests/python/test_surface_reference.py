"""The public surface, held against what `reference/record.py` wrote down of Ray Serve 2.60.

What differs on purpose stands in the tables below, with the reason; anything else that differs fails.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "reference"))
import record
from cases import CASES, Library, outcome

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "serve_2_60.json").read_text())

# Options of our own, which stand behind the reference's.
OLDER_OPTIONS = [
    "route_prefix",
    "prev_version",
    "init_args",
    "init_kwargs",
    "max_concurrent_queries",
    "_autoscaling_config",
]
BATCHING_OPTIONS = ["max_batch_size", "batch_wait_timeout_s", "max_concurrent_batches"]
OWN_OPTIONS = ["retry_idempotent", *BATCHING_OPTIONS, *OLDER_OPTIONS]
OWN_PARAMETERS = {"serve.deployment": OWN_OPTIONS, "serve.Deployment.options": OWN_OPTIONS}
# `.deploy()` obeys it; the reference's error comes from `serve.run`: see test_classic_deploy.py.
ACCEPTED = {"version", "options version"}
OWN_FIELDS = {"config.HTTPOptions": {"max_head_bytes": 65536, "max_body_bytes": None, "shards": None}}
OTHER_DEFAULTS = {
    # built-in implementations have our import paths
    ("config.AutoscalingPolicy", "policy_function"): "rayserve_fast.autoscaling_policy:default_autoscaling_policy",
    ("config.AutoscalingConfig", "policy"): {
        "policy_function": "rayserve_fast.autoscaling_policy:default_autoscaling_policy",
        "policy_kwargs": {},
    },
    ("config.RequestRouterConfig", "request_router_class"): ("rayserve_fast.request_router:LeastLoadedRequestRouter"),
}
LEFT_OUT = {
    "serve.get_deployment_handle": ["_record_telemetry"],  # nothing is recorded
    "context.ReplicaContext": ["_handle_registration_callback"],  # the controller need not know of handles
}
# Names of `ray.serve` whose features have issues of their own.
LATER = {
    "get_deployment_actor",
    "get_deployment_actor_context",
    "get_trace_context",
}


def module(name: str) -> Any:
    return importlib.import_module("rayserve_fast" if name == "serve" else f"rayserve_fast.{name}")


def owner(path: str) -> Any:
    name, *rest = path.split(".")
    found = module(name)
    for part in rest:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("case", CASES.keys() - ACCEPTED)
def test_case_ends_as_in_ray_serve(case: str) -> None:
    expected = REFERENCE["cases"][case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = Library(module("serve"), module("config"), module("schema"), module("exceptions"))
        found, text = outcome(case, library)
    if case in ("http", "http both"):
        for field, default in OWN_FIELDS["config.HTTPOptions"].items():
            assert found["value"].pop(field) == default
    assert found == expected
    phrase = CASES[case][1]
    assert phrase is None or phrase in text


def test_every_case_is_recorded() -> None:
    assert set(CASES) == set(REFERENCE["cases"])


@pytest.mark.parametrize("path", REFERENCE["functions"])
def test_function_takes_the_same_arguments(path: str) -> None:
    expected = [p for p in REFERENCE["functions"][path] if p[0] not in LEFT_OUT.get(path, ())]
    found = record.signature(owner(path))
    assert found[: len(expected)] == expected
    assert [name for name, _, _ in found[len(expected) :]] == OWN_PARAMETERS.get(path, [])


@pytest.mark.parametrize("path", REFERENCE["models"])
def test_configuration_class_has_the_same_fields_and_defaults(path: str) -> None:
    expected = REFERENCE["models"][path] | OWN_FIELDS.get(path, {})
    expected = {name: OTHER_DEFAULTS.get((path, name), default) for name, default in expected.items()}
    assert record.fields(owner(path)) == expected


@pytest.mark.parametrize("path", REFERENCE["dataclasses"])
def test_dataclass_has_the_same_fields(path: str) -> None:
    expected = [name for name in REFERENCE["dataclasses"][path] if name not in LEFT_OUT.get(path, ())]
    assert [name for name, _, _ in record.signature(owner(path))] == expected


@pytest.mark.parametrize("path", REFERENCE["enums"])
def test_enumeration_has_the_same_members(path: str) -> None:
    members = {m.name: [m.value, getattr(m, "to_numeric", lambda: None)()] for m in owner(path)}
    assert members == REFERENCE["enums"][path]


@pytest.mark.parametrize("name", REFERENCE["exceptions"])
def test_exception_has_the_same_parents_and_arguments(name: str) -> None:
    found = getattr(module("exceptions"), name)
    assert [parent.__name__ for parent in found.__mro__[1:]] == REFERENCE["exceptions"][name]["parents"]
    assert record.signature(found.__init__) == REFERENCE["exceptions"][name]["signature"]


def test_deployment_has_the_same_properties() -> None:
    deployment = module("deployment").Deployment
    assert (
        sorted(n for n, v in vars(deployment).items() if isinstance(v, property)) == REFERENCE["deployment_properties"]
    )


def test_public_names_are_there_or_have_an_issue() -> None:
    missing = {name for name in REFERENCE["public"] if not hasattr(module("serve"), name)}
    assert missing == LATER
