"""A driver script that calls a deployment and waits for each answer: the `driver` work, in a process of its own.

`python -m bench.driver '{"module": ..., "address": ..., "app": ...}'` checks one answer, prints READY, and then for
each line of its standard input, a number of seconds, calls for that long and prints the time that each call took.
"""

from __future__ import annotations

import base64
import importlib
import json
import sys
import time
from array import array


def main() -> None:
    """Call until standard input closes."""
    import ray

    wish = json.loads(sys.argv[1])
    serve = importlib.import_module(wish["module"])
    ray.init(address=wish["address"])
    handle = serve.get_app_handle(wish["app"])
    if (answer := handle.remote(b"echo").result()) != b"echo":
        raise SystemExit(f"the deployment answered {answer!r}")
    print("READY {}", flush=True)
    for line in sys.stdin:
        times = measure(handle, float(line))
        print("TIMES " + base64.b64encode(times.tobytes()).decode(), flush=True)


def measure(handle, seconds: float) -> array:
    """How long all calls together took, then how long each did, in seconds."""
    clock = time.perf_counter
    times, began = array("d", [0.0]), clock()
    last, until = began, began + seconds
    while last < until:
        handle.remote(b"").result()
        now = clock()
        times.append(now - last)
        last = now
    times[0] = last - began
    return times


if __name__ == "__main__":
    main()
