"""The threads that run sync handlers.

Each pulls jobs from the worker's native queue, runs them in a context of their own, and gives the results back, which
puts them straight on the wire: no hop through the event loop. The worker says when a thread is needed
(``worker/pool.rs``).

User code is called from this file's Python frames and never from Rust, and the threads are daemons: one that user code
blocks does not keep the process, and may be killed at any time. The others wait in Rust and are sent home by an exit
hook.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context
from typing import Any, Protocol

from rayserve_fast.replica.loop import EXIT_PATIENCE_S, at_exit


class Jobs(Protocol):
    """Where jobs come from: a `_core.Worker`, or its like in local testing mode."""

    def take(self) -> tuple[Any, Any, Any] | None:
        """Waits for one: callable, argument, and what to give back with the outcome; None ends the thread."""

    def done(self, head: Any, result: Any, context: Context) -> None: ...
    def fail(self, head: Any, error: BaseException) -> None: ...
    def stop_pool(self) -> None: ...


class SyncPool:
    """The pool of one worker, which must be set before the first thread is asked for.

    Args:
        name: of its threads.
        loop: where `anyio.from_thread` leads from them.
    """

    worker: Jobs

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._names = (f"{name}-{number}" for number in itertools.count())
        self._threads: list[threading.Thread] = []

    def spawn(self) -> None:
        """Start one more thread."""
        if not self._threads:
            at_exit(self.stop)
        thread = threading.Thread(target=self._run, name=next(self._names), daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """Send the threads home, and wait for those that user code does not block."""
        threads, self._threads = self._threads, []
        worker = vars(self).pop("worker", None)  # which holds this pool: the cycle would be invisible to the collector
        if worker is not None:
            worker.stop_pool()
        deadline = time.monotonic() + EXIT_PATIENCE_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        with _claimed(self._loop):
            self._work()

    def _work(self) -> None:
        take, done, fail = self.worker.take, self.worker.done, self.worker.fail
        while (job := take()) is not None:
            call, argument, head = job
            context = copy_context()
            try:
                result = context.run(call, argument)
            except BaseException as error:
                fail(head, error)
            else:
                done(head, result, context)
            # Nothing of this request may live on while the thread waits for the next.
            call = argument = head = context = job = result = None  # type: ignore[assignment]


def _claimed(loop: asyncio.AbstractEventLoop) -> AbstractContextManager[object]:
    """This thread is one of anyio's meanwhile, as those that run sync handlers in Ray Serve are.

    anyio has no public way to say so; a version that has another than 4.x is done without.
    """
    try:
        from anyio._core._eventloop import claim_worker_thread, get_async_backend

        return claim_worker_thread(get_async_backend("asyncio"), loop)
    except (ImportError, TypeError):
        return nullcontext()
