"""The control plane on a real Ray: deploy, redeploy under load, death, failure, delete."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from load import Load

from rayserve_fast import serve
from rayserve_fast.controlplane import client
from rayserve_fast.exceptions import RayServeException


def get(url: str, **kwargs: Any) -> tuple[int, str]:
    response = requests.get(url, timeout=30, **kwargs)
    return response.status_code, response.text


def code(version: str, name: str = "Code", **options: Any) -> Any:
    """An application that answers its version and its process."""

    @serve.deployment(name=name, **options)
    async def code(request: Any) -> str:
        return f"{version} {os.getpid()}"

    return code.bind()


def replica_states(app: str = "default") -> dict[str, int]:
    (deployment,) = serve.status().applications[app].deployments.values()
    return {state.value: n for state, n in deployment.replica_states.items() if n}


def actor_pid(name: str) -> int:
    actor = ray.get_actor(name, namespace="rayserve_fast")
    pid: int = ray.get(actor.__ray_call__.remote(lambda self: __import__("os").getpid()))
    return pid


def proxy_counters() -> dict[str, int]:
    (node,) = serve.status().proxies
    proxy = ray.get_actor(f"SERVE_PROXY_ACTOR-{node}", namespace="rayserve_fast")
    counters: dict[str, int] = ray.get(proxy.counters.remote())
    return counters


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.02)  # no event tells


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


def test_five_redeploys_under_500_requests_a_second_lose_none(serve_instance: str) -> None:
    strict = {"max_ongoing_requests": 100, "retry_idempotent": False}  # no retry may hide a lost request
    serve.run(code("v0", **strict))
    with Load(serve_instance, rate=500) as load:
        for n in range(1, 6):
            serve.run(code(f"v{n}", **strict))
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {f"v{n}" for n in range(6)}


def test_redeploys_that_rename_the_ingress_lose_none_of_500_requests_a_second(serve_instance: str) -> None:
    strict = {"max_ongoing_requests": 1, "retry_idempotent": False}  # most requests queue at the proxy
    serve.run(code("v0", "Code0", **strict))
    with Load(serve_instance, rate=500) as load:
        for n in range(1, 6):
            serve.run(code(f"v{n}", f"Code{n}", **strict))
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {f"v{n}" for n in range(6)}
    assert list(serve.status().applications["default"].deployments) == ["Code5"]


def test_what_queues_behind_a_long_request_of_a_renamed_ingress_does_not_wait_for_it(serve_instance: str) -> None:
    @serve.deployment(name="Old", max_ongoing_requests=1)
    async def old(request: Any) -> str:
        await asyncio.sleep(5)
        return "old"

    serve.run(old.bind())
    order: list[str] = []
    with ThreadPoolExecutor() as pool:
        for _ in range(3):
            pool.submit(lambda: order.append(get(serve_instance)[1].split()[0]))
        wait_for(lambda: proxy_counters()["requests_open"] == 3)
        serve.run(code("new", "New"))
    assert order == ["new", "new", "old"]


def test_a_failed_redeploy_that_renames_the_ingress_leaves_the_old_one_serving(serve_instance: str) -> None:
    @serve.deployment(name="New", max_constructor_retry_count=1)
    class Broken:
        def __init__(self) -> None:
            raise ValueError("broken")

    serve.run(code("old", "Old"))
    with Load(serve_instance, rate=100) as load:
        with pytest.raises(RuntimeError, match="broken"):
            serve.run(Broken.bind())
        serve.run(code("third", "Third"))
        before = load.total
        wait_for(lambda: load.total > before + 20)
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {"old", "third"}


def test_a_request_in_flight_finishes_on_the_old_code(serve_instance: str) -> None:
    @serve.deployment(name="Slow")
    async def slow(request: Any) -> str:
        await asyncio.sleep(3)
        return "old"

    serve.run(slow.bind())
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(get(serve_instance)))
    thread.start()
    wait_for(lambda: proxy_counters()["streams"] == 1)
    serve.run(code("new"))
    thread.join()
    assert answers == [(200, "old")]
    assert get(serve_instance)[1].startswith("new ")


def test_a_replica_that_fits_only_once_is_replaced_without_a_failed_request(serve_instance: str) -> None:
    options = {"ray_actor_options": {"num_cpus": int(ray.cluster_resources()["CPU"])}, "retry_idempotent": False}
    serve.run(code("v1", **options))
    with Load(serve_instance, rate=50) as load:
        serve.run(code("v2", **options))
    assert load.failures == {}
    assert {body.split()[0] for _, body in load.answers} == {"v1", "v2"}


def test_a_killed_replica_costs_no_get_request_and_is_replaced(serve_instance: str) -> None:
    serve.run(code("v1", num_replicas=2, max_ongoing_requests=100))
    with Load(serve_instance, rate=300) as load:
        while load.total < 300:
            time.sleep(0.05)
        victim = int(next(iter(load.answers))[1].split()[1])
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        while replica_states() != {"RUNNING": 1, "STARTING": 1}:
            assert time.monotonic() - killed < 1, "the replacement starts within a second"
        while replica_states() != {"RUNNING": 2}:
            assert time.monotonic() - killed < 20
            time.sleep(0.1)
        before = load.total
        while load.total < before + 300:
            time.sleep(0.05)
    assert load.failures == {}
    assert len({body for _, body in load.answers}) == 3
    assert serve.status().applications["default"].status == "RUNNING"


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

    with pytest.raises(RuntimeError, match=r"(?s)Deploying application default failed:.*in __init__.*no such weights"):
        serve.run(Bad.bind())
    assert tries.read_text() == "xxx"
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


def test_a_failed_redeploy_leaves_the_survivors_of_the_old_version_serving(serve_instance: str) -> None:
    @serve.deployment(name="Code", num_replicas=2)
    class Bad:
        def __init__(self) -> None:
            raise ValueError("broken release")

        async def __call__(self, request: Any) -> str:
            return "never"

    serve.run(code("v1", num_replicas=2))
    with Load(serve_instance, rate=100) as load, pytest.raises(RuntimeError, match="broken release"):
        serve.run(Bad.bind())
    assert load.failures == {}
    assert serve.status().applications["default"].status == "DEPLOY_FAILED"
    assert get(serve_instance)[1].startswith("v1 ")


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
        while not serve.status().applications:
            time.sleep(0.01)
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


def test_a_crashed_controller_finds_its_replicas_again(serve_instance: str) -> None:
    serve.run(code("v1", num_replicas=2))
    epoch = client.snapshot()
    with Load(serve_instance, rate=100) as load:
        os.kill(actor_pid("SERVE_CONTROLLER_ACTOR"), signal.SIGKILL)
        before = load.total
        while load.total < before + 100:
            time.sleep(0.05)
        states = replica_states()
        assert sum(states.values()) == 2
        assert states.keys() <= {"RECOVERING", "RUNNING"}
        assert client.snapshot() != epoch
        serve.run(code("v2", num_replicas=2))
    assert load.failures == {}
    pids = {body for _, body in load.answers if body.startswith("v1")}
    assert len(pids) == 2, "the old replicas were kept, not replaced"


def test_a_replica_that_dies_while_the_controller_is_down_is_replaced(serve_instance: str) -> None:
    serve.run(code("v1", num_replicas=2))
    with Load(serve_instance, rate=100) as load:
        while len(load.answers) < 2:
            time.sleep(0.05)
        dead, kept = (body for _, body in list(load.answers))
        os.kill(actor_pid("SERVE_CONTROLLER_ACTOR"), signal.SIGKILL)
        os.kill(int(dead.split()[1]), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while replica_states() != {"RUNNING": 2}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        before = load.answers.copy()
        while load.total < sum(before.values()) + 100:
            time.sleep(0.05)
        assert {body for _, body in load.answers - before} > {kept}
    assert load.failures == {}


def test_a_crashed_proxy_comes_back_on_its_port(serve_instance: str) -> None:
    serve.run(code("v1"))
    (node_id,) = serve.status().proxies
    os.kill(actor_pid(f"SERVE_PROXY_ACTOR-{node_id}"), signal.SIGKILL)
    deadline = time.monotonic() + 15
    while True:
        try:
            if get(serve_instance)[0] == 200:
                break
        except requests.ConnectionError:
            time.sleep(0.1)
        assert time.monotonic() < deadline
