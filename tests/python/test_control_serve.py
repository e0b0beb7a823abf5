"""The control plane on a real Ray: deploy, status, failure, environment, names, delete."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from deployed import code, get, proxy_counters, wait_for

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException


def test_run_returns_when_the_application_answers(serve_instance: str) -> None:
    serve.run(code("v1"))
    assert get(serve_instance)[0] == 200
    status = serve.status()
    app = status.applications["default"]
    assert app.status == "RUNNING"
    assert app.deployments["Code"].status == "HEALTHY"
    assert app.deployments["Code"].status_trigger == "CONFIG_UPDATE_COMPLETED"
    assert list(status.proxies.values()) == ["HEALTHY"]


def test_applications_live_side_by_side_and_prefixes_do_not_clash(serve_instance: str) -> None:
    serve.run_many([serve.RunTarget(code("a"), "a", "/a"), serve.RunTarget(code("b"), "b", "/b")])
    assert get(f"{serve_instance}/a")[1].startswith("a ")
    assert get(f"{serve_instance}/b/c")[1].startswith("b ")
    assert get(f"{serve_instance}/c")[0] == 404
    with pytest.raises(RayServeException, match='Prefix /a is being used by application "a"'):
        serve.run(code("c"), name="c", route_prefix="/a")
    serve.delete("a")
    assert get(f"{serve_instance}/a")[0] == 404
    assert get(f"{serve_instance}/b")[0] == 200


def test_a_constructor_that_fails_is_retried_and_then_told_with_its_traceback(
    serve_instance: str, tmp_path: Path
) -> None:
    tries = tmp_path / "tries"

    @serve.deployment
    class Bad:
        def __init__(self) -> None:
            with open(tries, "a") as f:
                f.write("x")
            raise ValueError("no such weights")

        async def __call__(self, request: Any) -> str:
            return "never"

    told = r"(?s)Deploying application default failed:.*in __init__.*no such weights"
    with pytest.raises(RuntimeError, match=told) as failed:
        serve.run(Bad.bind())
    assert tries.read_text() == "xxx"
    assert str(failed.value).count("  File ") == 1, "only the user's frames"
    app = serve.status().applications["default"]
    assert app.status == "DEPLOY_FAILED"
    assert app.deployments["Bad"].status_trigger == "REPLICA_STARTUP_FAILED"
    assert "no such weights" in app.deployments["Bad"].message
    status, text = get(serve_instance)
    assert status == 503
    assert "failed to deploy" in text
    serve.run(code("fixed"))
    assert get(serve_instance)[0] == 200


@pytest.mark.parametrize(("end", "told"), [(sys.exit, "SystemExit"), (os._exit, "died unexpectedly")])
def test_a_constructor_that_ends_the_process_is_a_failed_start(serve_instance: str, end: Any, told: str) -> None:
    @serve.deployment(max_constructor_retry_count=1)
    class Ends:
        def __init__(self) -> None:
            end(3)

        async def __call__(self, request: Any) -> str:
            return "never"

    with pytest.raises(RuntimeError, match=told):
        serve.run(Ends.bind())


def test_deploying_while_the_same_name_is_being_deleted_starts_anew(serve_instance: str) -> None:
    serve.run(code("v1"))
    serve.delete("default", _blocking=False)
    serve.run(code("v2"))
    assert get(serve_instance)[1].startswith("v2 ")


def test_run_many_tells_which_application_failed_and_the_others_serve(serve_instance: str) -> None:
    @serve.deployment(max_constructor_retry_count=1)
    class Bad:
        def __init__(self) -> None:
            raise ValueError("bad one")

        async def __call__(self, request: Any) -> str:
            return "never"

    with pytest.raises(RuntimeError, match=r"(?s)Deploying application b failed: .*\['Bad'\].*bad one"):
        serve.run_many([serve.RunTarget(code("a"), "a", "/a"), serve.RunTarget(Bad.bind(), "b", "/b")])
    assert get(f"{serve_instance}/a")[0] == 200


def test_options_that_ray_refuses_fail_the_deployment(serve_instance: str) -> None:
    with pytest.raises(RuntimeError, match="no_such_directory"):
        serve.run(code("v1", ray_actor_options={"runtime_env": {"working_dir": "/no_such_directory"}}))


def test_requests_wait_while_the_application_starts(serve_instance: str) -> None:
    @serve.deployment
    class Slow:
        def __init__(self) -> None:
            time.sleep(2)

        async def __call__(self, request: Any) -> str:
            return "at last"

    answers: list[tuple[int, str]] = []

    def ask() -> None:
        wait_for(lambda: serve.status().applications)
        answers.extend(get(serve_instance) for _ in range(2))

    thread = threading.Thread(target=ask)
    thread.start()
    serve.run(Slow.bind())
    thread.join()
    assert answers == [(200, "at last")] * 2


def test_user_config_reaches_the_user(serve_instance: str) -> None:
    @serve.deployment(user_config={"answer": 42})
    class Configured:
        def reconfigure(self, config: dict[str, int]) -> None:
            self.answer = config["answer"]

        async def __call__(self, request: Any) -> str:
            return str(self.answer)

    serve.run(Configured.bind())
    assert get(serve_instance) == (200, "42")


def runs(pid: str) -> bool:
    """Whether the process has not ended; that its parent has not asked for its status yet is Ray's business."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_delete_lets_requests_finish_and_leaves_no_process(serve_instance: str) -> None:
    @serve.deployment
    async def slow(request: Any) -> str:
        await asyncio.sleep(2)
        return str(os.getpid())

    serve.run(slow.bind())
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(get(serve_instance)))
    thread.start()
    wait_for(lambda: proxy_counters()["streams"] == 1)
    serve.delete("default")
    thread.join()
    assert answers[0][0] == 200
    assert not runs(answers[0][1])
    assert get(serve_instance)[0] == 404
    assert serve.status().applications == {}


def test_a_second_driver_deploys_its_own_code_under_the_same_module_name(serve_instance: str, tmp_path: Path) -> None:
    script = (
        "import sys, ray\n"
        "ray.init(address=sys.argv[1])\n"
        "from rayserve_fast import serve\n"
        "import model\n"
        "serve.run(model.app, name=sys.argv[2], route_prefix='/' + sys.argv[2])\n"
    )
    address = ray.get_runtime_context().gcs_address
    for name in ("one", "two"):
        home = tmp_path / name
        home.mkdir()
        (home / "weights.txt").write_text(f"weights of {name}")
        (home / "helper.py").write_text(f"NAME = {name!r}\n")
        (home / "model.py").write_text(
            "from rayserve_fast import serve\n"
            "import helper\n"
            "@serve.deployment\n"
            "async def model(request):\n"
            "    return helper.NAME + ': ' + open('weights.txt').read()\n"
            "app = model.bind()\n"
        )
        (home / "main.py").write_text(script)
        subprocess.run([sys.executable, "main.py", address, name], cwd=home, check=True, timeout=60)
    for name in ("one", "two"):
        assert get(f"{serve_instance}/{name}") == (200, f"{name}: weights of {name}")


def test_runtime_env_of_a_deployment_is_set_in_its_replicas(serve_instance: str) -> None:
    @serve.deployment(ray_actor_options={"runtime_env": {"env_vars": {"COLOUR": "green"}}})
    async def colour(request: Any) -> str:
        return os.environ["COLOUR"]

    serve.run(colour.bind())
    assert get(serve_instance) == (200, "green")


def test_handles_by_name(serve_instance: str) -> None:
    serve.run(code("v1"))
    assert serve.get_app_handle("default").deployment_name == "Code"
    assert serve.get_deployment_handle("Code", "default").app_name == "default"
    with pytest.raises(RayServeException, match="'other' does not exist"):
        serve.get_app_handle("other")
    with pytest.raises(KeyError):
        serve.get_deployment_handle("Other", "default")
    with pytest.raises(RayServeException, match="specify an application name"):
        serve.get_deployment_handle("Code")
