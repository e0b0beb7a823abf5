"""When `serve.batch` runs a batch, and of what: sizes, windows, slots, weights, cancellation. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings, strategies as st

from rayserve_fast import serve


class Recorder:
    """A batched function whose batches end when they are told to."""

    def __init__(self, **options: Any) -> None:
        self.batches: list[list[Any]] = []
        self.began = asyncio.Semaphore(0)
        self.running = self.most = 0
        self.ends: list[asyncio.Event] = []

        async def function(items: list[Any]) -> list[Any]:
            self.batches.append(items)
            self.began.release()
            self.running += 1
            self.most = max(self.most, self.running)
            self.ends.append(asyncio.Event())
            await self.ends[-1].wait()
            self.running -= 1
            return [("done", item) for item in items]

        self.call: Any = serve.batch(**options)(function)

    def begin(self, *items: Any) -> list[asyncio.Task[Any]]:
        return [asyncio.ensure_future(self.call(item)) for item in items]

    async def until(self, batches: int) -> None:
        while len(self.batches) < batches:
            await asyncio.wait_for(self.began.acquire(), 20)

    def end(self, batch: int) -> None:
        self.ends[batch].set()


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_full_batch_does_not_wait() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=3, batch_wait_timeout_s=60)
        tasks = recorder.begin(1, 2, 3)
        await recorder.until(1)
        recorder.end(0)
        assert await asyncio.gather(*tasks) == [("done", item) for item in (1, 2, 3)]

    asyncio.run(main())


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_an_incomplete_batch_goes_when_its_first_item_has_waited(runner: Any) -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=10, batch_wait_timeout_s=1)
        began = time.monotonic()
        recorder.begin(1)
        await asyncio.sleep(0.5)
        recorder.begin(2)
        await recorder.until(1)
        assert 0.99 <= time.monotonic() - began < 1.5, "seconds: the window of the second item alone ends at 1.5"
        assert recorder.batches == [[1, 2]]

    runner(main())


def test_without_a_window_a_batch_is_what_is_there() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=10, batch_wait_timeout_s=0)
        recorder.begin(1, 2, 3)
        await turns()
        assert recorder.batches == [[1, 2, 3]]

    asyncio.run(main())


def test_no_batch_is_sealed_while_all_slots_are_taken() -> None:
    """Ray Serve would have put 4 and 5 into batches of their own, one after the other."""

    async def main() -> None:
        recorder = Recorder(max_batch_size=4, batch_wait_timeout_s=0.01)
        recorder.begin(1, 2, 3, 4)
        await recorder.until(1)
        for item in (5, 6, 7):
            recorder.begin(item)
            await asyncio.sleep(0.02)  # longer than the window
        assert recorder.batches == [[1, 2, 3, 4]]
        recorder.end(0)
        await turns()
        assert recorder.batches == [[1, 2, 3, 4], [5, 6, 7]]

    asyncio.run(main())


def test_as_many_batches_run_as_may() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=1, max_concurrent_batches=3)
        tasks = recorder.begin(*range(5))
        await turns()
        assert (recorder.running, recorder.batches) == (3, [[0], [1], [2]])
        recorder.end(1)
        await turns()
        assert recorder.batches == [[0], [1], [2], [3]]
        assert tasks[1].done()
        assert not tasks[0].done()

    asyncio.run(main())


def test_setters_act_on_what_waits_also_from_a_thread() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=10, batch_wait_timeout_s=60)
        recorder.begin(1, 2, 3, 4, 5)
        await turns()
        assert recorder.batches == []
        await asyncio.to_thread(recorder.call.set_max_batch_size, 4)
        await recorder.until(1)
        assert recorder.batches == [[1, 2, 3, 4]]
        recorder.end(0)
        await turns()
        recorder.call.set_batch_wait_timeout_s(0.01)
        await recorder.until(2)
        assert recorder.batches[1] == [5]
        assert recorder.call._get_max_batch_size() == 4
        assert recorder.call._get_batch_wait_timeout_s() == 0.01
        with pytest.raises(ValueError, match="max_batch_size"):
            recorder.call.set_max_batch_size(0)

    asyncio.run(main())


def test_debugging_methods_tell_what_runs() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=1, max_concurrent_batches=2)
        assert recorder.call._get_curr_iteration_start_times().num_requests == 0
        assert recorder.call._get_curr_iteration_start_times().min_start_time is None
        before = time.time()
        recorder.begin(1, 2, 3)
        await recorder.until(2)
        times = recorder.call._get_curr_iteration_start_times()
        assert times.num_requests == len(times.start_times) == 2
        assert before - 1 <= times.min_start_time <= times.mean_start_time <= times.max_start_time <= time.time()
        assert await recorder.call._is_batching_task_alive()
        stack = await recorder.call._get_handling_task_stack()
        assert "await self.ends[-1].wait()" in stack
        assert "1 items wait" in stack

    asyncio.run(main())


def test_metrics_count_batches() -> None:
    async def main() -> None:
        recorder, began = Recorder(max_batch_size=4, batch_wait_timeout_s=0.01), time.monotonic()
        recorder.begin(1, 2, 3)
        await recorder.until(1)
        recorder.begin(4)
        await turns()
        metrics = recorder.call._get_metrics()
        assert metrics["serve_batches_processed"] == 1
        assert metrics["serve_batch_queue_length"] == 1
        size, wait = metrics["serve_actual_batch_size"], metrics["serve_batch_wait_time_ms"]
        assert dict(zip(size["bounds"], size["counts"], strict=False))[4] == 1
        assert 9 <= wait["sum"] <= 1000 * (time.monotonic() - began)
        assert sum(wait["counts"]) == 1
        assert metrics["serve_batch_utilization_percent"]["sum"] == 75
        assert sum(metrics["serve_batch_execution_time_ms"]["counts"]) == 0
        recorder.end(0)
        await turns()
        assert sum(recorder.call._get_metrics()["serve_batch_execution_time_ms"]["counts"]) == 1

    asyncio.run(main())


def test_those_who_leave_before_it_begins_are_not_in_it() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=3, batch_wait_timeout_s=0.01)
        recorder.begin(0)
        await recorder.until(1)
        tasks = recorder.begin(*range(1, 8))
        await turns()
        for at in (0, 2, 3, 4, 6):
            tasks[at].cancel()
        await turns()
        assert recorder.call._get_metrics()["serve_batch_queue_length"] == 2
        recorder.end(0)
        await recorder.until(2)
        assert recorder.batches == [[0], [2, 6]]

    asyncio.run(main())


def test_a_batch_of_nobody_is_not_run() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=3, batch_wait_timeout_s=0.005)
        for task in recorder.begin(1, 2):
            await turns()
            task.cancel()
        await asyncio.sleep(0.02)
        assert recorder.batches == []
        recorder.begin(3)
        await recorder.until(1)
        assert recorder.batches == [[3]]

    asyncio.run(main())


def test_a_batch_that_runs_is_not_cancelled_with_its_callers() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=2)
        left, stayed = recorder.begin(1, 2)
        await recorder.until(1)
        left.cancel()
        await turns()
        assert left.cancelled()
        recorder.end(0)
        assert await stayed == ("done", 2)

    asyncio.run(main())


def test_a_wait_that_times_out_leaves_the_queue() -> None:
    async def main() -> None:
        recorder = Recorder(max_batch_size=2, batch_wait_timeout_s=60)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(recorder.call(1), 0.01)
        assert recorder.call._get_metrics()["serve_batch_queue_length"] == 0

    asyncio.run(main())


class Weighed(Recorder):
    def __init__(self, **options: Any) -> None:
        super().__init__(batch_size_fn=sum, **options)


def test_an_item_that_would_exceed_begins_the_next_batch() -> None:
    async def main() -> None:
        weighed = Weighed(max_batch_size=10, batch_wait_timeout_s=0.01, max_concurrent_batches=9)
        weighed.begin(4, 5, 3, 7, 1, 10)
        await weighed.until(4)
        assert weighed.batches == [[4, 5], [3, 7], [1], [10]]

    asyncio.run(main())


def test_an_item_too_large_fails_alone() -> None:
    async def main() -> None:
        weighed = Weighed(max_batch_size=10, batch_wait_timeout_s=0.01)
        tasks = weighed.begin(11, 4, 12, 5)
        await weighed.until(1)
        weighed.end(0)
        await weighed.until(2)
        weighed.end(1)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RuntimeError, tuple, RuntimeError, tuple]
        assert "Size of item is greater than max_batch_size." in str(outcomes[0])
        assert weighed.batches == [[4], [5]]

    asyncio.run(main())


def test_a_measure_that_fails_refuses_its_item() -> None:
    async def main() -> None:
        weighed = Weighed(max_batch_size=10, batch_wait_timeout_s=0.01)
        tasks = weighed.begin("no number", 1, None, 2)
        await weighed.until(1)
        weighed.end(0)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [TypeError, tuple, TypeError, tuple]
        assert weighed.batches == [[1, 2]]

    asyncio.run(main())


def test_a_measure_need_not_be_a_sum() -> None:
    def padded(texts: list[str]) -> int:
        return max(map(len, texts)) * len(texts)

    async def main() -> None:
        recorder = Recorder(
            max_batch_size=12, batch_wait_timeout_s=0.01, batch_size_fn=padded, max_concurrent_batches=9
        )
        recorder.begin("aaa", "bbb", "c", "dddd", "e", "ffffffffffff")
        await recorder.until(3)
        assert recorder.batches == [["aaa", "bbb", "c"], ["dddd", "e"], ["ffffffffffff"]]

    asyncio.run(main())


def test_the_queue_stays_short_where_small_batches_could_not_keep_up() -> None:
    """A batch takes the time in which 4 items come, and 1 more for 10 of its own; 2 items come in a window.

    Batches of what came in one window do 2 items while 4 come, and leave 200 of 400. Time is counted in items that have
    come, so that a slow machine is slow for both.
    """
    waiting: list[int] = []
    ends: dict[int, asyncio.Event] = {}

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def model(items: list[int]) -> list[int]:
        end = ends[len(waiting) + 4 + len(items) // 10] = asyncio.Event()
        if len(waiting) < 400:
            await end.wait()
        return items

    async def main() -> None:
        tasks = []
        for at in range(400):
            tasks.append(asyncio.ensure_future(model(at)))
            await asyncio.sleep(0.005)
            waiting.append(model._get_metrics()["serve_batch_queue_length"])  # type: ignore[attr-defined]
            if (end := ends.pop(len(waiting), None)) is not None:
                end.set()
        for end in ends.values():
            end.set()
        assert await asyncio.wait_for(asyncio.gather(*tasks), 20) == list(range(400))

    uvloop.run(main())
    assert max(waiting) <= 32, "a full batch"


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("call"), st.integers(1, 9)),
            st.tuples(st.just("end"), st.integers(0, 3)),
            st.tuples(st.just("cancel"), st.integers(0, 30)),
            st.tuples(st.just("turn"), st.integers(1, 4)),
        ),
        max_size=60,
    ),
    size=st.integers(1, 5),
    slots=st.integers(1, 3),
    weighs=st.booleans(),
)
def test_whatever_happens_each_call_ends_once_in_order(
    steps: list[tuple[str, int]], size: int, slots: int, weighs: bool
) -> None:
    """Calls, ends and cancellations in any order: no batch too large, no slot too many, first come first served."""
    measure = (lambda items: sum(item % 10 for item in items)) if weighs else len
    limit = size + 8 if weighs else size

    async def main() -> None:
        recorder = Recorder(
            max_batch_size=limit,
            batch_wait_timeout_s=0,
            max_concurrent_batches=slots,
            batch_size_fn=measure if weighs else None,
        )
        tasks: list[asyncio.Task[Any]] = []
        open_batches: list[int] = []

        def notice() -> None:
            open_batches.extend(range(len(open_batches) + closed, len(recorder.batches)))

        closed = 0
        for kind, value in steps:
            notice()
            if kind == "call":
                tasks += recorder.begin(10 * len(tasks) + value)
            elif kind == "end" and open_batches:
                recorder.end(open_batches.pop(value % len(open_batches)))
                closed += 1
            elif kind == "cancel" and tasks:
                tasks[value % len(tasks)].cancel()
            else:
                await turns(value)
        for _ in range(1000):
            await turns(4)
            for end in recorder.ends:
                end.set()
            if all(task.done() for task in tasks):
                break
        await asyncio.gather(*tasks, return_exceptions=True)
        served = [item for batch in recorder.batches for item in batch]
        assert served == sorted(served)
        assert len(set(served)) == len(served)
        assert recorder.most <= slots
        assert all(measure(batch) <= limit for batch in recorder.batches)
        for at, task in enumerate(tasks):
            if not task.cancelled():
                item = task.result()[1]
                assert item // 10 == at
                assert item in served
        assert recorder.call._get_metrics()["serve_batch_queue_length"] == 0

    asyncio.run(main())
