"""Declaring deployments: what the decorator and `options` keep, share and refuse beyond the recorded cases."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
from pydantic import ValidationError
from ray import cloudpickle

from rayserve_fast import Application, Deployment, serve
from rayserve_fast.config import BackpressureConfig
from rayserve_fast.controlplane.spec import Backpressure, DeploymentConfig
from rayserve_fast.exceptions import BackPressureError, gRPCStatusError


class Service:
    """A class to deploy."""


def test_the_decorator_leaves_the_class_as_it_is() -> None:
    decorated = serve.deployment(Service)
    assert isinstance(decorated, Deployment)
    assert decorated.func_or_class is Service


def test_options_of_one_deployment_do_not_change_another() -> None:
    base = serve.deployment(ray_actor_options={"num_gpus": 1})(Service)
    other = base.options(num_replicas=4, ray_actor_options={"num_cpus": 2})
    assert (base.num_replicas, base.ray_actor_options) == (1, {"num_gpus": 1, "num_cpus": 1})
    assert (other.num_replicas, other.ray_actor_options) == (4, {"num_cpus": 2})


def test_the_users_dictionary_is_left_alone() -> None:
    options: dict[str, Any] = {"num_gpus": 1}
    deployment = serve.deployment(ray_actor_options=options)(Service)
    deployment.ray_actor_options["num_gpus"] = 7
    assert options == {"num_gpus": 1}
    assert deployment.ray_actor_options == {"num_gpus": 1, "num_cpus": 1}


def test_a_runtime_env_that_is_no_dict_is_refused_before_anything_is_deployed() -> None:
    with pytest.raises(TypeError, match=r"'runtime_env' must be .*dict.*, but received type <class 'int'>"):
        serve.deployment(ray_actor_options={"runtime_env": 3})(Service)
    assert serve.deployment(ray_actor_options={"runtime_env": None})(Service).num_replicas == 1


def test_max_replicas_per_node_is_refused_in_the_words_of_ray_serve() -> None:
    with pytest.raises(ValueError, match=r"^Invalid max_replicas_per_node 0\. .* in the range of \[1, 100\]\.$"):
        serve.deployment(max_replicas_per_node=0)(Service)
    with pytest.raises(TypeError, match=r"^Get invalid type '<class 'str'>' for max_replicas_per_node"):
        serve.deployment(max_replicas_per_node="a")(Service)  # type: ignore[arg-type]


def test_options_are_checked_together_with_those_given_before() -> None:
    base = serve.deployment(max_replicas_per_node=1)(Service)
    with pytest.raises(ValueError, match="max_replicas_per_node is not allowed when placement_group_bundles"):
        base.options(placement_group_bundles=[{"CPU": 1}])
    assert base.options(placement_group_bundles=[{"CPU": 1}], max_replicas_per_node=None).num_replicas == 1


@pytest.mark.parametrize("given", [{"gang_scheduling_config": {"gang_size": 2}}, {"max_ongoing_requests": 0}])
def test_what_pydantic_refuses_is_called_by_the_reference_s_name(given: dict[str, Any]) -> None:
    for declare in (serve.deployment, serve.deployment(Service).options):
        with pytest.raises(ValidationError, match="1 validation error for DeploymentConfig"):
            declare(**given)


def test_autoscaling_outlives_a_change_of_the_number() -> None:
    """As in Ray Serve: `num_replicas` given later does not switch autoscaling off."""
    scaled = serve.deployment(autoscaling_config={"min_replicas": 2, "max_replicas": 5})(Service)
    assert scaled.options(num_replicas=4)._options.plain().num_replicas == 2
    assert scaled.options(autoscaling_config=None, num_replicas=4)._options.plain().num_replicas == 4


def test_binding_again_starts_anew() -> None:
    deployment = serve.deployment(Service)
    first, second = deployment.bind(1, a=2), deployment.bind(3)
    assert isinstance(first, Application)
    assert (first._bound_deployment.init_args, first._bound_deployment.init_kwargs) == ((1,), {"a": 2})
    assert (second._bound_deployment.init_args, second._bound_deployment.init_kwargs) == ((3,), {})


def test_logging_config_is_set_in_place() -> None:
    deployment = serve.deployment(Service)
    assert deployment.logging_config is None
    deployment.set_logging_config({"log_level": "DEBUG"})
    assert deployment.logging_config is not None
    assert deployment.logging_config["log_level"] == "DEBUG"


@pytest.mark.parametrize(
    "option",
    [
        "num_replicas",
        "max_ongoing_requests",
        "max_queued_requests",
        "max_replicas_per_node",
        "max_batch_size",
        "health_check_period_s",
        "rolling_update_percentage",
    ],
)
def test_a_bool_is_no_number(option: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{option} must be .*(got True|not <class 'bool'>)"):
        serve.deployment(**{option: True})(Service)


@pytest.mark.parametrize(
    "make",
    [
        lambda: serve.config.AutoscalingConfig(max_replicas=True),
        lambda: serve.config.BackpressureConfig(retry_after_s=False),
        lambda: serve.config.HTTPOptions(request_timeout_s=True),
        lambda: serve.BackendConfig(num_replicas=True),
    ],
)
def test_a_bool_is_no_number_in_other_options_either(make: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="must be a number"):
        make()


def test_options_that_are_no_numbers_may_be_bools() -> None:
    deployment = serve.deployment(user_config=True, retry_idempotent=False)(Service)
    assert (deployment.user_config, deployment._options.retry_idempotent) == (True, False)


@pytest.mark.parametrize("what", [3, "name", functools.partial(print), print, object(), serve.deployment(Service)])
def test_only_classes_and_functions_are_deployed(what: Any) -> None:
    with pytest.raises(TypeError, match=r"@serve.deployment must be called on a class or function."):
        serve.deployment(what)


def test_a_backpressure_object_is_kept() -> None:
    config = BackpressureConfig(status_code=429, retry_after_s=1.5)
    deployment = serve.deployment(max_queued_requests=2, backpressure_config=config)(Service)
    assert deployment.backpressure_config == config
    assert deployment._options.plain().backpressure == Backpressure(429, 1.5)


def test_the_plain_config_has_the_same_defaults() -> None:
    """Defaults stand in the dataclass too, for whoever builds one by hand: they must not drift apart."""
    plain = serve.deployment(Service)._options.plain()
    by_hand = DeploymentConfig(request_router_config=plain.request_router_config)
    assert plain == by_hand


def test_a_single_bundle_selector_counts_for_all_bundles() -> None:
    deployment = serve.deployment(
        placement_group_bundles=[{"CPU": 1}, {"CPU": 2}], placement_group_bundle_label_selector=[{"zone": "a"}]
    )(Service)
    assert deployment._options.plain().placement_group_bundle_label_selector == ({"zone": "a"}, {"zone": "a"})


def test_deployments_and_applications_travel_with_closures() -> None:
    application = serve.deployment(num_replicas=2)(Service).bind(1)
    copy = cloudpickle.loads(cloudpickle.dumps(application))
    assert copy._bound_deployment == application._bound_deployment


@pytest.mark.parametrize(
    "error", [BackPressureError(1, 2, 429, 3.0), gRPCStatusError(ValueError("x"), 5, "details")], ids=repr
)
def test_exceptions_keep_their_fields_across_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert {k: repr(v) for k, v in vars(copy).items()} == {k: repr(v) for k, v in vars(error).items()}
