"""The configuration classes beyond what the record of Ray Serve tells: warnings, environment, pluggable classes."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from rayserve_fast import deployment
from rayserve_fast._core import Proxy
from rayserve_fast.api import _cluster_options
from rayserve_fast.autoscaling import DEFAULT_POLICY
from rayserve_fast.config import (
    DEFAULT_ROUTER,
    AutoscalingConfig,
    AutoscalingPolicy,
    DeploymentActorConfig,
    HTTPOptions,
    ProxyLocation,
    RequestRouterConfig,
    gRPCOptions,
)
from rayserve_fast.importing import import_attr
from rayserve_fast.request_router import RequestRouter
from rayserve_fast.schema import LoggingConfig, TracingConfig


def policy(context: Any) -> Any:
    """An autoscaling policy of the user's."""


class Router(RequestRouter):
    """A request router of the user's."""

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        return [candidate_replicas]


class Undecided(RequestRouter):
    """One that does not choose."""


def __getattr__(name: str) -> Any:
    """What a module does that checks its settings when it is imported, or asked for a class."""
    if name == "Unset":
        HTTPOptions(port=-1)
    raise AttributeError(name)


def test_defaults_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HTTPOptions()
        AutoscalingConfig()
        AutoscalingConfig.default()


@pytest.mark.parametrize(
    ("options", "category", "text"),
    [
        ({"location": "HeadOnly"}, DeprecationWarning, "`location` in HTTPOptions is deprecated"),
        ({"prot": 80, "hots": ""}, UserWarning, r"does not know \['hots', 'prot'\]"),
    ],
)
def test_http_options_that_warn(options: dict[str, Any], category: type[Warning], text: str) -> None:
    with pytest.warns(category, match=text):
        HTTPOptions(**options)


def test_the_environment_changes_the_default_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_DEFAULT_HTTP_HOST", "0.0.0.0")
    assert HTTPOptions().host == "0.0.0.0"
    assert HTTPOptions(host="10.0.0.1").host == "10.0.0.1"


def test_http_options_are_checked_when_assigned() -> None:
    options = HTTPOptions()
    options.port = 81
    with pytest.raises(ValidationError):
        options.port = "none"  # type: ignore[assignment]
    assert options.port == 81


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_head_bytes": 1023}, "greater than or equal to 1024"),
        ({"max_body_bytes": 0}, "greater than 0"),
        ({"shards": 0}, "greater than 0"),
        ({"shards": 257}, "less than or equal to 256"),
        ({"port": -1}, "greater than or equal to 0"),
        ({"port": 65536}, "less than or equal to 65535"),
        ({"keep_alive_timeout_s": -1}, "greater than or equal to 0"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s must be a number of seconds"),
        ({"host": "\ud800"}, "host"),
        ({"root_path": "/\ud800"}, "root_path"),
    ],
)
def test_what_a_proxy_could_not_start_with_is_refused_before(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        HTTPOptions(**options)


def test_limits_beyond_what_a_proxy_counts_are_none() -> None:
    options = _cluster_options(
        None,
        {
            "request_timeout_s": float("inf"),
            "keep_alive_timeout_s": 2**64,
            "max_head_bytes": sys.maxsize,
            "max_body_bytes": 2**64,
        },
    )
    config = {k: v for k, v in asdict(options).items() if k not in ("proxy_location", "placement_notice_s")}
    rest = {"shards": 1, "node_id": "n", "token": "00", "snapshot_path": None, "session_header": "s"}
    Proxy(json.dumps({**config, **rest, "prefer_local_node": True, "forwarded_allow_ips": ""}).encode())
    assert (options.request_timeout_s, options.max_body_bytes) == (None, None)


@pytest.mark.parametrize("given", [{"port": 65536}, {"port": -1}, {"keep_alive_timeout_s": -1}])
def test_a_port_or_a_time_that_is_none_is_refused_by_name(given: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        HTTPOptions(**given)


def test_no_time_to_keep_connections_open_is_an_option() -> None:
    assert HTTPOptions(keep_alive_timeout_s=0).keep_alive_timeout_s == 0


@pytest.mark.parametrize("location", ["Disabled", "HeadOnly", "EveryNode"])
def test_proxy_location_by_name(location: str) -> None:
    assert ProxyLocation._normalize(location) is ProxyLocation(location)
    assert ProxyLocation._normalize(None) is None
    with pytest.raises(TypeError, match="Must be a `ProxyLocation` or str"):
        ProxyLocation._normalize(3)  # type: ignore[arg-type]


def test_autoscaling_warns_of_what_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="`metrics_interval_s`"):
        AutoscalingConfig(metrics_interval_s=5)
    with pytest.warns(FutureWarning, match="`look_back_period_s`"):
        AutoscalingConfig(look_back_period_s=10)


def test_factors_fall_back_to_their_deprecated_names() -> None:
    assert AutoscalingConfig(smoothing_factor=0.5).get_downscaling_factor() == 0.5
    assert AutoscalingConfig(smoothing_factor=0.5, upscale_smoothing_factor=2).get_upscaling_factor() == 2
    assert AutoscalingConfig(upscale_smoothing_factor=2, upscaling_factor=3).get_upscaling_factor() == 3


def test_a_pluggable_class_is_shown_by_its_path() -> None:
    assert AutoscalingPolicy(policy_function=policy).policy_function == f"{__name__}.policy"
    assert RequestRouterConfig(request_router_class=Router).request_router_class == f"{__name__}.Router"
    assert AutoscalingPolicy(policy_function=policy) == AutoscalingPolicy(policy_function=f"{__name__}.policy")
    assert AutoscalingPolicy().is_default_policy_function()
    assert not AutoscalingPolicy(policy_function=policy).is_default_policy_function()
    assert RequestRouterConfig().is_default_request_router()
    assert not RequestRouterConfig(request_router_class=Router).is_default_request_router()
    assert len({RequestRouterConfig(), RequestRouterConfig(request_router_class=DEFAULT_ROUTER)}) == 1


def test_a_pluggable_class_that_does_not_exist_is_told_at_once() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        AutoscalingPolicy(policy_function=f"{__name__}:nothing")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        RequestRouterConfig(request_router_class="no_such_module.Router")


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("no_such_module.Router", ModuleNotFoundError, "'no_such_module.Router' cannot be imported"),
        ("json:Router", AttributeError, "'json:Router' cannot be imported"),
        ("json", ValidationError, "'json' cannot be imported"),
        ("rayserve_fast.a:b:c", ValidationError, "'rayserve_fast.a:b:c' cannot be imported"),
        (f"{__name__}:Unset", ValidationError, "'.*:Unset' cannot be imported: 1 validation error for"),
        ("json.dumps", TypeError, "must be a class that derives from .*RequestRouter, got <function dumps"),
        (int, TypeError, "must be a class that derives from .*RequestRouter, got <class 'int'>"),
        (Undecided, TypeError, "Undecided must define `async def choose_replicas`"),
    ],
)
def test_what_is_no_router_is_refused_before_it_is_deployed(given: Any, error: type[Exception], text: str) -> None:
    for refused in (
        lambda: RequestRouterConfig(request_router_class=given),
        lambda: deployment(request_router_config={"request_router_class": given})(print),
    ):
        with pytest.raises(error, match=f"request_router_class {text}"):
            refused()


def test_arguments_of_pluggable_classes_are_json() -> None:
    with pytest.raises(ValidationError, match="policy_kwargs is not JSON-serializable"):
        AutoscalingPolicy(policy_kwargs={"a": {1}})


def test_a_deployment_actor_keeps_its_class_and_shows_its_path() -> None:
    import ray

    actor = ray.remote(Router)
    config = DeploymentActorConfig(name="a", actor_class=actor, init_args=[1])
    assert config.actor_class == f"{__name__}:Router"
    assert config.get_actor_class() is actor
    assert config.init_args == (1,)
    assert DeploymentActorConfig(name="a", actor_class=f"{__name__}:Router").get_actor_class() is Router


def test_grpc_functions_are_imported() -> None:
    assert gRPCOptions(grpc_servicer_functions=[f"{__name__}.policy"]).grpc_servicer_func_callable == [policy]
    with pytest.raises(ValueError, match="is not a callable function"):
        _ = gRPCOptions(grpc_servicer_functions=[f"{__name__}.DEFAULT_POLICY"]).grpc_servicer_func_callable
    with pytest.raises(ModuleNotFoundError):
        _ = gRPCOptions(grpc_servicer_functions=["no_such_module.add"]).grpc_servicer_func_callable


@pytest.mark.parametrize("path", ["", "module", "module:", ":attribute", "a:b:c"])
def test_an_import_path_needs_two_parts(path: str) -> None:
    with pytest.raises(ValueError, match="Got invalid import path"):
        import_attr(path)


def test_logging_defaults_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_LOG_ENCODING", "JSON")
    assert LoggingConfig().encoding == "JSON"
    assert LoggingConfig() == LoggingConfig(encoding="JSON")
    assert LoggingConfig() != LoggingConfig(encoding="TEXT")


def test_tracing_is_on_when_the_environment_names_an_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "m:f")
    monkeypatch.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "0.5")
    assert TracingConfig().model_dump() == {"enabled": True, "exporter_import_path": "m:f", "sampling_ratio": 0.5}


@pytest.mark.parametrize(
    "config",
    [AutoscalingConfig.default(), HTTPOptions(), RequestRouterConfig(), LoggingConfig(), gRPCOptions()],
    ids=lambda config: type(config).__name__,
)
def test_configurations_survive_pickling(config: Any) -> None:
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_default_policy_is_not_imported() -> None:
    assert AutoscalingPolicy(policy_function=DEFAULT_POLICY)._policy is None
