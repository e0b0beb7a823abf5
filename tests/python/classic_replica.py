"""A replica of a backend behind a proxy in this process, without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from http_pair import ours

from rayserve_fast.classic.backend import Backend, SyncBackend


@contextlib.contextmanager
def backend(user: Callable[..., Any], requests: str, *args: Any, kind: type[Backend] = SyncBackend) -> Iterator[str]:
    with ours(kind, "/", "", user, args, requests) as (host, port):
        yield f"http://{host}:{port}"
