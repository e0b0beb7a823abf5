"""A composed application: a FastAPI ingress streams what one deployment writes and has another one judge it.

    $ cd examples && rayserve-fast run story:app
    $ curl -N 'http://127.0.0.1:8000/story?words=30'       # word by word
    $ curl 'http://127.0.0.1:8000/review?words=30'         # written, then judged

The writer is a Markov chain that has read Python's own reference: it knows no more than which word may follow which
two. A client that hangs up stops it in the middle of its sentence.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from pydoc_data.topics import topics

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from rayserve_fast import serve
from rayserve_fast.handle import DeploymentHandle

api = FastAPI(title="Stories")


@serve.deployment(ray_actor_options={"num_cpus": 0.5})
class Writer:
    def __init__(self, pace_s: float = 0.02) -> None:
        self.pace_s = pace_s
        self.followers: dict[tuple[str, str], list[str]] = defaultdict(list)
        words = " ".join(topics.values()).split()
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            self.followers[first, second].append(third)
        self.beginnings = [pair for pair in self.followers if pair[0][0].isupper()]

    async def words(self, count: int) -> AsyncIterator[str]:
        pair = random.choice(self.beginnings)
        for _ in range(count):
            yield pair[0]
            await asyncio.sleep(self.pace_s)
            pair = pair[1], random.choice(self.followers.get(pair) or ["..."])

    async def text(self, count: int) -> str:
        return " ".join([word async for word in self.words(count)])


@serve.deployment(ray_actor_options={"num_cpus": 0.5})
class Critic:
    def __call__(self, text: str) -> dict[str, object]:  # not async: runs on a thread
        words = text.split()
        return {"text": text, "words": len(words), "variety": round(len(set(words)) / len(words), 2)}


@serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(api)
class Stories:
    def __init__(self, writer: DeploymentHandle, critic: DeploymentHandle) -> None:
        self.writer, self.critic = writer, critic

    @api.get("/story")
    async def story(self, words: int = 20) -> StreamingResponse:
        stream = self.writer.options(stream=True).words.remote(words)
        return StreamingResponse((f"{word} " async for word in stream), media_type="text/plain")

    @api.get("/review")
    async def review(self, words: int = 20) -> dict[str, object]:
        return await self.critic.remote(self.writer.text.remote(words))  # the text goes from writer to critic


app = Stories.bind(Writer.bind(), Critic.bind())
