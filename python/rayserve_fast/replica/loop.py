"""The thread on which a replica runs the user's event loop.

The loop never ends before it is told to: a handler that raises ``SystemExit`` or ``KeyboardInterrupt`` makes uvloop
leave ``run_forever``, and the thread goes back in, so that only its own request fails. The thread is a daemon, because
user code may block it for ever and must not keep the process; but a daemon that wakes up while the interpreter is torn
down is killed through the Rust frames below it, so an exit hook ends the loop first, and if need be interrupts the
user's code.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import uvloop

logger = logging.getLogger("ray.serve")

EXIT_PATIENCE_S = (
    1.0  # for user code that blocks the loop when the interpreter exits; twice, the second time interrupted
)


class UserLoop:
    """An event loop with a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = uvloop.new_event_loop()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        at_exit(self._exit)

    def run(self, function: Callable[..., Any], *args: Any, in_thread: bool = False) -> Any:
        """Call `function` on the loop's thread, await what it returns if need be, and return the outcome.

        Args:
            function: sync or async.
            args: its arguments.
            in_thread: a sync function may block: call it on another thread; what it returns is awaited here.
        """
        return asyncio.run_coroutine_threadsafe(_call(function, args, in_thread), self.loop).result()

    def call(self, function: Callable[[], Any]) -> None:
        """Call `function` on the loop's thread: now, if this is it."""
        if threading.current_thread() is self._thread:
            function()
        else:
            self.loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Cancel what runs, close the loop and wait for the thread, unless this is it or user code blocks it."""
        if self._stopping or not self._thread.is_alive():
            return
        self._stopping = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(EXIT_PATIENCE_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._stopping:
            try:
                self.loop.run_forever()
            except BaseException as error:  # of a handler, whose request has failed with it
                logger.warning("User code raised %r out of the event loop, which goes on.", error)
        while True:
            try:
                self._close()
                return
            except (SystemExit, KeyboardInterrupt):
                continue  # of a task that was cancelled; the others are still to be

    def _close(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=EXIT_PATIENCE_S))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def _exit(self) -> None:
        self.stop()
        if self._thread.is_alive() and self._thread.ident is not None:
            interrupt(self._thread.ident)
            self._thread.join(EXIT_PATIENCE_S)


def at_exit(hook: Callable[[], None]) -> None:
    """Call a method, if its object lives, when the interpreter begins to exit; `atexit` is after threads ended."""
    method = weakref.WeakMethod(hook)

    def call() -> None:
        alive = method()
        if alive is not None:
            alive()

    with contextlib.suppress(RuntimeError):  # it exits already
        threading._register_atexit(call)  # type: ignore[attr-defined]  # what concurrent.futures uses


def interrupt(thread: int) -> None:
    """Raise ``SystemExit`` in a thread as soon as it executes Python code."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))


async def _call(function: Callable[..., Any], args: tuple[Any, ...], in_thread: bool) -> Any:
    if in_thread and not inspect.iscoroutinefunction(function):
        result = await asyncio.to_thread(function, *args)
    else:
        result = function(*args)
    return await result if inspect.isawaitable(result) else result
