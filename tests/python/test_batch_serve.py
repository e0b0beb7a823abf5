"""`serve.batch` in replicas, over HTTP and handles, on a cluster and in local testing mode."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from starlette.responses import StreamingResponse

from rayserve_fast import serve


def together(*responses: Any) -> list[Any]:
    return [response.result(timeout_s=30) for response in responses]


@serve.deployment(max_ongoing_requests=50)
class Batched:
    @serve.batch(max_batch_size=4, batch_wait_timeout_s=2)
    async def double(self, numbers: list[int]) -> list[tuple[int, int]]:
        return [(2 * number, len(numbers)) for number in numbers]

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.2)
    async def models(self, numbers: list[int]) -> list[Any]:
        from rayserve_fast.context import _get_serve_batch_request_context, _serve_request_context

        await asyncio.sleep(0.05)
        contexts = [context.multiplexed_model_id for context in _get_serve_batch_request_context()]
        about = serve.get_multiplexed_model_id(), contexts, _serve_request_context.get()
        return [(number, *about) for number in numbers]

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=2)
    async def fail(self, numbers: list[int]) -> list[int]:
        raise ValueError(f"not {sorted(numbers)}")

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=2)
    async def spell(self, words: list[str]) -> Any:
        for at in range(max(map(len, words))):
            await asyncio.sleep(0)
            yield [word[at] if at < len(word) else StopIteration for word in words]

    async def letters(self, word: str) -> Any:
        async for letter in self.spell(word):
            yield letter

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=60)
    async def pairs(self, items: list[Any]) -> list[Any]:
        return [items for _ in items]

    def configure(self, size: int) -> int:
        self.pairs.set_max_batch_size(size)
        return self.pairs._get_max_batch_size()

    async def call(self, number: int) -> tuple[int, int]:
        return await self.double(number)


def test_handle_calls_share_a_batch(run: Any) -> None:
    handle = run(Batched.bind())
    assert together(*map(handle.call.remote, range(4))) == [(2 * number, 4) for number in range(4)]
    # The decorated method is a method like any other.
    assert together(*map(handle.double.remote, range(4))) == [(2 * number, 4) for number in range(4)]


def test_calls_for_different_models_are_batches_of_their_own(run: Any) -> None:
    handle = run(Batched.bind())
    wanted = ["a", "b", "a", ""]
    calls = [handle.options(multiplexed_model_id=model).models.remote(at) for at, model in enumerate(wanted)]
    outcome = together(*calls)
    assert [(number, model) for number, model, *_ in outcome] == list(enumerate(wanted))
    assert [contexts for _, _, contexts, _ in outcome] == [["a", "a"], ["b"], ["a", "a"], [""]]
    assert [request for *_, request in outcome] == [None] * 4


def test_an_error_reaches_every_caller(run: Any) -> None:
    handle = run(Batched.bind())
    for response in [handle.fail.remote(1), handle.fail.remote(2)]:
        with pytest.raises(ValueError, match=r"not \[1, 2\]"):
            response.result(timeout_s=30)


def test_streams_come_through_handles(run: Any) -> None:
    handle = run(Batched.bind()).options(stream=True)
    for method in ("letters", "spell"):
        streams = [getattr(handle, method).remote(word) for word in ("abc", "x")]
        with ThreadPoolExecutor() as threads:
            assert list(threads.map(list, streams)) == [["a", "b", "c"], ["x"]]


def test_a_cancelled_call_leaves_the_queue(run: Any) -> None:
    handle = run(Batched.bind())
    first = handle.pairs.remote("cancelled")
    assert handle.configure.remote(2).result(timeout_s=30) == 2  # by then the first is there
    first.cancel()
    others = [handle.pairs.remote(item) for item in ("b", "c")]
    assert together(*others) == [["b", "c"]] * 2


def test_a_sync_method_may_change_the_size(run: Any) -> None:
    handle = run(Batched.bind())
    waiting = handle.pairs.remote("alone")
    assert handle.configure.remote(1).result(timeout_s=30) == 1
    assert waiting.result(timeout_s=30) == ["alone"]


def test_http_requests_share_a_batch(serve_instance: str) -> None:
    @serve.deployment(max_ongoing_requests=50)
    class Echo:
        @serve.batch(max_batch_size=4, batch_wait_timeout_s=2)
        async def handle(self, bodies: list[Any]) -> list[Any]:
            return [{"body": body, "batch": len(bodies)} for body in bodies]

        async def __call__(self, request: Any) -> Any:
            return await self.handle(await request.json())

    serve.run(Echo.bind())
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda at: requests.post(serve_instance, json=[at], timeout=30).json(), range(8)))
    assert [answer["body"] for answer in answers] == [[at] for at in range(8)]
    assert {answer["batch"] for answer in answers} == {4}


def test_the_handler_itself_may_be_batched(serve_instance: str) -> None:
    @serve.deployment(max_ongoing_requests=50)
    @serve.batch(max_batch_size=3, batch_wait_timeout_s=2)
    async def handler(batch: list[Any]) -> list[Any]:
        return [[request.query_params["at"], len(batch)] for request in batch]

    serve.run(handler.bind())
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda at: requests.get(serve_instance, {"at": at}, timeout=30).json(), range(3)))
    assert answers == [[str(at), 3] for at in range(3)]


def test_http_requests_for_different_models_do_not_meet(serve_instance: str) -> None:
    @serve.deployment(max_ongoing_requests=50)
    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.3)
    async def handler(batch: list[Any]) -> list[Any]:
        await asyncio.sleep(0)
        return [[serve.get_multiplexed_model_id(), len(batch)]] * len(batch)

    serve.run(handler.bind())

    def ask(model: str) -> Any:
        return requests.get(serve_instance, headers={"serve_multiplexed_model_id": model}, timeout=30).json()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, ["m1", "m2", "m1", "m1"])) == [["m1", 3], ["m2", 1], ["m1", 3], ["m1", 3]]


def test_a_batched_stream_is_an_http_stream(serve_instance: str) -> None:
    @serve.deployment(max_ongoing_requests=50)
    class Streaming:
        @serve.batch(max_batch_size=2, batch_wait_timeout_s=2)
        async def lines(self, counts: list[int]) -> Any:
            for at in range(max(counts)):
                await asyncio.sleep(0)
                yield [f"{at}\n" if at < count else StopIteration for count in counts]

        async def __call__(self, request: Any) -> Any:
            return StreamingResponse(self.lines(int(request.query_params["count"])))

    serve.run(Streaming.bind())
    with ThreadPoolExecutor(2) as threads:
        texts = threads.map(lambda count: requests.get(serve_instance, {"count": count}, timeout=30).text, [2, 4])
        assert [text.split() for text in texts] == [["0", "1"], ["0", "1", "2", "3"]]


def test_wrong_results_are_500_and_the_replica_goes_on(serve_instance: str) -> None:
    @serve.deployment(max_ongoing_requests=50)
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=1)
    async def handler(batch: list[Any]) -> list[Any]:
        return ["ok"] * (1 if batch[0].query_params else len(batch))

    serve.run(handler.bind())
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda _: requests.get(f"{serve_instance}?x=1", timeout=30), range(2)))
    assert [answer.status_code for answer in answers] == [500, 500]
    assert requests.get(serve_instance, timeout=30).text == "ok"


def test_a_limit_below_the_batch_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    from rayserve_fast.local import applications

    @serve.deployment(max_ongoing_requests=5)
    class Narrow:
        @serve.batch(max_batch_size=4, max_concurrent_batches=2, batch_wait_timeout_s=0)
        async def call(self, items: list[int]) -> list[int]:
            return items

        async def resize(self, size: int) -> None:
            self.call.set_max_batch_size(size)

    handle = serve.run(Narrow.bind(), _local_testing_mode=True)
    try:
        with caplog.at_level(logging.WARNING, logger="ray.serve"):
            assert handle.call.remote(1).result(timeout_s=30) == 1
            assert "max_ongoing_requests=5" in caplog.text
            assert "is 8" in caplog.text
            caplog.clear()
            handle.resize.remote(2).result(timeout_s=30)
            assert caplog.text == ""
            handle.resize.remote(3).result(timeout_s=30)
            assert "max_batch_size=3" in caplog.text
    finally:
        applications.shutdown()


def test_what_batches_were_like_can_be_read_in_the_replica(run: Any) -> None:
    @serve.deployment(max_ongoing_requests=50)
    class Counting:
        @serve.batch(max_batch_size=2, batch_wait_timeout_s=2)
        async def call(self, items: list[int]) -> list[int]:
            return items

        async def read(self) -> str:
            from rayserve_fast.batch_metrics import read_all

            return json.dumps([metrics for name, metrics in read_all() if name == "call"])

    handle = run(Counting.bind())
    together(handle.call.remote(1), handle.call.remote(2))
    assert any(
        metrics["serve_batches_processed"] == 1 and metrics["serve_batch_utilization_percent"]["sum"] == 100
        for metrics in json.loads(handle.read.remote().result(timeout_s=30))
    )


def test_the_collector_leaves_alone_what_was_there_before_the_constructor(serve_instance: str) -> None:
    """It would stop all the requests of a batch for as long as it looks through Ray's modules."""

    @serve.deployment
    class Collected:
        def __init__(self) -> None:
            import gc

            self.mine: list[Any] = [[] for _ in range(1000)]
            gc.collect()
            self.counts = gc.get_freeze_count(), len(gc.get_objects())

        def __call__(self) -> tuple[int, int]:
            return self.counts

    frozen, seen = serve.run(Collected.bind()).remote().result(timeout_s=30)
    assert frozen > 10_000
    assert 1000 <= seen < frozen


def test_a_batch_may_call_other_deployments(run: Any) -> None:
    @serve.deployment(max_ongoing_requests=50)
    async def square(number: int) -> int:
        return number * number

    @serve.deployment(max_ongoing_requests=50)
    class Caller:
        def __init__(self, square: Any) -> None:
            self.square = square

        @serve.batch(max_batch_size=3, batch_wait_timeout_s=2)
        async def squares(self, numbers: list[int]) -> list[int]:
            return list(await asyncio.gather(*map(self.square.remote, numbers)))

    handle = run(Caller.bind(square.bind()))
    assert together(*map(handle.squares.remote, range(6))) == [0, 1, 4, 9, 16, 25]
