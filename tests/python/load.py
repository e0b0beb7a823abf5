"""A steady HTTP load for tests: every answer is kept, so that a single lost request can be named."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from types import TracebackType
from urllib.parse import urlsplit

from deployed import wait_for


class Load:
    """GET requests at a steady rate over keep-alive connections, while the `with` block runs.

    `rate` is requests/s over all connections. `answers` counts (status, body); an exception of the client counts as
    status 0 with its text. `slowest` is the longest answer in seconds.
    """

    def __init__(self, url: str, rate: float, connections: int = 16) -> None:
        self.answers: Counter[tuple[int, str]] = Counter()
        self.slowest = 0.0
        self._url = urlsplit(url)
        self._every = connections / rate
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i / rate,)) for i in range(connections)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def total(self) -> int:
        """Requests answered so far."""
        with self._lock:
            return sum(self.answers.values())

    def wait(self, more: int) -> None:
        """Return when so many more requests have been answered."""
        before = self.total
        wait_for(lambda: self.total >= before + more, 60, lambda: f"{self.total - before} of {more} answers")

    @property
    def failures(self) -> dict[tuple[int, str], int]:
        """Everything that is not 200."""
        return {answer: n for answer, n in self.answers.items() if answer[0] != 200}

    def _run(self, phase: float) -> None:
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=60)
        due = time.monotonic() + phase
        while not self._stop.wait(max(due - time.monotonic(), 0)):
            due += self._every
            began = time.monotonic()
            try:
                connection.request("GET", self._url.path or "/")
                response = connection.getresponse()
                answer = (response.status, response.read().decode())
            except (OSError, http.client.HTTPException) as e:
                answer = (0, repr(e))
                connection.close()
            took = time.monotonic() - began
            with self._lock:
                self.answers[answer] += 1
                self.slowest = max(self.slowest, took)
        connection.close()
