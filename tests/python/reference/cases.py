"""What a user may write, run against Ray Serve once (`record.py`) and against this project in every test run.

Each case is an expression over `serve` and the modules beside it, so that the same text runs on both sides, and the
phrase that its error must contain; clients match those. A value is reduced to what JSON can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass
class Library:
    """One of the two sides."""

    serve: ModuleType
    config: ModuleType
    schema: ModuleType
    exceptions: ModuleType


class Service:
    """A class to deploy."""


def function() -> None:
    """A function to deploy."""


CASES: dict[str, tuple[str, str | None]] = {
    # the decorator
    "bare": ("d(Service)", None),
    "bare function": ("d(function)", None),
    "with options": ("d(num_replicas=2, max_ongoing_requests=9)(Service)", None),
    "name": ("d(name='other')(Service)", None),
    "str": ("str(d(Service))", None),
    "num_replicas none": ("d(num_replicas=None)(Service)", None),
    "num_replicas as text": ("d(num_replicas='3')(Service)", None),
    "auto": ("d(num_replicas='auto')(Service)", None),
    "auto with bounds": ("d(num_replicas='auto', autoscaling_config={'max_replicas': 7})(Service)", None),
    "auto with a config object": (
        "d(num_replicas='auto', autoscaling_config=config.AutoscalingConfig(min_replicas=2, max_replicas=3))(Service)",
        None,
    ),
    "actor options": ("d(ray_actor_options={'num_gpus': 0.5, 'resources': {'a': 1}})(Service)", None),
    "user config": ("d(user_config={'a': [1, None]})(Service)", None),
    "backpressure": ("d(max_queued_requests=3, backpressure_config={'status_code': 429})(Service)", None),
    "logging dict": ("d(logging_config={'log_level': 'DEBUG'})(Service)", None),
    "logging object": ("d(logging_config=schema.LoggingConfig(encoding='JSON'))(Service)", None),
    "name is no text": ("d(name=3)(Service)", "name must be a string"),
    "name with #": ("d(name='a#b')(Service)", "must not contain the '#' character"),
    "version": ("d(version='1')(Service)", "`version` in `@serve.deployment` has been removed"),
    "unknown option": ("d(replicas=3)(Service)", "unexpected keyword argument"),
    "num_replicas zero": ("d(num_replicas=0)(Service)", "num_replicas is expected to larger than 0"),
    "num_replicas negative": ("d(num_replicas=-1)(Service)", "greater than or equal to 0"),
    "num_replicas text": ("d(num_replicas='many')(Service)", "valid integer"),
    "num_replicas and autoscaling": (
        "d(num_replicas=2, autoscaling_config={})(Service)",
        "Manually setting num_replicas is not allowed when autoscaling_config is provided.",
    ),
    "max_ongoing_requests none": ("d(max_ongoing_requests=None)(Service)", "`max_ongoing_requests` must be non-null"),
    "max_ongoing_requests zero": ("d(max_ongoing_requests=0)(Service)", "greater than 0"),
    "max_queued_requests zero": (
        "d(max_queued_requests=0)(Service)",
        "max_queued_requests must be -1 (no limit) or a positive integer.",
    ),
    "max_queued_requests none": ("d(max_queued_requests=None)(Service)", "valid integer"),
    "actor options are no dict": ("d(ray_actor_options=3)(Service)", "ray_actor_options"),
    "actor options none": ("d(ray_actor_options=None)(Service)", None),
    "actor option unknown": (
        "d(ray_actor_options={'max_restarts': 1})(Service)",
        "Specifying 'max_restarts' in ray_actor_options is not allowed.",
    ),
    "actor option negative": ("d(ray_actor_options={'num_cpus': -1})(Service)", "num_cpus"),
    "actor option of wrong type": ("d(ray_actor_options={'resources': 3})(Service)", "resources"),
    "user config that is no JSON": ("d(user_config={1, 2})(Service)", "user_config is not JSON-serializable"),
    "backpressure status": ("d(backpressure_config={'status_code': 500})(Service)", "503"),
    "backpressure typo": ("d(backpressure_config={'retry_after': 1})(Service)", "retry_after"),
    "backpressure infinite": ("d(backpressure_config={'retry_after_s': float('inf')})(Service)", "retry_after_s"),
    "backpressure none": ("d(backpressure_config=None)(Service)", "backpressure_config"),
    "logging of wrong type": ("d(logging_config=3)(Service)", "logging_config"),
    "logging level": ("d(logging_config={'log_level': 'LOUD'})(Service)", "log_level"),
    "logging typo": ("d(logging_config={'level': 'INFO'})(Service)", "level"),
    "graceful negative": ("d(graceful_shutdown_timeout_s=-1)(Service)", "graceful_shutdown_timeout_s"),
    "graceful zero": ("d(graceful_shutdown_timeout_s=0, graceful_shutdown_wait_loop_s=0)(Service)", None),
    "health period zero": ("d(health_check_period_s=0)(Service)", "health_check_period_s"),
    "health timeout zero": ("d(health_check_timeout_s=0)(Service)", "health_check_timeout_s"),
    "constructor retries zero": ("d(max_constructor_retry_count=0)(Service)", "max_constructor_retry_count"),
    "rolling update zero": ("d(rolling_update_percentage=0)(Service)", "rolling_update_percentage"),
    "rolling update all": ("d(rolling_update_percentage=1)(Service)", None),
    "surge beyond": ("d(max_surge_percent=101)(Service)", "max_surge_percent"),
    "autoscaling none": ("d(autoscaling_config=None)(Service)", None),
    "autoscaling bounds": ("d(autoscaling_config={'min_replicas': 3, 'max_replicas': 2})(Service)", "max_replicas (2)"),
    "autoscaling initial": (
        "d(autoscaling_config={'initial_replicas': 3, 'max_replicas': 2})(Service)",
        "initial_replicas (3)",
    ),
    "autoscaling of wrong type": ("d(autoscaling_config=3)(Service)", "autoscaling_config"),
    "per node": ("d(max_replicas_per_node=1)(Service)", None),
    "per node text": ("d(max_replicas_per_node='1')(Service)", "max_replicas_per_node"),
    "per node beyond": ("d(max_replicas_per_node=101)(Service)", "Invalid max_replicas_per_node 101."),
    "strategy without bundles": (
        "d(placement_group_strategy='PACK')(Service)",
        "`placement_group_bundles` must also be provided.",
    ),
    "selector without bundles": (
        "d(placement_group_bundle_label_selector=[{'a': 'b'}])(Service)",
        "`placement_group_bundles` must also be provided.",
    ),
    "bundles": (
        "d(placement_group_bundles=[{'CPU': 1}, {'CPU': 2}], placement_group_strategy='SPREAD')(Service)",
        None,
    ),
    "bundles and one selector": (
        "d(placement_group_bundles=[{'CPU': 1}] * 3, placement_group_bundle_label_selector=[{'a': 'b'}])(Service)",
        None,
    ),
    "bundles and other selectors": (
        "d(placement_group_bundles=[{'CPU': 1}] * 3, placement_group_bundle_label_selector=[{'a': 'b'}] * 2)(Service)",
        "length",
    ),
    "bundles and per node": (
        "d(placement_group_bundles=[{'CPU': 1}], max_replicas_per_node=1)(Service)",
        "Setting max_replicas_per_node is not allowed when placement_group_bundles is provided.",
    ),
    "bundles too small": ("d(placement_group_bundles=[{'CPU': 0.5}])(Service)", "the first bundle"),
    "bundles without the GPU": (
        "d(placement_group_bundles=[{'CPU': 1}], ray_actor_options={'num_gpus': 1})(Service)",
        "the first bundle",
    ),
    "bundles are no list": ("d(placement_group_bundles={'CPU': 1})(Service)", "list"),
    "bundles with a wrong strategy": (
        "d(placement_group_bundles=[{'CPU': 1}], placement_group_strategy='HEAP')(Service)",
        "HEAP",
    ),
    "gang": ("d(num_replicas=4, gang_scheduling_config={'gang_size': 2})(Service)", None),
    "gang that does not divide": (
        "d(num_replicas=3, gang_scheduling_config={'gang_size': 2})(Service).options()",
        "must be a multiple of gang_size (2)",
    ),
    "gang and per node": (
        "d(gang_scheduling_config={'gang_size': 1}, max_replicas_per_node=1)(Service)",
        "Setting max_replicas_per_node is not allowed when gang_scheduling_config is provided.",
    ),
    "gang and strategy": (
        "d(gang_scheduling_config={'gang_size': 1}, placement_group_strategy='PACK')(Service)",
        "Setting placement_group_strategy is not allowed when gang_scheduling_config is provided.",
    ),
    "gang with a policy to come": (
        "d(gang_scheduling_config={'gang_size': 1, 'runtime_failure_policy': 'RESTART_REPLICA'})(Service)",
        "RESTART_REPLICA",
    ),
    "actors with one name": (
        "d(deployment_actors=[{'name': 'a', 'actor_class': 'm:C'}] * 2)(Service)",
        "deployment_actors must have unique names.",
    ),
    "router that is none": ("d(request_router_config={'request_router_class': 'no.such'})(Service)", "No module named"),
    "router arguments": (
        "d(request_router_config={'request_router_kwargs': {'a': {1}}})(Service)",
        "request_router_kwargs",
    ),
    "decorating a number": ("d(num_replicas=1)(3)", None),
    # options()
    "options change": ("d(num_replicas=2, user_config=1)(Service).options(num_replicas=3, name='n')", None),
    "options keep": ("d(num_replicas=2, user_config=1)(Service).options()", None),
    "options num_replicas none": ("d(num_replicas=2)(Service).options(num_replicas=None)", None),
    "options num_replicas zero": ("d(Service).options(num_replicas=0)", "num_replicas is expected to larger than 0"),
    "options auto": ("d(num_replicas=2)(Service).options(num_replicas='auto')", None),
    "options other class": ("d(Service).options(func_or_class=function)", None),
    "options version": (
        "d(Service).options(version='1')",
        "`version` in `Deployment.options()` has been removed.",
    ),
    "options rolling update": ("d(Service).options(rolling_update_percentage=0.5)", "unexpected keyword argument"),
    "options actor": ("d(ray_actor_options={'num_gpus': 1})(Service).options(ray_actor_options={'num_cpus': 2})", None),
    "options both numbers": (
        "d(Service).options(num_replicas=2, autoscaling_config={})",
        "Manually setting num_replicas is not allowed when autoscaling_config is provided.",
    ),
    "options drop autoscaling": ("d(autoscaling_config={})(Service).options(autoscaling_config=None)", None),
    "options wrong value": ("d(Service).options(max_ongoing_requests=0)", "greater than 0"),
    "options are equal": ("d(Service).options() == d(Service)", None),
    "options are not equal": ("d(Service).options(num_replicas=2) == d(Service)", None),
    # Deployment
    "constructed": ("serve.Deployment('a', None, None)", "should not be called directly"),
    "called": ("d(Service)()", "Deployments cannot be constructed directly."),
    "bound": ("type(d(Service).bind(1, a=2)).__name__", None),
    "function bound with arguments": ("d(function).bind(1)", "init_args not supported for function deployments."),
    "function bound with keywords": ("d(function).bind(a=1)", "init_kwargs not supported for function deployments."),
    # options of the instance
    "http": ("config.HTTPOptions()", None),
    "http from text": ("config.HTTPOptions(port='81', request_timeout_s='2.5').port", None),
    "http key alone": ("config.HTTPOptions(ssl_keyfile='k', ssl_certfile=None)", "ssl_keyfile and ssl_certfile"),
    "http certificate alone": ("config.HTTPOptions(ssl_certfile='c')", "ssl_keyfile and ssl_certfile"),
    "http both": ("config.HTTPOptions(ssl_certfile='c', ssl_keyfile='k')", None),
    "http middlewares": ("config.HTTPOptions(middlewares=[1])", "`middlewares` in HTTPOptions has been removed."),
    "http num_cpus": ("config.HTTPOptions(num_cpus=1)", "`num_cpus` in HTTPOptions has been removed."),
    "http no host": ("config.HTTPOptions(host=None).location.value", None),
    "http old location": ("config.HTTPOptions(location='NoServer').location.value", None),
    "http wrong location": ("config.HTTPOptions(location='Nowhere')", "Nowhere"),
    "http assignment": ("setattr(config.HTTPOptions(), 'port', 'x')", "port"),
    "grpc": ("config.gRPCOptions()", None),
    "controller": ("config.ControllerOptions(runtime_env={'env_vars': {'A': '1'}})", None),
    "controller working_dir": ("config.ControllerOptions(runtime_env={'working_dir': '.'})", "working_dir"),
    "controller variable": (
        "config.ControllerOptions(runtime_env={'env_vars': {'A': 1}})",
        "env_vars['A'] must be str",
    ),
    "controller unknown": ("config.ControllerOptions(env={})", "env"),
    "tracing": ("schema.TracingConfig()", None),
    "tracing ratio": ("schema.TracingConfig(sampling_ratio=2)", "sampling_ratio must be between 0.0 and 1.0"),
    "logging": ("schema.LoggingConfig()", None),
    "logging number": ("schema.LoggingConfig(log_level=30).log_level", None),
    "logging encoding": ("schema.LoggingConfig(encoding='XML')", "encoding"),
    "logging attributes": ("schema.LoggingConfig(additional_log_standard_attrs=['nope'])", "nope"),
    "autoscaling": ("config.AutoscalingConfig().model_dump(exclude={'policy'})", None),
    "autoscaling factor": ("config.AutoscalingConfig(smoothing_factor=0.5).get_upscaling_factor()", None),
    "autoscaling function": ("config.AutoscalingConfig(aggregation_function='MAX').aggregation_function.value", None),
    "autoscaling function unknown": ("config.AutoscalingConfig(aggregation_function='sum')", "sum"),
    # exceptions
    "backpressure text": ("str(exceptions.BackPressureError(1, 2))", None),
    "backpressure fields": (
        "[exceptions.BackPressureError(1, 2, 429, 3.0).status_code, "
        "exceptions.BackPressureError(1, 2, 429, 3.0).retry_after_s]",
        None,
    ),
    "cancelled text": ("str(exceptions.RequestCancelledError('r'))", None),
    "cancelled without id": ("str(exceptions.RequestCancelledError())", None),
    "unavailable replica": ("exceptions.ReplicaUnavailableError('r').message", None),
    "grpc status": ("str(exceptions.gRPCStatusError(ValueError('x'), None, 'd'))", None),
    "replica context outside": ("serve.get_replica_context()", "may only be called from within a Ray Serve deployment"),
}

_SHOWN = (
    "name",
    "version",
    "num_replicas",
    "user_config",
    "max_ongoing_requests",
    "max_queued_requests",
    "backpressure_config",
    "ray_actor_options",
    "init_args",
    "init_kwargs",
    "logging_config",
)


def outcome(case: str, library: Library) -> tuple[dict[str, Any], str]:
    """What the case gives, as JSON, and the text of its error."""
    names = {**vars(library), "d": library.serve.deployment, "Service": Service, "function": function}
    try:
        value = eval(CASES[case][0], names)
    except Exception as error:
        builtin = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
        own = [c.__name__ for c in type(error).__mro__ if c.__name__ == "RayServeException"]
        return {"raises": own or builtin}, str(error)
    return {"value": plain(value)}, ""


def plain(value: Any) -> Any:
    """`value` as JSON holds it."""
    if type(value).__name__ == "Deployment":
        return {name: plain(getattr(value, name)) for name in _SHOWN}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return value.value if hasattr(value, "value") else value
