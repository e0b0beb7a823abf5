"""The weak case of a batcher that seals batches while it cannot run them: `serve.batch` here and in Ray Serve.

    python -m bench.batch_load                                           # both, from the environments of the benchmark
    python -m bench.batch_load --python rayserve-fast=.venv/bin/python   # this one only, from an environment at hand

The model of `traffic.py` takes 20 ms and 0.5 ms for each item, and its batches wait 10 ms: at 200 requests a second
those that are sealed after each window hold two or three and take 21 ms, so that a queue of them grows without end.
The work `model` of the benchmark is the same at 80 % of what full batches can do; both rates are measured here, by
Poisson arrivals that do not wait for answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import envs, load, open_loop, peers
from bench.traffic import MODEL_RATE, TURN_S

RATES = (200.0, MODEL_RATE)
#: What the latency of 99 % must not exceed.
BOUND_US = 2e6 * TURN_S


def measure(name: str, python: Path, seconds: float) -> None:
    """Print a line for each rate."""
    peer = peers.BY_NAME[name]
    peers.FOLDER.mkdir(parents=True, exist_ok=True)
    port = peers.free_port()
    with peers.serving(peer, python, ["model"], port, peers.FOLDER / f"batch-load-{name}.log"):
        url, body = f"http://127.0.0.1:{port}/model", b'{"record":1}'
        load.wait_for(url, body, body, "application/json")
        for rate in RATES:
            result = load.steady(url, rate, seconds, body, "application/json")
            verdict = "within" if result["p99_us"] <= BOUND_US else "beyond"
            print(
                f"{peer.title}, {rate:.0f} requests/s: p50 {result['p50_us'] / 1e3:.0f} ms, "
                f"p99 {result['p99_us'] / 1e3:.0f} ms ({verdict} {BOUND_US / 1e3:.0f} ms), "
                f"{result['errors']['status']} refused, "
                f"{result['errors']['timeout']} given up after {open_loop.GIVE_UP_S:.0f} s",
                flush=True,
            )


def main() -> None:
    """Measure the peers that were named, else both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="at each rate")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="measure only such peers")
    options = parser.parse_args()
    given = {name: Path(path).absolute() for name, _, path in (entry.partition("=") for entry in options.python)}
    for name in given or ("rayserve-fast", "ray-serve"):
        python = given.get(name) or envs.prepare(peers.BY_NAME[name].environment)
        measure(name, python, options.seconds)


if __name__ == "__main__":
    main()
