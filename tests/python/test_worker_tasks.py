"""Handlers run in genuine tasks from their first step: what asyncio, anyio and contextvars promise holds in them."""

from __future__ import annotations

import asyncio
import contextvars
import json
import sys
from typing import Any

import anyio
import pytest
import wire_client as wire
from worker_replica import serving

needs_311 = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout and TaskGroup came with 3.11")


variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


def reply(handler: Any, *, requests: int = 1) -> Any:
    """What the handler returns, as JSON."""
    with serving(handler) as replica:
        link = replica.link()
        answers = [link.get(number + 1) for number in range(requests)]
        assert [answer.status for answer in answers] == [200] * requests, answers
        return json.loads(answers[-1].body)


def test_the_first_step_has_a_current_task_and_later_ones_the_same() -> None:
    async def handler() -> list[bool]:
        task = asyncio.current_task()
        first = isinstance(task, asyncio.Task)
        await asyncio.sleep(0.001)
        return [first, asyncio.current_task() is task, asyncio.get_running_loop() is task.get_loop()]

    assert reply(handler) == [True, True, True]


def test_a_handler_that_does_not_suspend_is_answered_within_its_tick() -> None:
    async def handler() -> bool:
        return asyncio.current_task() is not None

    with serving(handler) as replica:
        link, ticks = replica.link(), []
        for _ in range(5):
            before = replica.runtime.counters()["wakes"]
            assert link.get().body == b"true"
            ticks.append(replica.runtime.counters()["wakes"] - before)
        assert min(ticks) == 1, "a tick that the machine holds up for more than a millisecond is followed by another"


def test_no_task_is_current_between_requests() -> None:
    async def handler() -> bool:
        seen: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: seen.set_result(asyncio.current_task() is None))
        return await seen

    assert reply(handler, requests=3) is True


def test_tasks_that_a_handler_makes_in_its_first_step_run() -> None:
    async def handler() -> list[int]:
        async def one(number: int) -> int:
            await asyncio.sleep(0)
            return number

        return list(await asyncio.gather(*(asyncio.create_task(one(number)) for number in range(5))))

    assert reply(handler, requests=2) == [0, 1, 2, 3, 4]


def test_wait_for_times_out_inside_a_handler() -> None:
    async def handler() -> list[str]:
        try:
            await asyncio.wait_for(asyncio.sleep(60), 0.01)
        except asyncio.TimeoutError:
            return ["timeout"]
        return ["no"]

    assert reply(handler) == ["timeout"]


@needs_311
def test_timeout_entered_before_the_first_suspension_cancels_the_right_task() -> None:
    async def handler() -> list[str]:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            await asyncio.sleep(0)
            return ["timeout"]
        return ["no"]

    assert reply(handler) == ["timeout"]


@needs_311
def test_a_task_group_cancels_siblings_and_its_parent_goes_on() -> None:
    async def handler() -> list[str]:
        log: list[str] = []

        async def fails() -> None:
            raise ValueError("first")

        async def waits() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                log.append("cancelled")
                raise

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(waits())
                group.create_task(fails())
        except BaseException as error:  # an ExceptionGroup
            log.append(type(error.exceptions[0]).__name__)  # type: ignore[attr-defined]
        return log

    assert reply(handler) == ["cancelled", "ValueError"]


def test_anyio_scopes_and_task_groups_work() -> None:
    async def handler() -> list[Any]:
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep(60)
        results: list[int] = []

        async def add(number: int) -> None:
            await anyio.sleep(0)
            results.append(number)

        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(add, number)
        return [scope.cancelled_caught, sorted(results), await anyio.to_thread.run_sync(lambda: 7)]

    assert reply(handler) == [True, [0, 1, 2], 7]


def test_context_variables_are_the_requests_own() -> None:
    async def handler() -> list[int]:
        from test_worker_tasks import variable  # a context variable cannot be pickled

        before = variable.get()
        variable.set(before + 1)
        await asyncio.sleep(0)
        return [before, variable.get()]

    assert reply(handler, requests=3) == [0, 1]


def test_the_request_context_is_set_in_every_step_and_gone_outside() -> None:
    async def handler() -> list[Any]:
        from rayserve_fast.context import _serve_request_context

        seen = [_serve_request_context.get().request_id]  # type: ignore[union-attr]
        await asyncio.sleep(0.005)
        context = _serve_request_context.get()
        assert context is not None
        return [*seen, context.request_id, context.route, context.app_name, context.is_http_request]

    with serving(handler) as replica:
        link = replica.link()
        for number in range(1, 4):
            link.request(number, request_id=f"r{number}", route="/x")
        for number in range(1, 4):
            assert json.loads(link.answer(number).body) == [f"r{number}", f"r{number}", "/x", "default", True]

        async def outside() -> object:
            from rayserve_fast.context import _serve_request_context

            return _serve_request_context.get()

        assert replica.runtime._loop.run(outside) is None


def test_cancel_raises_in_the_handler_where_it_waits() -> None:
    log: list[str] = []

    class Waits:
        async def __call__(self) -> str:
            self.__class__.running = True
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                log_in_class.append("cancelled")
                raise
            return "no"

        async def log(self) -> list[str]:
            return log_in_class

    log_in_class = log
    with serving(Waits) as replica:
        link = replica.link()
        link.request(1)
        link.send(wire.CANCEL, 1)
        last = link.answer(1).last
        assert (last.kind, last.aux) == (wire.ERROR, wire.CANCELLED)
        link.call(2, "log")
        assert wire.value(link.answer(2).last.payload) == ["cancelled"]
        assert replica.runtime.counters()["running"] == 0


def test_a_dead_link_cancels_its_requests() -> None:
    class Waits:
        def __init__(self) -> None:
            self.cancelled = 0

        async def __call__(self) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                self.cancelled += 1

        async def count(self) -> int:
            while self.cancelled < 3:
                await asyncio.sleep(0.001)
            return self.cancelled

    with serving(Waits) as replica:
        dead, alive = replica.link(), replica.link()
        for number in range(1, 4):
            dead.request(number)
        assert dead.silent(0.05)
        dead.close()
        alive.call(1, "count")
        assert wire.value(alive.answer(1).last.payload) == 3


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, ValueError])
@pytest.mark.parametrize("suspends", [False, True])
def test_whatever_a_handler_raises_fails_only_its_own_request(kind: type[BaseException], suspends: bool) -> None:
    class Raises:
        async def __call__(self, request: Any) -> str:
            if suspends:
                await asyncio.sleep(0.001)
            if request.query_params.get("raise"):
                raise kind("of a handler")
            await asyncio.sleep(0.01)
            return "fine"

    with serving(Raises) as replica:
        link = replica.link()
        link.request(1)
        link.request(2, query="raise=1")
        link.request(3)
        assert link.answer(2).status == 500
        assert [link.answer(number).body for number in (1, 3)] == [b"fine", b"fine"]
        assert link.get(4).body == b"fine"
        assert replica.runtime.counters()["running"] == 0


def test_a_task_of_the_user_that_exits_does_not_stop_the_loop() -> None:
    async def handler(request: Any) -> str:
        async def leaves() -> None:
            sys.exit(3)

        if request.query_params.get("exit"):
            request.app_task = asyncio.get_running_loop().create_task(leaves())
        await asyncio.sleep(0.01)
        return "fine"

    with serving(handler) as replica:
        link = replica.link()
        assert link.get(1, query="exit=1").body == b"fine"
        assert link.get(2).body == b"fine"


def test_many_suspended_tasks_are_kept_alive_without_other_references() -> None:
    async def handler() -> str:
        await asyncio.sleep(0.2)
        return "kept"

    import gc

    with serving(handler, max_ongoing_requests=100) as replica:
        link = replica.link()
        for number in range(1, 51):
            link.request(number)
        assert link.silent(0.05)
        gc.collect()
        assert [link.answer(number).body for number in range(1, 51)] == [b"kept"] * 50
