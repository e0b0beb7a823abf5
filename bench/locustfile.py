"""Users of the digits example, for Locust: `locust -f bench/locustfile.py --host http://127.0.0.1:8000`.

Start the application first (`rayserve-fast run --app-dir examples digits:app`). Each user sends scans of handwritten
digits as JSON, one after the other with a short pause, as a client of the real service would. A request fails when the
status is not 200 or the answer is no digit; the run fails (exit code 1) when fewer than nine in ten digits are right,
so that a fast but broken model does not pass. Needs `locust` and `scikit-learn` in its environment.
"""

from __future__ import annotations

import random
from typing import Any

from locust import HttpUser, between, events, task
from sklearn.datasets import load_digits

IMAGES, LABELS = load_digits(return_X_y=True)
RIGHT_SHARE = 0.9
answers = {"all": 0, "right": 0}


class Client(HttpUser):
    """Sends one image, waits 1 to 10 ms, sends the next."""

    host = "http://127.0.0.1:8000"
    wait_time = between(0.001, 0.01)

    @task
    def classify(self) -> None:
        """One POST of a random image."""
        chosen = random.randrange(len(IMAGES))
        with self.client.post("/", json=IMAGES[chosen].tolist(), name="digit", catch_response=True) as response:
            digit = answered_digit(response)
            if digit is None:
                response.failure(f"status {response.status_code}: {response.text[:80]!r}")
                return
            answers["all"] += 1
            answers["right"] += digit == LABELS[chosen]


def answered_digit(response: Any) -> int | None:
    """The digit of an answer, or None when there is none."""
    if response.status_code != 200:
        return None
    try:
        digit = response.json()["digit"]
    except (ValueError, KeyError, TypeError):
        return None
    return digit if isinstance(digit, int) and 0 <= digit <= 9 else None


@events.quitting.add_listener
def judge(environment: Any, **_: Any) -> None:
    """Fail the run when the model is wrong too often."""
    share = answers["right"] / max(1, answers["all"])
    print(f"{answers['right']} of {answers['all']} digits right ({share:.1%})")
    if share < RIGHT_SHARE:
        environment.process_exit_code = 1
