"""`examples/story.py` as a newcomer runs it, and as its author would test it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import requests

from rayserve_fast import serve


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import story

    yield story
    del sys.modules["story"]


def test_it_streams_and_judges_what_it_writes(story: ModuleType, serve_instance: str) -> None:
    serve.run(story.app)
    began = time.monotonic()
    with requests.get(f"{serve_instance}/story", params={"words": 100}, stream=True, timeout=20) as answer:
        pieces = answer.iter_content(None)
        first = next(pieces)
        assert time.monotonic() - began < 1.9, "the first words came when the last were not written: 0.02 s a word"
        text = first + b"".join(pieces)
    assert len(text.split()) == 100
    review = requests.get(f"{serve_instance}/review", params={"words": 10}, timeout=20).json()
    assert review["words"] == len(review["text"].split()) == 10


def test_it_can_be_tested_in_one_process(story: ModuleType) -> None:
    from rayserve_fast.local import applications

    handle = serve.run(story.app, name="local-story", _local_testing_mode=True)
    assert handle.review.remote(words=10).result(timeout_s=20)["words"] == 10
    applications.delete("local-story")
