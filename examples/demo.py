"""What `make demo` runs: serve `digits.py` on a local Ray, send it every held-out image, show what comes back.

It picks a free port, so it works beside anything; when it ends, Serve, Ray and all their processes are gone.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import statistics
import time
from collections.abc import Iterable
from typing import Any

import ray

import digits
from rayserve_fast import serve

SHOWN = 4  # images that are drawn
GREYS = " .:-=+*#%@"


def main() -> None:
    logging.disable(logging.WARNING)
    print("Starting a local Ray, training a classifier in a replica ...", flush=True)
    began = time.perf_counter()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": (port := free_port())})
        serve.run(digits.app)
        print(f"Ready after {time.perf_counter() - began:.1f} s at http://127.0.0.1:{port}/\n")
        _, images, _, truth = digits.digits()
        show(images, truth, *classify(port, images))
    finally:
        serve.shutdown()
        ray.shutdown()
    print("Serve and Ray are shut down.")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def classify(port: int, images: Any) -> tuple[list[int], list[float]]:
    """The digit that the server sees in each image, and the seconds that each request took."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    answers, seconds = [], []
    for image in images:
        body = json.dumps(image.tolist())
        began = time.perf_counter()
        connection.request("POST", "/", body, {"content-type": "application/json"})
        response = connection.getresponse()
        payload = response.read()
        seconds.append(time.perf_counter() - began)
        if response.status != 200:
            raise SystemExit(f"the server answered {response.status}: {payload.decode()}")
        answers.append(json.loads(payload)["digit"])
    connection.close()
    return answers, seconds


def show(images: Any, truth: Any, answers: list[int], seconds: list[float]) -> None:
    def line(label: str, cells: Iterable[str]) -> None:
        print(f"{label:<10}" + "  ".join(f"{cell:^16}" for cell in cells))

    for row in range(8):
        pixels = (image.reshape(8, 8)[row] for image in images[:SHOWN])
        line(
            "image" if row == 0 else "",
            ("".join(2 * GREYS[int(grey * 9 / 16)] for grey in grey_row) for grey_row in pixels),
        )
    line("predicted", map(str, answers[:SHOWN]))
    line("truth", map(str, truth[:SHOWN]))
    line("latency", (f"{1e3 * s:.2f} ms" for s in seconds[:SHOWN]))

    right = sum(answer == digit for answer, digit in zip(answers, truth, strict=True))
    ordered = sorted(seconds)
    print(
        f"\n{len(answers)} images that the model had not seen: {right} right ({right / len(answers):.1%}). "
        f"Latency, one request after the other: median {1e3 * statistics.median(ordered):.2f} ms, "
        f"99 % within {1e3 * ordered[int(0.99 * len(ordered))]:.2f} ms."
    )


if __name__ == "__main__":
    main()
