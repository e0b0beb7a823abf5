"""The examples of README and docs run, in the order in which a reader meets them, and answer what the text says."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).parents[2]


def run_python_blocks(document: str, after_each: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Execute every Python block of a document in one namespace, which is returned."""
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
        exec(compile(block, document, "exec"), namespace)
        after_each()
    return namespace


def test_readme_example_answers_as_shown(serve_instance: str) -> None:
    from rayserve_fast import serve

    serve.run(run_python_blocks("README.md")["app"])
    assert requests.get(serve_instance, params={"name": "Corey"}, timeout=10).text == '{"message":"Hello Corey"}'


def test_batching_runs_from_top_to_bottom(serve_instance: str) -> None:
    run_python_blocks("docs/batching.md")
    assert requests.post(serve_instance, json=21, timeout=10).json() == 42


def test_getting_started_runs_from_top_to_bottom(serve_instance: str) -> None:
    run_python_blocks("docs/getting-started.md")
    assert requests.get(serve_instance, params={"name": "Corey"}, timeout=10).text == '{"message":"Hello Corey"}'
    greeting = requests.get(f"{serve_instance}/v1/greet/Corey", timeout=10)
    assert greeting.json() == {"message": "Hello Corey"}
    assert "/v1/openapi.json" in requests.get(f"{serve_instance}/v1/docs", timeout=10).text


def test_links_between_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.timeout(300)
def test_composition_runs_from_top_to_bottom(serve_instance: str, capfd: pytest.CaptureFixture[str]) -> None:
    from rayserve_fast import serve

    def streamed() -> None:
        story = requests.get(f"{serve_instance}/stories/story", params={"count": 100}, timeout=10)
        assert story.text == "".join(f"word{i} " for i in range(100))

    def cancelled() -> None:
        slow = serve.get_deployment_handle("Slow", "waiting")
        deadline = time.monotonic() + 10
        while slow.count.remote().result(timeout_s=10) != 1:  # what the cancelled call had called
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def multiplexed() -> None:
        french = requests.get(f"{serve_instance}/models", headers={"serve_multiplexed_model_id": "fr"}, timeout=10)
        assert french.text == "weights of fr"

    checks = {"stories": streamed, "waiting": cancelled, "models": multiplexed}

    def check_and_delete() -> None:  # one page has more deployments than the session's Ray has CPUs
        for name in serve.status().applications:
            checks.pop(name, lambda: None)()
            serve.delete(name)

    run_python_blocks("docs/composition.md", check_and_delete)
    assert not checks
    assert "cancelled\n" in capfd.readouterr().out
