"""What the batches of this process have been like: counters and histograms with fixed buckets.

A batch costs a few additions, an item nothing. Names and buckets are those of Ray Serve's metrics; whoever exports them
reads them here, and adds the labels of the replica.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayserve_fast.batching import BatchedFunction

#: Upper bounds, milliseconds.
TIME_BUCKETS_MS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500, 1000, 2000),
    *(5000, 10_000, 60_000, 120_000, 300_000, 600_000),
)
#: Upper bounds, percent of `max_batch_size`.
UTILIZATION_BUCKETS_PERCENT = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
#: Upper bounds, items or what `batch_size_fn` counts.
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: Those that have been called.
_functions: weakref.WeakSet[BatchedFunction] = weakref.WeakSet()


class Histogram:
    """Counts of values by bucket; a bucket takes what is at most its bound, the last one what is above all."""

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> dict[str, Any]:
        """`bounds`, `counts` (one more), and the `sum` of all values."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


class BatchMetrics:
    """Of one decorated function, over all its event loops.

    Args:
        function_name: the label.
    """

    def __init__(self, function_name: str) -> None:
        self.function_name = function_name
        self._batches = 0
        self._wait_ms = Histogram(TIME_BUCKETS_MS)
        self._execution_ms = Histogram(TIME_BUCKETS_MS)
        self._utilization_percent = Histogram(UTILIZATION_BUCKETS_PERCENT)
        self._size = Histogram(SIZE_BUCKETS)

    def publish(self, function: BatchedFunction) -> None:
        """Have `read_all` list it from now on."""
        _functions.add(function)

    def released(self, waited_s: float) -> None:
        """A batch has left the queue, whose oldest item had waited so long."""
        self._wait_ms.observe(waited_s * 1e3)

    def begun(self, size: float, max_size: int) -> None:
        """The function is called with a batch of this size."""
        self._batches += 1
        self._size.observe(size)
        self._utilization_percent.observe(100 * size / max_size)

    def executed(self, seconds: float) -> None:
        """That call has ended."""
        self._execution_ms.observe(seconds * 1e3)

    def read(self, queue_length: int) -> dict[str, Any]:
        """By the names of Ray Serve's metrics, histograms as `Histogram.read` gives them."""
        return {
            "serve_batch_wait_time_ms": self._wait_ms.read(),
            "serve_batch_execution_time_ms": self._execution_ms.read(),
            "serve_batch_queue_length": queue_length,
            "serve_batch_utilization_percent": self._utilization_percent.read(),
            "serve_actual_batch_size": self._size.read(),
            "serve_batches_processed": self._batches,
        }


def read_all() -> list[tuple[str, dict[str, Any]]]:
    """The metrics of each decorated function that this process has called, with its name."""
    return [(function.metrics.function_name, function._get_metrics()) for function in list(_functions)]
