"""The measured applications, written once against Ray Serve's API.

`applications(serve)` takes the module that provides the API (`rayserve_fast` or `ray.serve`), so the source that runs
is the same for both. `asgi.py` holds what uvicorn and Granian get instead. The functions are local on purpose: they
travel to the replicas by value, and the replicas need not be able to import this package.

Left out: anything that makes a peer faster than its user would find it. The limit of 100 is the one the targets name.
"""

from __future__ import annotations

from typing import Any

ONE_MIB = 1 << 20
CHUNKS = 50
CHUNK = b"chunk of a few b"
SLEEP_S = 0.0003
STUCK_S = 1.0


def fastapi_app() -> Any:
    """The FastAPI application, the same object for every peer: a typed path, a typed query, a JSON answer."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/items/{item_id}")
    async def read_item(item_id: int, q: str = "") -> dict[str, int | str]:
        return {"item": item_id, "q": q}

    return app


def applications(serve: Any) -> dict[str, Any]:
    """Every application by its name in `works.py`, bound and ready for `serve.run`."""
    import asyncio
    import time

    from starlette.responses import StreamingResponse

    roomy = serve.deployment(max_ongoing_requests=100)
    large = b"d" * ONE_MIB
    chunks, chunk, sleep_s, stuck_s = CHUNKS, CHUNK, SLEEP_S, STUCK_S

    @roomy
    async def async_noop(request):
        return "ok"

    @serve.deployment
    async def default_limit(request):
        return "ok"

    @roomy
    def sync_noop(request):
        return "ok"

    @serve.deployment(max_ongoing_requests=64)
    def sync_sleep(request):
        time.sleep(stuck_s if request.method == "POST" else sleep_s)
        return "ok"

    @roomy
    async def json_echo(request):
        return await request.json()

    @roomy
    async def body_echo(request):
        return await request.body()

    @roomy
    async def upload(request):
        return len(await request.body())

    @roomy
    async def download(request):
        return large

    @roomy
    async def stream(request):
        async def pieces():
            for _ in range(chunks):
                yield chunk

        return StreamingResponse(pieces(), media_type="text/plain")

    @roomy
    class Batched:
        @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
        async def nothing(self, items):
            return items

        async def __call__(self, request):
            return await self.nothing(await request.json())

    @serve.deployment(max_ongoing_requests=1000)
    class BatchModel:
        """Of `batch_load.py`: 20 ms and 0.5 ms for each item."""

        @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
        async def predict(self, items):
            await asyncio.sleep(0.02 + 0.0005 * len(items))
            return items

        async def __call__(self, request):
            return await self.predict(await request.json())

    @roomy
    @serve.ingress(fastapi_app())
    class FastApi:
        pass

    deployments = [async_noop, sync_noop, json_echo, body_echo, upload, download, stream, default_limit, sync_sleep]
    return {each.name: each.bind() for each in deployments} | {
        "fastapi": FastApi.bind(),
        "batched": Batched.bind(),
        "batch_model": BatchModel.bind(),
    }
