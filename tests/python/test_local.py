"""Local testing mode where it is meant to differ from a cluster; what is the same is in `test_composition*.py`."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from deployed import wait_for
from fastapi import FastAPI
from ray import cloudpickle
from ray.exceptions import ActorDiedError

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException, RequestCancelledError
from rayserve_fast.handle import DeploymentHandle
from rayserve_fast.local import applications
from rayserve_fast.local.call import LocalHead


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    applications.shutdown()


def run(target: Any, **kwargs: Any) -> DeploymentHandle:
    return serve.run(target, _local_testing_mode=True, **kwargs)


def load() -> str:
    return "from the network"


seen: list[str] = []


@serve.deployment
class Model:
    def __init__(self) -> None:
        self.weights = load()

    def __call__(self) -> str:
        seen.append(self.weights)
        return self.weights

    def __del__(self) -> None:
        seen.append("deleted")


def test_it_needs_no_ray_and_starts_in_no_time(run_script: Any) -> None:
    outcome = run_script(
        """
import time
import ray
from rayserve_fast import serve

@serve.deployment
class Echo:
    async def __call__(self, x):
        return x

@serve.deployment
class Front:
    def __init__(self, echo):
        self.echo = echo
        assert echo.remote(0).result  # a constructor may call
    def __call__(self, x):
        return self.echo.remote(x).result()

handle = serve.run(Front.bind(Echo.bind()), _local_testing_mode=True)
assert handle.remote(1).result() == 1
serve.run(Echo.options(name="Other").bind(), name="other", _local_testing_mode=True)
assert serve.get_app_handle("other").remote(2).result() == 2
serve.shutdown()
assert not ray.is_initialized()
print("it ended")
""",
        timeout=60,
    )
    assert outcome.stdout == "it ended\n", outcome.stderr
    assert outcome.returncode == 0


def test_deployments_see_the_globals_and_patches_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "load", lambda: "patched")
    seen.clear()
    assert run(Model.bind()).remote().result(timeout_s=10) == "patched"
    assert seen == ["patched"]


def test_an_object_is_told_once_that_it_goes_and_its_class_stays_as_it_was() -> None:
    for _ in range(2):
        seen.clear()
        run(Model.bind())
        serve.delete("default")
        assert seen == ["deleted"]


def test_a_constructor_s_error_is_raised_as_it_is_and_the_old_version_serves_on() -> None:
    class Broken(Exception):
        pass

    @serve.deployment(name="Model")
    class Failing:
        def __init__(self, callee: Any = None) -> None:
            raise Broken("no weights")

    with pytest.raises(Broken, match="no weights"):
        run(Failing.bind())
    assert "default" not in applications
    handle = run(Model.bind())
    seen.clear()
    with pytest.raises(Broken):
        run(Failing.options(name="Ingress").bind(Model.bind()))
    assert seen == ["deleted"], "of the half of the new version that had been made"
    assert handle.remote().result(timeout_s=10) == "from the network"
    assert serve.get_app_handle("default").deployment_name == "Model"


def test_a_fastapi_ingress_starts_its_application_and_has_methods_to_call() -> None:
    from contextlib import asynccontextmanager

    events: list[str] = []

    def build() -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> Any:
            events.append("startup")
            yield
            events.append("shutdown")

        return FastAPI(lifespan=lifespan)

    @serve.deployment
    @serve.ingress(build)
    class Api:
        def __init__(self, model: DeploymentHandle) -> None:
            self.model = model

        async def predict(self) -> str:
            return await self.model.remote()

    assert run(Api.bind(Model.bind())).predict.remote().result(timeout_s=10) == "from the network"
    assert events == ["startup"]
    serve.delete("default")
    assert events == ["startup", "shutdown"]


def test_calls_that_wait_go_on_to_the_next_version() -> None:
    @serve.deployment(max_ongoing_requests=1)
    class Versioned:
        def __init__(self, version: int) -> None:
            self.version = version

        def __call__(self) -> int:
            if self.version == 1:
                release.wait(10)
            return self.version

    release = threading.Event()
    handle = run(Versioned.bind(1))
    running, waiting = handle.remote(), handle.remote()
    deploying = threading.Thread(target=run, args=(Versioned.bind(2),))
    deploying.start()
    assert waiting.result(timeout_s=10) == 2
    with pytest.raises(TimeoutError):
        running.result(timeout_s=0)
    release.set()
    assert running.result(timeout_s=10) == 1
    deploying.join(10)


def test_a_call_that_does_not_end_is_cut_off_when_its_deployment_goes() -> None:
    @serve.deployment(graceful_shutdown_timeout_s=0.1)
    class Stuck:
        def __call__(self) -> None:
            release.wait(30)

    release = threading.Event()
    response = run(Stuck.bind()).remote()
    serve.delete("default")
    with pytest.raises(ActorDiedError, match="Stuck"):
        response.result(timeout_s=10)
    release.set()


@pytest.mark.parametrize("for_ever", [float("inf"), 1e300])
def test_waits_that_nobody_outlives_have_no_end(for_ever: float) -> None:
    @serve.deployment(graceful_shutdown_timeout_s=for_ever)
    class Slow:
        def __call__(self) -> str:
            release.wait(30)
            return "done"

    release = threading.Event()
    response = run(Slow.bind()).remote()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(response.result, timeout_s=for_ever)
        deleted = pool.submit(serve.delete, "default")
        assert wait([answer, deleted], timeout=0.2).done == set()
        release.set()
        assert answer.result(10) == "done"
        deleted.result(10)


def test_what_was_called_for_a_call_that_is_cut_off_is_cancelled() -> None:
    """As on a cluster, where the links of the replica that ends break."""
    begun, ended = threading.Event(), threading.Event()

    @serve.deployment(graceful_shutdown_timeout_s=20)
    class Back:
        async def __call__(self) -> None:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

    @serve.deployment(graceful_shutdown_timeout_s=0.1)
    class Front:
        def __init__(self, back: DeploymentHandle) -> None:
            self.back = back

        async def __call__(self) -> None:
            await self.back.remote()

    response = run(Front.bind(Back.bind())).remote()
    assert begun.wait(10)
    began = time.monotonic()
    serve.delete("default")
    assert time.monotonic() - began < 10
    assert ended.is_set()
    with pytest.raises(ActorDiedError, match="Front"):
        response.result(timeout_s=10)


def test_the_environment_can_force_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_FORCE_LOCAL_TESTING_MODE", "1")
    assert serve.run(Model.bind()).remote().result(timeout_s=10) == "from the network"
    assert "default" in applications


def test_options_that_need_a_process_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        run(Model.options(ray_actor_options={"num_gpus": 1, "runtime_env": {"env_vars": {"A": "1"}}}).bind())
    told = sorted(record.getMessage() for record in caplog.records)
    assert [text.split("'")[3] for text in told] == ["num_gpus", "runtime_env"]


def test_a_handle_knows_its_application_after_pickling_and_finds_nothing_elsewhere(run_script: Any) -> None:
    handle = run(Model.bind())
    pickled = cloudpickle.dumps(handle)
    assert cloudpickle.loads(pickled).remote().result(timeout_s=10) == "from the network"
    outcome = run_script(
        f"""
import pickle
try:
    pickle.loads({pickled!r}).remote().result(timeout_s=10)
except Exception as error:
    print(type(error).__name__, error)
""",
        timeout=60,
    )
    assert outcome.stdout.startswith("DeploymentUnavailableError"), outcome.stderr


def test_user_code_that_ends_the_interpreter_fails_its_call_alone() -> None:
    @serve.deployment
    class Rude:
        async def leave(self) -> None:
            raise SystemExit(3)

        def leave_sync(self) -> None:
            raise KeyboardInterrupt

        async def stay(self) -> int:
            await asyncio.sleep(0)
            return 1

    handle = run(Rude.bind())
    for method in (handle.leave, handle.leave_sync):
        with pytest.raises(Exception, match=r"SystemExit|KeyboardInterrupt"):
            method.remote().result(timeout_s=10)
    assert handle.stay.remote().result(timeout_s=10) == 1


def test_calls_cancelled_at_random_moments_leave_nothing_behind() -> None:
    @serve.deployment(max_ongoing_requests=8)
    class Back:
        async def wait(self, seconds: float) -> float:
            await asyncio.sleep(seconds)
            return seconds

        def wait_sync(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

        async def items(self, seconds: float) -> AsyncIterator[float]:
            for _ in range(3):
                await asyncio.sleep(seconds / 3)
                yield seconds

    @serve.deployment(max_ongoing_requests=12)
    class Front:
        def __init__(self, back: DeploymentHandle) -> None:
            self.back = back

        async def wait(self, seconds: float) -> float:
            return await self.back.wait.remote(seconds)

        def wait_sync(self, seconds: float) -> float:
            return self.back.wait_sync.remote(seconds).result()

        async def items(self, seconds: float) -> AsyncIterator[float]:
            async for item in self.back.options(stream=True).items.remote(seconds):
                yield item

    handle = run(Front.bind(Back.bind()))
    calls: list[Callable[[float], Any]] = [
        handle.wait.remote,
        handle.wait_sync.remote,
        handle.options(stream=True).items.remote,
    ]

    def storm(seed: int) -> tuple[int, int]:
        dice, answered, cancelled = random.Random(seed), 0, 0
        for _ in range(250):
            call, seconds = dice.choice(calls), dice.random() * 0.003
            response = call(seconds)
            if dice.random() < 0.7:
                time.sleep(dice.random() * 0.002)
                response.cancel()
            try:
                if call is calls[2]:
                    assert list(response) == [seconds] * 3
                else:
                    assert response.result(timeout_s=30) == seconds
                answered += 1
            except RequestCancelledError:
                cancelled += 1
        return answered, cancelled

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(storm, range(8)))
    assert sum(map(sum, outcomes)) == 2000
    assert min(min(each) for each in outcomes) > 0, "both happen"
    replicas = list(applications._replicas.values())
    assert len(replicas) == 2
    wait_for(lambda: not any(replica._running or replica._waiting for replica in replicas), 10)


def test_an_argument_that_comes_while_another_one_fails_sends_nothing_off() -> None:
    fails, comes = (LocalHead("default#Front", "call", ("", "", "", ""), False) for _ in range(2))

    class Call(LocalHead):
        def finish(self, *outcome: Any) -> bool:
            comes.finish("value", b"", ())  # as another thread would, just before
            return super().finish(*outcome)

    call = Call("default#Back", "call", ("", "", "", ""), False)
    applications._route_with(call, [(0, fails), (1, comes)])
    fails.finish("fault", 2, b"")
    assert call.outcome == ("argument", 0)
    assert not call.relayed


def test_a_call_that_was_cancelled_on_its_way_to_a_method_that_does_not_exist_is_let_go_of() -> None:
    run(Model.bind())
    call = LocalHead("default#Model", "nothing", ("", "", "", ""), False)
    call.cancel()
    routing = threading.Thread(target=applications._route, args=(call,), daemon=True)
    routing.start()
    routing.join(10)
    assert not routing.is_alive()


def test_what_needs_ray_or_several_replicas_is_refused() -> None:
    handle = run(Model.bind())
    response = handle.remote()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="local testing mode"):
            response._to_object_ref_sync()
        assert response.result(timeout_s=10) == "from the network"

    async def choose() -> None:
        async with handle.choose_replica():
            pass

    with pytest.raises(RayServeException, match="local testing mode"):
        asyncio.run(choose())
