"""Handlers of a replica in the test's own process that block until they are let go, and the wait until all are done."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from deployed import wait_for
from worker_replica import Replica


class Gate:
    """Where handlers are that block, and what lets them go. They are named module-level functions and run in the
    test's own process, so they share `gate` with it."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()


gate = Gate()


@pytest.fixture
def fresh_gate() -> Iterator[None]:
    """A closed `gate` that nobody has entered; opened after the test."""
    gate.renew()
    yield
    gate.release.set()


def settles(replica: Replica) -> None:
    """Waits until every slot is free: that of a streamed response is a moment after its last byte."""
    wait_for(lambda: not replica.runtime.counters()["running"], 10)
