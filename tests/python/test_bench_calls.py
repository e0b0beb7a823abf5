"""The benchmark's compositions on the real thing: the calls that it counts are made, and answer what they should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import calls, driver, load, works

from rayserve_fast import serve


@pytest.mark.parametrize("name", ["calls", "array", "array_ref", "items", "chain"])
def test_a_caller_measures_calls_whose_answer_is_right(serve_instance: str, name: str) -> None:
    url, work = deployed(serve_instance, name), works.BY_NAME[name]
    load.wait_for(url, work.answer)
    result = load.inside(url, callers=4, seconds=0.2)
    assert result["requests"] >= 4
    assert result["seconds"] >= 0.2
    assert 0 < result["p50_us"] <= result["max_us"] <= result["seconds"] * 1e6


@pytest.mark.parametrize("name", ["fastapi_call", "events"])
def test_a_route_answers_what_its_callee_gave(serve_instance: str, name: str) -> None:
    load.wait_for(deployed(serve_instance, name), works.BY_NAME[name].answer)


def test_a_driver_script_measures_its_calls(serve_instance: str) -> None:
    deployed(serve_instance, "driver")
    result = load.from_times(driver.measure(serve.get_app_handle("driven"), 0.2).tobytes())
    assert result["requests"] > 1
    assert sum(result[name] > 0 for name in ("p50_us", "rps")) == 2


def deployed(base: str, name: str) -> str:
    """The URL of a work whose application runs now."""
    work = works.BY_NAME[name]
    serve.run(calls.applications(serve)[work.app], name=work.app, route_prefix=f"/{work.app}")
    return f"{base}/{work.app}{work.path}"
