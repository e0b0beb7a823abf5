"""What has no effect yet, or not all, is named when it is deployed."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rayserve_fast import RunTarget, serve
from rayserve_fast.application import build_target
from rayserve_fast.inactive import DEPLOYMENT_OPTIONS
from rayserve_fast.options import DeploymentOptions


@serve.deployment
class Model:
    pass


def test_options_without_an_effect_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {
        "autoscaling_config": {"min_replicas": 2, "max_replicas": 3},
        "health_check_period_s": 1,
        "max_surge_percent": 10,
        "max_ongoing_requests": 7,
    }
    target = RunTarget(
        Model.options(**given).bind(), logging_config={"log_level": "DEBUG"}, external_scaler_enabled=True
    )
    with caplog.at_level(logging.WARNING, "ray.serve"):
        spec = build_target(target)
    assert spec.deployments[0].config.num_replicas == 2
    named = [record.getMessage().split(" has no effect")[0] for record in caplog.records]
    assert named == [
        "application 'default': option 'external_scaler_enabled'",
        "application 'default': option 'logging_config'",
        "deployment 'Model': option 'autoscaling_config'",
        "deployment 'Model': option 'health_check_period_s'",
        "deployment 'Model': option 'max_surge_percent'",
    ]


def test_every_option_acts_or_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """None is silently ignored: the table of those without an effect and the list of those with one are complete."""
    acting = {
        "backpressure_config",
        "batch_wait_timeout_s",
        "graceful_shutdown_timeout_s",
        "max_batch_size",
        "max_concurrent_batches",
        "max_constructor_retry_count",
        "max_ongoing_requests",
        "max_queued_requests",
        "num_replicas",
        "ray_actor_options",
        "request_router_config",
        "retry_idempotent",
        "rolling_update_percentage",
        "user_config",
    }
    assert acting | set(DEPLOYMENT_OPTIONS) == set(DeploymentOptions.model_fields)
    assert not acting & set(DEPLOYMENT_OPTIONS)


def test_methods_that_are_not_called_as_in_ray_serve_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled:
        def check_health(self) -> None:
            pass

        def record_autoscaling_stats(self) -> dict[str, float]:
            return {}

    with caplog.at_level(logging.WARNING, "ray.serve"):
        build_target(RunTarget(serve.deployment(Scaled).bind()))
        build_target(RunTarget(Model.bind()))
    assert [record.getMessage() for record in caplog.records] == [
        "deployment 'Scaled': in this version, method 'check_health' is called once, when a replica starts; later only"
        " its death is noticed.",
        "deployment 'Scaled': in this version, method 'record_autoscaling_stats' is not called, as nothing scales.",
    ]
