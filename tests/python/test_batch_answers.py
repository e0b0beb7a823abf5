"""What a replica answers when it is sent a batch: one result or one error for each request, whatever the call gave."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from wire_client import BATCHED, ERROR
from worker_gate import settles
from worker_replica import serving

from rayserve_fast import values

BATCHES = {"max_batch_size": 8}


def some_bad(requests: list[Any]) -> list[Any]:
    return ["good", ValueError("bad"), {"unserializable": object()}, "good"]


async def async_some_bad(requests: list[Any]) -> list[Any]:
    return some_bad(requests)


def broken(requests: list[Any]) -> list[Any]:
    raise ValueError("broken")


async def async_broken(requests: list[Any]) -> list[Any]:
    raise ValueError("broken")


async def responses(requests: list[Any]) -> list[Any]:
    return [None, b"bytes", "text", PlainTextResponse("made", 201), StreamingResponse(iter(["a", "b"]))]


def sync_responses(requests: list[Any]) -> list[Any]:
    return [StreamingResponse(iter(["a", "b"])), "plain"]


class Returning:
    """Returns what it was made with, and then a good list."""

    def __init__(self, result: Any) -> None:
        self.results = [result, [1, 2]]

    async def __call__(self, items: list[int]) -> Any:
        return self.results.pop(0)


def sync_texts(requests: list[Any]) -> tuple[str, ...]:
    return tuple(f"{i} of {len(requests)}" for i in range(len(requests)))


def test_sync_handlers_run_in_the_pool_and_may_return_another_sequence() -> None:
    with serving(sync_texts, **BATCHES) as replica:
        link = replica.link()
        streams = link.post_batch(b"", b"")
        assert [link.answer(stream).body for stream in streams] == [b"0 of 2", b"1 of 2"]


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ([1], "The input list has length 2 but the returned list has length 1."),
        ({"a": 1, "b": 2}, "The input list has length 2 but the function returned a dict of length 2."),
        ("ab", "The input list has length 2 but the function returned a str of length 2."),
        ({1, 2}, "The input list has length 2 but the function returned a set of length 2."),
        (7, "The input list has length 2 but the function returned a int."),
    ],
)
def test_a_result_that_is_no_list_of_that_length_fails_the_batch_and_no_other(result: Any, told: str) -> None:
    with serving(Returning, result, **BATCHES) as replica:
        link = replica.link()
        for stream in (1, 2):
            link.call(stream, "__call__", stream, flags=BATCHED)
        link.batch(1, 2)
        for stream in (1, 2):
            failed = link.answer(stream).last
            assert failed.kind == ERROR
            assert told in str(values.load_error(failed.payload))
        link.post_batch(b"", b"")
        assert [link.answer(stream).body for stream in (1, 2)] == [b"1", b"2"]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_an_exception_among_the_results_fails_its_own_request(kind: str) -> None:
    with serving(async_some_bad if kind == "async" else some_bad, **BATCHES) as replica:
        link = replica.link()
        streams = link.post_batch(b"", b"", b"", b"")
        assert [link.answer(stream).status for stream in streams] == [200, 500, 500, 200]
        settles(replica)


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_an_exception_fails_every_request_with_an_answer_of_its_own_and_is_logged_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(async_broken if kind == "async" else broken, **BATCHES) as replica:
        link = replica.link()
        streams = link.post_batch(b"", b"")
        for stream in streams:
            answer = link.answer(stream)
            assert (answer.status, answer.body) == (500, b"Internal Server Error")
        settles(replica)
    logged = [record.getMessage() for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    assert logged[0].startswith("A batch of 2 requests to Replica(id='r1'")


def test_results_become_responses_as_ever() -> None:
    with serving(responses, **BATCHES) as replica:
        link = replica.link()
        streams = link.post_batch(*[b""] * 5)
        answers = [link.answer(stream) for stream in streams]
        assert [answer.body for answer in answers] == [b"", b"bytes", b"text", b"made", b"ab"]
        assert [answer.status for answer in answers] == [200, 200, 200, 201, 200]
        settles(replica)


def test_sync_handlers_may_stream_too() -> None:
    with serving(sync_responses, **BATCHES) as replica:
        link = replica.link()
        streams = link.post_batch(b"", b"")
        assert [link.answer(stream).body for stream in streams] == [b"ab", b"plain"]
