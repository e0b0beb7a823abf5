"""The measured compositions: deployments that call each other, written once against Ray Serve's API.

`applications(serve)` takes the module that provides the API, as in `apps.py`, and what travels is local for the same
reason. What concerns calls alone is measured where they are made: an ingress `Caller` keeps so many calls going for so
many seconds, and answers with the time that each took. HTTP has no part in those figures but for the one request that
starts the loop. In the title of a replica's process stands its deployment, so the bench can tell callers from callees.

Left out: options of handles but `stream`. Each framework calls as it does by default in its mode; only arrays are also
sent by Ray's references, which that mode may prefer for them.
"""

from __future__ import annotations

from typing import Any

from bench.apps import CHUNKS

ITEMS = 1_000  # of one streaming call
LINKS = 5  # deployments in the chain, the caller not among them
EVENT = "data: a token of it\n\n"
TEXT_LENGTH = 10_000
NUMBERS = 131_072  # float64: 1 MiB


def applications(serve: Any) -> dict[str, Any]:
    """Every application by its name in `works.py`, bound and ready for `serve.run`."""
    import asyncio
    import time
    from array import array

    import numpy
    from fastapi import FastAPI
    from starlette.responses import Response, StreamingResponse

    roomy = serve.deployment(max_ongoing_requests=100)
    item_count, chunks, event, text, numbers = ITEMS, CHUNKS, EVENT, "t" * TEXT_LENGTH, NUMBERS
    clock = time.perf_counter

    @roomy
    class Callee:
        async def __call__(self, value):
            return value

        async def length(self, text):
            return len(text)

        async def items(self, count):
            for number in range(count):
                yield number

        async def events(self, count):
            for _ in range(count):
                yield event

    @roomy
    class Link:
        def __init__(self, behind):
            self.behind = behind

        async def __call__(self, value):
            return await self.behind.remote(value) if self.behind else value

    @roomy
    class Caller:
        """`/?what=...` makes one call and tells its answer; with `callers` and `seconds` it measures many."""

        def __init__(self, callee):
            self.callee = callee
            self.items = callee.options(method_name="items", stream=True)
            self.values = {"empty": b"", "array": numpy.arange(numbers, dtype="float64")}
            self.referring = callee.options(_by_reference=True)

        async def __call__(self, request):
            wish = request.query_params
            callee = self.referring if "by_reference" in wish else self.callee
            value, seconds = self.values.get(wish["what"]), float(wish.get("seconds", 0))
            if not seconds:
                return await self.answer(callee, value)
            times, began = array("d", [0.0]), clock()
            loop = self.stream if value is None else self.call
            await asyncio.gather(*(loop(callee, value, times, began + seconds) for _ in range(int(wish["callers"]))))
            times[0] = clock() - began
            return Response(times.tobytes())

        async def answer(self, callee, value):
            if value is None:
                return str([item async for item in self.items.remote(item_count)] == list(range(item_count)))
            answer = await callee.remote(value)
            return str(type(answer) is type(value) and bytes(answer) == bytes(value))

        async def call(self, callee, value, times, until):
            last = clock()
            while last < until:
                await callee.remote(value)
                now = clock()
                times.append(now - last)
                last = now

        async def stream(self, callee, _, times, until):
            last = clock()
            while last < until:
                async for _ in self.items.remote(item_count):
                    now = clock()
                    times.append(now - last)
                    last = now

    @roomy
    class Events:
        def __init__(self, callee):
            self.events = callee.options(method_name="events", stream=True)

        async def __call__(self, request):
            async def relayed():
                async for piece in self.events.remote(chunks):
                    yield piece

            return StreamingResponse(relayed(), media_type="text/event-stream")

    app = FastAPI()

    @roomy
    @serve.ingress(app)
    class Route:
        def __init__(self, callee):
            self.callee = callee

        @app.get("/length")
        async def length(self):
            return {"length": await self.callee.length.remote(text)}

    chain = None
    for number in range(LINKS, 0, -1):
        chain = Link.options(name=f"Link{number}").bind(chain)
    return {
        "calls": Caller.bind(Callee.bind()),
        "driven": Callee.bind(),
        "chain": Caller.bind(chain),
        "fastapi_call": Route.bind(Callee.bind()),
        "events": Events.bind(Callee.bind()),
    }
