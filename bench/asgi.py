"""The measured applications as bare ASGI callables, for uvicorn and Granian (`uvicorn bench.asgi:async_noop`).

They are written as fast as plain Python allows, so that these peers show their best: no framework except where the
work is the framework (`fastapi`), and for sync handlers the thread pool that every ASGI framework uses.
"""

from __future__ import annotations

import json

from bench.apps import CHUNK, CHUNKS, ONE_MIB, fastapi_app

TEXT = [(b"content-type", b"text/plain")]
JSON = [(b"content-type", b"application/json")]
LARGE = b"d" * ONE_MIB


async def answer(send, body, headers=TEXT):
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def whole_body(receive):
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def http_only(handler):
    """Answer the lifespan protocol, then leave every request to `handler`."""

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await handler(receive, send)
            return
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})

    return app


@http_only
async def async_noop(receive, send):
    await answer(send, b"ok")


@http_only
async def sync_noop(receive, send):
    from anyio.to_thread import run_sync

    await answer(send, await run_sync(lambda: b"ok"))


@http_only
async def json_echo(receive, send):
    value = json.loads(await whole_body(receive))
    await answer(send, json.dumps(value, separators=(",", ":")).encode(), JSON)


@http_only
async def body_echo(receive, send):
    await answer(send, await whole_body(receive))


@http_only
async def upload(receive, send):
    await answer(send, b"%d" % len(await whole_body(receive)), JSON)


@http_only
async def download(receive, send):
    await answer(send, LARGE)


@http_only
async def stream(receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": TEXT})
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def __getattr__(name):
    if name == "fastapi":  # built when asked for: the other applications do not import the framework
        return fastapi_app()
    raise AttributeError(name)
