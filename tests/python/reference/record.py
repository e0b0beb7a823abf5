"""Write down what Ray Serve's public surface is: names, signatures, defaults, and what the cases give.

Run it in an environment that has `ray[serve]==2.60.0` and its output becomes `serve_2_60.json`:

    python tests/python/reference/record.py > tests/python/reference/serve_2_60.json

The tests hold this project against that file; nothing of Ray Serve is needed to run them.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, Library, outcome, plain

FUNCTIONS = {
    "serve": [
        "_run",
        "_run_many",
        "delete",
        "deployment",
        "get_app_handle",
        "get_deployment_handle",
        "get_replica_context",
        "ingress",
        "run",
        "run_many",
        "shutdown",
        "start",
        "status",
    ],
    "serve.Deployment": ["bind", "options", "set_logging_config"],
}
MODELS = {
    "config": [
        "AutoscalingConfig",
        "AutoscalingPolicy",
        "BackpressureConfig",
        "ControllerOptions",
        "DeploymentActorConfig",
        "GangSchedulingConfig",
        "HTTPOptions",
        "RequestRouterConfig",
        "gRPCOptions",
    ],
    "schema": ["LoggingConfig", "TracingConfig"],
}
DATACLASSES = {
    "serve": ["RunTarget"],
    "schema": ["ApplicationStatusOverview", "DeploymentStatusOverview", "ServeStatus"],
    "context": ["DeploymentActorContext", "ReplicaContext", "_RequestContext"],
}
ENUMS = {
    "config": ["AggregationFunction", "GangPlacementStrategy", "GangRuntimeFailurePolicy", "ProxyLocation"],
    "schema": [
        "ApplicationStatus",
        "DeploymentStatus",
        "DeploymentStatusTrigger",
        "EncodingType",
        "ProxyStatus",
        "ReplicaState",
    ],
}
EXCEPTIONS = [
    "BackPressureError",
    "DeploymentUnavailableError",
    "RayServeException",
    "ReplicaUnavailableError",
    "RequestCancelledError",
    "gRPCStatusError",
]


def signature(function: Any) -> list[list[Any]]:
    """Name, kind and default of each parameter."""
    parameters = inspect.signature(function).parameters.values()
    return [[p.name, p.kind.name, None if p.default is p.empty else str(p.default)] for p in parameters]


def fields(model: Any) -> dict[str, Any]:
    """The default of each field of a pydantic model, or that there is none."""
    return {
        name: "required" if field.is_required() else plain(field.get_default(call_default_factory=True))
        for name, field in model.model_fields.items()
    }


def surface(package: Any, modules: dict[str, Any]) -> dict[str, Any]:
    """Everything of the surface that can be looked at."""
    named = {"serve": package, "serve.Deployment": package.Deployment, **modules}
    return {
        "functions": {f"{m}.{n}": signature(getattr(named[m], n)) for m, names in FUNCTIONS.items() for n in names},
        "models": {f"{m}.{n}": fields(getattr(named[m], n)) for m, names in MODELS.items() for n in names},
        "dataclasses": {
            f"{m}.{n}": [name for name, _, _ in signature(getattr(named[m], n))]
            for m, names in DATACLASSES.items()
            for n in names
        },
        "enums": {
            f"{m}.{n}": {e.name: [e.value, getattr(e, "to_numeric", lambda: None)()] for e in getattr(named[m], n)}
            for m, names in ENUMS.items()
            for n in names
        },
        "exceptions": {
            n: {
                "parents": [c.__name__ for c in getattr(modules["exceptions"], n).__mro__[1:]],
                "signature": signature(getattr(modules["exceptions"], n).__init__),
            }
            for n in EXCEPTIONS
        },
        "deployment_properties": sorted(n for n, v in vars(package.Deployment).items() if isinstance(v, property)),
    }


def main() -> None:
    import ray
    from ray import serve
    from ray.serve import config, context, exceptions, schema

    library = Library(serve, config, schema, exceptions)
    outcomes = {}
    for case, (_, phrase) in CASES.items():
        outcomes[case], text = outcome(case, library)
        assert phrase is None or phrase in text, (case, phrase, text)
    modules = {"config": config, "schema": schema, "context": context, "exceptions": exceptions}
    record = {"ray": ray.__version__, **surface(serve, modules), "public": serve.__all__, "cases": outcomes}
    print("{" + ",\n".join(f'"{section}": {lines(content)}' for section, content in record.items()) + "}")


def lines(content: Any) -> str:
    """JSON with one line for each entry of a section."""
    if not isinstance(content, dict):
        return json.dumps(content)
    return "{" + ",".join(f"\n {json.dumps(key)}: {json.dumps(content[key])}" for key in sorted(content)) + "}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
