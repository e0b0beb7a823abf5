"""The examples of README and docs run, in the order in which a reader meets them, and answer what the text says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from deployed import wait_for

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


def test_getting_started_runs_from_top_to_bottom(serve_instance: str) -> None:
    run_python_blocks("docs/getting-started.md")
    assert requests.get(serve_instance, params={"name": "Corey"}, timeout=10).text == '{"message":"Hello Corey"}'
    greeting = requests.get(f"{serve_instance}/v1/greet/Corey", timeout=10)
    assert greeting.json() == {"message": "Hello Corey"}
    assert "/v1/openapi.json" in requests.get(f"{serve_instance}/v1/docs", timeout=10).text


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_the_older_example_of_the_migration_page_answers_as_todays_does(serve_instance: str) -> None:
    from rayserve_fast import serve

    run_python_blocks("docs/migration.md")
    for path in ("greet", "greet-today"):
        assert requests.get(f"{serve_instance}/{path}", timeout=10).text == "hello stranger"
        assert requests.get(f"{serve_instance}/{path}?name=ada", timeout=10).text == "hello ada"
    serve.connect()


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
        wait_for(lambda: slow.count.remote().result(timeout_s=10) == 1, 10)  # what the cancelled call had called

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


@pytest.mark.timeout(300)
def test_traffic_runs_from_top_to_bottom(serve_instance: str, capfd: pytest.CaptureFixture[str]) -> None:
    from rayserve_fast import serve

    def answers(path: str, **kwargs: Any) -> Counter[str]:
        with requests.Session() as session:
            return Counter(session.get(f"{serve_instance}{path}", timeout=10, **kwargs).text for _ in range(20))

    def split() -> None:
        assert answers("/greet") == {"blue": 18, "green": 2}

    def alone() -> None:
        assert answers("/red") == {"red": 20}

    def sticky() -> None:
        assert len(answers("/greet", headers={"x-user": "ada"})) == 1

    def ruled() -> None:
        assert answers("/greet", headers={"x-canary": "1"}) == answers("/greet", cookies={"beta": "x"}) == {"green": 20}

    def shadowed() -> None:
        assert answers("/greet") == {"blue": 20}

    def told() -> None:
        assert "blue: weight 1.0, " in (said := capfd.readouterr().out)
        assert "\n10 copies\n" in said

    def rolling() -> None:
        assert "0.05\n" in capfd.readouterr().out

    def aborted() -> None:
        assert serve.get_traffic("/greet").rollout == "ABORTED"

    checks = iter([split, alone, sticky, ruled, shadowed, told, rolling, aborted])
    run_python_blocks("docs/traffic.md", lambda: next(checks)())
    assert not list(checks)


def test_batching_runs_from_top_to_bottom(serve_instance: str) -> None:
    run_python_blocks("docs/batching.md")
    answer = requests.post(f"{serve_instance}/lengths", json={"text": "four"}, timeout=10)
    assert answer.json() == {"length": 4}
    assert requests.post(serve_instance, json=21, timeout=10).json() == 42


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_classic_runs_from_top_to_bottom(serve_instance: str) -> None:
    run_python_blocks("docs/classic.md")
    assert requests.get(f"{serve_instance}/Greeter?name=Corey", timeout=10).text == "Good morning Corey"
    assert requests.get(f"{serve_instance}/evening?name=Corey", timeout=10).status_code == 404  # deleted in the end
    answer = requests.post(f"{serve_instance}/graph", json={"text": "to be", "bias": 1}, timeout=10)
    assert (answer.text, answer.headers["content-type"]) == ("23.0", "application/json")
