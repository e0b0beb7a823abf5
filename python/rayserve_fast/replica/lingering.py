"""References to Ray objects in results, which must outlive the answer until the caller has got hold of them.

Nobody counts references that travel outside of Ray's channels: the replica that owns the object keeps it for a while,
so that the caller can fetch it or pass it to Ray, which then counts it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

#: How long after the answer, seconds.
LINGER_S = 60.0


class Lingering:
    """Keeps objects for a time; one thread while there are any."""

    def __init__(self, linger_s: float = LINGER_S) -> None:
        self._linger_s = linger_s
        self._kept: deque[tuple[float, Any]] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, what: Any) -> None:
        """Until the time is over."""
        with self._lock:
            idle = not self._kept
            self._kept.append((time.monotonic() + self._linger_s, what))
        if idle:
            threading.Thread(target=self._let_go, name="rayserve-fast-lingering", daemon=True).start()

    def _let_go(self) -> None:
        while True:
            with self._lock:
                while self._kept and self._kept[0][0] <= time.monotonic():
                    self._kept.popleft()
                if not self._kept:
                    return
                until = self._kept[0][0]
            time.sleep(max(until - time.monotonic(), 0))
