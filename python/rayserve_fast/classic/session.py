"""`serve.init`, and what the functions of endpoints and backends have in common: whom they ask.

Which request the backends of this process get depends on how it came to Serve: Flask's after `serve.init`, Starlette's
after `serve.start` or `serve.connect`. That is remembered together with the controller it was said of, so that it does
not outlive `serve.shutdown`.
"""

from __future__ import annotations

from typing import Any

import ray

from rayserve_fast.classic.spelling import warn_older
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.options import NAMESPACE
from rayserve_fast.exceptions import RayServeException

#: What the handlers of a backend are given.
FLASK, STARLETTE = "flask", "starlette"

# Arguments of `init` in versions before 0.8.6. They named parts that are not there any more: only None of them acts.
_OLDER = {
    "blocking",
    "gc_window_seconds",
    "kv_store_connector",
    "kv_store_path",
    "policy_kwargs",
    "queueing_policy",
    "ray_init_kwargs",
    "start_server",
}

# The id of a controller, and the request that backends get which are made here while it runs.
_spoken: tuple[str, str] | None = None


def init(
    name: str | None = None,
    http_host: str = "127.0.0.1",
    http_port: int = 8000,
    metric_exporter: Any = None,
    **older: Any,
) -> None:
    """Start Ray and Serve if they do not run, else connect; then `create_endpoint` and `create_backend` may be called.

    Backends that this process makes from here on get a Flask-shaped request. Today's `serve.start` and `serve.run`
    start Serve too. Unlike in Ray Serve 0.8 the server listens on the loopback interface unless told otherwise.

    Args:
        name: accepted; there is one instance in a Ray cluster.
        http_host: where the HTTP server listens.
        http_port: its port.
        metric_exporter: accepted; `serve.stat` and `/-/metrics` always tell.
        older: what earlier versions took. `ray_init_kwargs` goes to `ray.init`; `start_server=False` means no HTTP;
            the others name parts that no longer exist. It always waits for the server, as with `blocking=True` then.

    Raises:
        TypeError: an argument that no version had.
        ValueError: pydantic's ValidationError, a host or port that is none.
        RuntimeError: the HTTP port is taken.
    """
    from rayserve_fast import api
    from rayserve_fast.config import HTTPOptions

    if unknown := set(older) - _OLDER:
        raise TypeError(f"serve.init() got unexpected keyword arguments {sorted(unknown)}")
    http = HTTPOptions(host=http_host, port=http_port)
    warn_older("`serve.init`", "`serve.start`")
    if older.get("ray_init_kwargs") and not ray.is_initialized():
        ray.init(**{"namespace": NAMESPACE, **older["ray_init_kwargs"]})
    location = None if older.get("start_server", True) else "Disabled"
    if not running():
        api.start(location, http)
    speak(FLASK)


def running() -> bool:
    """Whether there is a Serve to connect to."""
    return client.find() is not None


def speak(requests: str) -> None:
    """From now on this process's backends get these requests, `FLASK` or `STARLETTE`."""
    global _spoken
    _spoken = _controller_id(), requests


def requests() -> str:
    """Which requests the backends made here get."""
    return _spoken[1] if _spoken is not None and _spoken[0] == _controller_id() else STARLETTE


def require() -> Any:
    """The controller.

    Raises:
        RayServeException: Serve is not running.
    """
    try:
        return client.require()
    except client.NotRunningError:
        raise RayServeException(
            "Serve is not running, or this process is not connected to its Ray cluster."
            " Please run serve.init() first (or serve.start(), for the Client API)."
        ) from None


def ask(method: str, *args: Any) -> Any:
    """Call a method of the controller; raises what that raises, and as `require` does."""
    return client.answer(getattr(require(), method).remote(*args))


def _controller_id() -> str:
    return str(require()._actor_id.hex())
