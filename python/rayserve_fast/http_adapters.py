"""What `ray.serve.http_adapters` had: functions that make a graph's input of an HTTP request.

Give one to `DAGDriver.bind(graph, http_adapter=json_request)`; each is a dependency for FastAPI too, and a plain
function for tests. NumPy, pandas and Pillow are imported by those that need them.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import File
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "NdArray",
    "image_to_ndarray",
    "json_request",
    "json_to_multi_ndarray",
    "json_to_ndarray",
    "pandas_read_json",
    "starlette_request",
]


class NdArray(BaseModel):
    """An array as JSON.

    >>> NdArray(array=[1, 2, 3, 4], shape=[2, 2], dtype="float32").shape
    [2, 2]
    """

    array: list[Any] = Field(description="Numbers, nested as deep as the array has dimensions, or flat with `shape`.")
    shape: list[int] | None = Field(default=None, description="The shape; None: as the numbers are nested.")
    dtype: str | None = Field(default=None, description="The NumPy type; None: NumPy chooses.")


async def starlette_request(request: Request) -> Request:
    """The request itself, with its body, so that it can be sent on to other deployments."""
    await request.body()
    return request


async def json_request(request: Request) -> Any:
    """The value of a JSON body; a body that is no JSON is answered 400."""
    try:
        return await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"The body is no JSON: {error}") from error


def json_to_ndarray(payload: NdArray) -> np.ndarray[Any, Any]:
    """The array of a JSON body with the fields of `NdArray`.

    >>> json_to_ndarray(NdArray(array=[1, 2, 3, 4], shape=[2, 2])).tolist()
    [[1, 2], [3, 4]]
    """
    import numpy as np

    array: np.ndarray[Any, Any] = np.array(payload.array, dtype=payload.dtype)
    return array if payload.shape is None else array.reshape(payload.shape)


def json_to_multi_ndarray(payload: dict[str, NdArray]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a JSON body, an object whose values have the fields of `NdArray`."""
    return {name: json_to_ndarray(array) for name, array in payload.items()}


def image_to_ndarray(img: Annotated[bytes, File()]) -> np.ndarray[Any, Any]:
    """The pixels of an image that was uploaded as the file `img` of a form: height x width (x channels)."""
    import numpy as np
    from PIL import Image

    pixels: np.ndarray[Any, Any] = np.array(Image.open(io.BytesIO(img)))
    return pixels


async def pandas_read_json(raw_request: Request) -> pd.DataFrame:
    """The table that `pandas.read_json` makes of the body; query parameters are its keyword arguments."""
    import pandas as pd

    body = (await raw_request.body()).decode()
    return pd.read_json(io.StringIO(body), **dict(raw_request.query_params))
