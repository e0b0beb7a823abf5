"""What tests of the older APIs share: a Serve begun by `serve.init`, and a handler of the simplest kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rayserve_fast import serve

Url = str


@pytest.fixture(name="flask")
def begun_by_init(serve_instance: Url) -> Iterator[Url]:
    """Serve for a process that called `serve.init`."""
    serve.init()
    yield serve_instance
    serve.connect()


def text(answer: str) -> Callable[..., str]:
    """A handler that answers just this."""

    def handler(request: Any) -> str:
        return answer

    return handler
