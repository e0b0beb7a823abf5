"""A scikit-learn classifier behind HTTP: send an 8x8 image, get the digit.

Start it with `rayserve-fast run --app-dir examples digits:app`, or see `make demo`, which also sends it real images.
The model is trained when the replica starts, on the digits that ship with scikit-learn (1,797 scans of handwriting);
a fixed share of them is held out, so that a client can send images which the model has not seen.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from rayserve_fast import serve


def digits() -> tuple[Any, Any, Any, Any]:
    """Training images, held-out images, training labels, held-out labels; the same split in every process."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    return tuple(train_test_split(images, labels, test_size=0.3, random_state=0))


@serve.deployment
class Classifier:
    """One model per replica; the 64 grey values of an image come as a JSON list."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, _, labels, _ = digits()
        self.model = SVC(gamma=0.001).fit(images, labels)

    async def __call__(self, request: Request) -> dict[str, int]:
        image = await request.json()
        return {"digit": int(self.model.predict([image])[0])}


app = Classifier.bind()
