"""The measured works of batching, splitting and the older APIs.

`applications(serve)` is written once against Ray Serve's API, as in `apps.py`. `arranged` holds what only this project
has: each entry deploys what it needs and makes it answer below `/{name}`. What travels is local, as there.

Left out: what a split or a shadow costs the targets themselves. The works compare with the same number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

LARGEST = 32  # items of a batch
WINDOW_S = 0.005  # of the no-op batches
MODEL_WINDOW_S, MODEL_S, ITEM_S = 0.010, 0.020, 0.0005  # the model that is measured at a fixed rate
FULL_S = MODEL_S + LARGEST * ITEM_S
MODEL_RATE = 0.8 * LARGEST / FULL_S  # requests per second, of what full batches can do
TURN_S = MODEL_WINDOW_S + 2 * FULL_S  # a window and two full batches: p99 at that rate must not exceed twice that
TARGETS = 5
SHARE = 0.1  # of the requests that are copied to the shadow


def applications(serve: Any) -> dict[str, Any]:
    """Every application by its name in `works.py`, bound and ready for `serve.run`."""
    import asyncio

    roomy = serve.deployment(max_ongoing_requests=100)
    largest, window_s, model_window_s, model_s, item_s = LARGEST, WINDOW_S, MODEL_WINDOW_S, MODEL_S, ITEM_S

    @roomy
    class Batch:
        @serve.batch(max_batch_size=largest, batch_wait_timeout_s=window_s)
        async def echo(self, records):
            return records

        async def __call__(self, request):
            return await self.echo(await request.json())

    @serve.deployment(max_ongoing_requests=1000)
    class Model:
        @serve.batch(max_batch_size=largest, batch_wait_timeout_s=model_window_s)
        async def predict(self, records):
            await asyncio.sleep(model_s + item_s * len(records))
            return records

        async def __call__(self, request):
            return await self.predict(await request.json())

    return {"batch": Batch.bind(), "model": Model.bind()}


def arranged(serve: Any) -> dict[str, Callable[[], None]]:
    """What deploys each work of this project alone, by the name in `works.py`."""
    roomy = serve.deployment(max_ongoing_requests=100)
    largest = LARGEST

    @roomy
    async def noop(request):
        return "ok"

    @serve.deployment(max_batch_size=largest)
    async def router_batch(requests):
        return [await request.json() for request in requests]

    @roomy
    class Callee:
        async def __call__(self, value):
            return "ok"

    @roomy
    class Caller:
        def __init__(self, callee):
            self.callee = callee

        async def __call__(self, request):
            return await self.callee.remote(1)

    def split(route: str, count: int) -> None:
        names = [f"{route}-{number}" for number in range(count)]
        serve.run_many([serve.RunTarget(noop.bind(), name=name, route_prefix=None) for name in names])
        serve.set_traffic(f"/{route}", dict.fromkeys(names, 1 / count))

    def shadow() -> None:
        split("shadow_10", 1)
        serve.run(noop.bind(), name="shadow_10-copy", route_prefix=None)
        serve.shadow_traffic("/shadow_10", "shadow_10-copy", SHARE)

    def endpoint(name: str, route: str) -> None:
        serve.create_backend(f"{name}-backend", noop.func_or_class, config={"max_concurrent_queries": 100})
        serve.create_endpoint(name, backend=f"{name}-backend", route=route)

    def graph() -> None:
        from rayserve_fast.dag import InputNode
        from rayserve_fast.drivers import DAGDriver

        with InputNode() as request:
            step = Callee.bind().__call__.bind(request)
        serve.run(DAGDriver.options(max_ongoing_requests=100).bind(step), name="dag", route_prefix="/dag")

    def run(target: Any, name: str) -> None:
        serve.run(target, name=name, route_prefix=f"/{name}")

    return {
        "plain": partial(run, noop.bind(), "plain"),
        "router_batch": partial(run, router_batch.bind(), "router_batch"),
        "split_1": partial(split, "split_1", 1),
        "split_5": partial(split, "split_5", TARGETS),
        "replicas_5": partial(run, noop.options(num_replicas=TARGETS).bind(), "replicas_5"),
        "shadow_10": shadow,
        "endpoint": partial(endpoint, "endpoint", "/endpoint"),
        "typed": partial(endpoint, "typed", "/typed/{user:int}/{number:float}"),
        "dag": graph,
        "one_call": partial(run, Caller.bind(Callee.bind()), "one_call"),
    }
