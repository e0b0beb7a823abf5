"""A Ray actor that belongs to this process: made when it is first asked for, on this node, gone with the process.

For what only an actor can do in Ray's world: own the value behind an ObjectRef that does not exist yet.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayserve_fast.exceptions import RayServeException

#: Of an actor: calls that may be open at once.
OPEN = 100_000


class OwnActor:
    """At most one actor of a class; another Ray, after `ray.shutdown` and `ray.init`, gets another.

    Args:
        kind: an async class, whose constructor takes `args`.
    """

    def __init__(self, kind: type, *args: Any) -> None:
        self._kind = kind
        self._args = args
        self._actor: tuple[tuple[str, str], Any] | None = None  # with what names this process in its Ray
        self._lock = threading.Lock()

    def actor(self) -> Any:
        """The handle of the actor, which may still be starting.

        Raises:
            RayServeException: this process is not connected to Ray.
        """
        here = _here()
        with self._lock:
            if self._actor is None or self._actor[0] != here:
                made = ray.remote(self._kind).options(
                    num_cpus=0,
                    max_concurrency=OPEN,
                    max_restarts=-1,
                    enable_task_events=False,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(here[0], soft=True),
                )
                self._actor = here, made.remote(*self._args)
            return self._actor[1]

    def end(self) -> None:
        """Kill the actor, if there is one in this Ray; the next question makes a new one."""
        with self._lock:
            ended, self._actor = self._actor, None
            if ended is not None and ended[0] == _here():
                ray.kill(ended[1])


def _here() -> tuple[str, str]:
    """This node and this process in the Ray of now: a cluster's first driver has the same id in each of them."""
    if not ray.is_initialized():  # the question would start one
        raise RayServeException("This process is not connected to Ray.")
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_worker_id()
