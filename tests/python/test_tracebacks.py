"""Tracebacks begin where the user's code does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayserve_fast.importing import import_attr
from rayserve_fast.tracebacks import format_error


def error_of(function: Callable[..., Any], *args: Any) -> BaseException:
    """What a call raises, with the frames of the thread pool that has made it."""
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(function, *args).exception(timeout=10)
    assert error is not None
    return error


def files(error: BaseException) -> list[str]:
    lines = [line for line in format_error(error).splitlines() if line.startswith("  File ")]
    return [line.split('"')[1].rpartition("/")[2] for line in lines]


def test_frames_before_the_user_s_are_left_out_and_those_below_stay() -> None:
    async def handler() -> None:
        json.loads("{")

    error = error_of(asyncio.run, handler())
    assert files(error)[0] == "test_tracebacks.py"
    assert files(error)[-1] == "decoder.py"
    assert "asyncio" not in format_error(error)
    assert format_error(error).startswith("Traceback (most recent call last):\n")


def test_an_error_that_never_reached_the_user_s_code_keeps_all_frames() -> None:
    error = error_of(import_attr, "no_such_module:x")
    assert files(error)[:2] == ["thread.py", "importing.py"]


def test_an_installed_library_counts_as_the_user_s_code() -> None:
    from starlette.routing import Router

    error = error_of(Router().url_path_for, "nowhere")
    assert files(error) == ["routing.py"]
