"""What the tests of composition deploy, on real replicas and in local testing mode alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from rayserve_fast import serve
from rayserve_fast.context import _get_serve_request_context
from rayserve_fast.handle import DeploymentHandle

#: `serve.run`, on Ray or in this process: the fixture `run`.
Run = Callable[..., DeploymentHandle]


class Refused(ValueError):
    """The user's own, with a constructor that asks for more than a message."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code


@serve.deployment(max_ongoing_requests=20)
class Model:
    def __init__(self, factor: int = 2) -> None:
        self.factor = factor
        self.hangs = self.cancelled = 0
        self.config: Any = None

    def reconfigure(self, config: Any) -> None:
        self.config = config

    async def __call__(self, value: Any) -> Any:
        return value * self.factor

    def sync(self, value: Any) -> Any:
        return value * self.factor

    async def configured(self) -> Any:
        return self.config

    async def append(self, values: list[int]) -> list[int]:
        values.append(0)
        return values

    async def fail(self) -> None:
        raise Refused("on purpose", 42)

    async def hang(self) -> None:
        self.hangs += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def hanging(self) -> int:
        return self.hangs - self.cancelled

    async def cancellations(self) -> int:
        return self.cancelled

    async def lock(self) -> Any:
        return threading.Lock()

    async def items(self, n: int) -> Any:
        for i in range(n):
            yield i

    async def hidden_items(self) -> Any:
        return (item for item in [1])

    async def context(self) -> dict[str, Any]:
        request, replica = _get_serve_request_context(), serve.get_replica_context()
        seen_in_thread = await asyncio.to_thread(lambda: _get_serve_request_context().request_id)
        return {
            "request_id": request.request_id,
            "in_thread": seen_in_thread,
            "app_name": request.app_name,
            "model": request.multiplexed_model_id,
            "session": request.session_id,
            "deployment": replica.deployment,
            "application": replica.app_name,
            "self": replica.servable_object is self,
        }
