"""Sync handlers: threads, blocking, contexts, and what they may return."""

from __future__ import annotations

import contextvars
import json
import threading
from typing import Any

import anyio.from_thread
import pytest
import wire_client as wire
from deployed import wait_for
from worker_replica import serving

from rayserve_fast.replica.sync_pool import SyncPool

variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
begun, release = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def _fresh_events() -> None:
    begun.clear()
    release.clear()


def stuck_or_quick(request: Any) -> str:
    """With a query: begun, and stuck until it is released."""
    if request.query_params:
        begun.set()
        release.wait(30)
    return "done"


def test_a_blocked_handler_stops_nobody_else() -> None:
    with serving(stuck_or_quick, max_ongoing_requests=5) as replica:
        link = replica.link()
        link.request(1, query="stuck=1")
        for _ in range(50):
            assert link.get(2).body == b"done", "quick ones go past the stuck one"
        release.set()
        assert link.answer(1).body == b"done"


def test_requests_behind_a_blocked_one_in_the_same_batch_are_answered() -> None:
    with serving(stuck_or_quick, max_ongoing_requests=8) as replica:
        link = replica.link()
        for _ in range(40):
            link.get(9)  # FAST: answers are coalesced, and one thread would do
        batch = [wire.request_head(query="stuck=1"), *[wire.request_head()] * 4]
        link.sock.sendall(
            b"".join(wire.frame(wire.REQUEST, at + 1, flags=wire.FIN, payload=head) for at, head in enumerate(batch))
        )
        for stream in range(2, 6):
            assert link.answer(stream).body == b"done"
        release.set()
        assert link.answer(1).body == b"done"


def test_as_many_run_at_once_as_the_limit_says() -> None:
    class Meet:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(6)

        def __call__(self) -> str:
            self.barrier.wait(5)
            return threading.current_thread().name

    with serving(Meet, max_ongoing_requests=6) as replica:
        link = replica.link()
        for stream in range(1, 7):
            link.request(stream)
        names = {link.answer(stream).body for stream in range(1, 7)}
        assert len(names) == 6


def test_each_job_has_a_context_of_its_own_with_the_request_in_it() -> None:
    def handler() -> list[Any]:
        from test_worker_pool import variable

        from rayserve_fast.context import _serve_request_context

        before = variable.get()
        variable.set(before + 1)
        context = _serve_request_context.get()
        assert context is not None
        return [before, context.request_id]

    with serving(handler) as replica:
        link = replica.link()
        for number in range(1, 5):
            assert json.loads(link.get(number, request_id=f"r{number}").body) == [0, f"r{number}"]


def test_a_sync_handler_may_raise_anything() -> None:
    def handler(request: Any) -> str:
        kind = request.query_params.get("kind")
        if kind == "exit":
            raise SystemExit(3)
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "error":
            raise ValueError("no")
        return "fine"

    with serving(handler) as replica:
        link = replica.link()
        for kind in ("exit", "interrupt", "error"):
            assert link.get(1, query=f"kind={kind}").status == 500
        assert link.get(2).body == b"fine"
        assert replica.runtime.counters()["running"] == 0


def test_a_cancelled_job_only_loses_its_answer_and_keeps_its_slot_until_it_returns() -> None:
    with serving(stuck_or_quick, max_ongoing_requests=1) as replica:
        link = replica.link()
        link.request(1, query="stuck=1")
        assert begun.wait(10)
        link.send(wire.CANCEL, 1)
        assert link.silent(0.05)
        assert replica.runtime.counters()["running"] == 1
        release.set()
        assert link.answer(1).last.aux == wire.CANCELLED
        assert link.get(2).body == b"done"


def from_thread(request: Any) -> list[Any]:
    """What code that knows itself on one of anyio's threads does, as in Ray Serve."""
    body = anyio.from_thread.run(request.body)
    return [len(body), anyio.from_thread.run_sync(threading.get_ident) != threading.get_ident()]


def test_a_sync_handler_reaches_the_event_loop_by_anyio() -> None:
    with serving(from_thread) as replica:
        link = replica.link()
        for number in (1, 2):  # the second on a thread that has run one
            link.request(number, fin=False, method="POST")
            link.send(wire.BODY, number, payload=bytes(10))
            link.send(wire.BODY, number, payload=bytes(3), flags=wire.FIN)
            assert json.loads(link.answer(number).body) == [13, True]


def test_a_cancelled_job_that_no_thread_has_begun_gives_its_slot_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = SyncPool.spawn
    # As on a machine that cannot start a second thread.
    monkeypatch.setattr(SyncPool, "spawn", lambda self: None if self._threads else spawn(self))
    with serving(stuck_or_quick, max_ongoing_requests=2) as replica:
        link = replica.link()
        link.request(1, query="stuck=1")
        assert begun.wait(10)
        link.request(2)
        link.request(3)
        assert link.answer(3).last.kind == wire.BUSY
        link.send(wire.CANCEL, 2)
        assert link.answer(2).last.aux == wire.CANCELLED
        assert link.frame().kind == wire.CREDIT
        assert replica.runtime.counters()["running"] == 1
        release.set()
        assert link.answer(1).body == b"done"


def test_a_sync_handler_that_returns_a_coroutine_is_awaited_on_the_loop() -> None:
    def handler() -> Any:
        async def later() -> str:
            import asyncio

            await asyncio.sleep(0.001)
            return "awaited"

        return later()

    with serving(handler) as replica:
        assert replica.link().get().body == b"awaited"


def test_nothing_of_a_request_outlives_it_in_an_idle_thread() -> None:
    def handler(request: Any) -> str:
        import weakref

        class Marked:
            pass

        request.marked = Marked()
        store.append(weakref.ref(request.marked))
        return "done"

    import test_worker_pool

    test_worker_pool.store = store = []  # type: ignore[attr-defined]

    def outer(request: Any) -> str:
        import weakref

        import test_worker_pool

        class Marked:
            pass

        request.marked = Marked()
        test_worker_pool.store.append(weakref.ref(request.marked))  # type: ignore[attr-defined]
        return "done"

    del handler
    with serving(outer) as replica:
        assert replica.link().get().body == b"done"
        wait_for(lambda: store[0]() is None, 5)


def test_threads_end_with_the_runtime() -> None:
    def handler() -> str:
        return threading.current_thread().name

    before = set(threading.enumerate())
    with serving(handler) as replica:
        assert replica.link().get().body.startswith(b"serve-handler-sync")
        assert set(threading.enumerate()) > before
    assert not set(threading.enumerate()) - before
