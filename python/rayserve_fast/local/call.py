"""One handle call in local testing mode: what `_core.Call` and `_core.CallHead` are on a cluster, on either side.

Arguments and results cross as the bytes that would have travelled, so both sides get copies, and what cannot be
pickled fails here as it would there. A call ends once: whoever finishes it later is not heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayserve_fast.context import _RequestContext

if TYPE_CHECKING:
    from rayserve_fast.local.replica import LocalReplica
    from rayserve_fast.values import Buffer


@dataclass(slots=True)
class LocalHead(_RequestContext):
    """The call as the replica sees it, and the context of the request for what it runs."""

    method: str = "__call__"
    pickle: bytes = field(default=b"", repr=False)
    buffers: Sequence[Buffer] = field(default=(), repr=False)
    streaming: bool = False

    def put_item(self, pickle: bytes, buffers: Sequence[Buffer]) -> Awaitable[None] | None:
        """Not called: streaming calls are not built in this mode yet."""
        raise NotImplementedError

    def arguments(self) -> tuple[bytes, Sequence[Buffer]]:
        """The pickle of the pair of arguments, and its buffers, which are the callee's own."""
        return self.pickle, self.buffers


class LocalCall:
    """A call, begun by `Applications.begin`.

    Args:
        key: the deployment, `app#name`.
        head: what is called.
    """

    def __init__(self, key: str, head: LocalHead) -> None:
        self.key = key
        self.head = head
        self.replica: LocalReplica | None = None  # where it runs or waits
        self.task: asyncio.Task[Any] | None = None  # on the loop of that replica
        self._outcome: Future[tuple[Any, ...]] = Future()

    def finish(self, *outcome: Any) -> bool:
        """End the call with a word and what belongs to it, see `DeploymentResponse`. False: it had ended."""
        try:
            self._outcome.set_result(outcome)
        except InvalidStateError:
            return False
        return True

    def done(self) -> bool:
        """Whether it has ended."""
        return self._outcome.done()

    def wait(self, timeout_s: float | None, main: bool) -> bool:
        """Whether it ends within `timeout_s`; Python's own waits hear of signals on any thread."""
        return bool(wait([self._outcome], timeout_s).done)

    async def ended(self) -> None:
        """Return when it has ended; a cancelled wait leaves it alone."""
        await asyncio.wait([asyncio.wrap_future(self._outcome)])

    def cancel(self) -> bool:
        """End it here and tell the replica; False: it had ended."""
        if not self.finish("cancelled"):
            return False
        if self.replica is not None:
            self.replica.cancel(self)
        return True

    ready = done

    def items(self) -> list[Any]:
        """None: streaming calls are not built in this mode yet."""
        return []

    def outcome(self) -> tuple[Any, ...]:
        """What became of it."""
        return self._outcome.result()
