"""Model composition as a user writes it, on real replicas and in local testing mode, with the same answers."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from composed import Model, Refused, Run
from deployed import wait_for

from rayserve_fast import serve
from rayserve_fast.context import _get_serve_request_context
from rayserve_fast.exceptions import BackPressureError, RayServeException, RequestCancelledError
from rayserve_fast.handle import DeploymentHandle


@dataclass
class Stages:
    """What some users bind instead of bare handles."""

    by_name: dict[str, Any]
    all: list[Any]


@serve.deployment(max_ongoing_requests=20)
class Front:
    def __init__(self, model: DeploymentHandle, stages: Stages | None = None) -> None:
        self.model, self.stages = model, stages

    async def __call__(self, value: Any) -> Any:
        return await self.model.remote(value)

    def blocking(self, value: Any) -> Any:
        return self.model.sync.remote(value).result()

    async def wrong(self) -> Any:
        return self.model.remote(1).result()

    async def fan_out(self, n: int) -> int:
        return sum(await asyncio.gather(*(self.model.remote(i) for i in range(n))))

    async def chain(self, value: Any) -> Any:
        assert self.stages is not None
        for name in sorted(self.stages.by_name):
            value = await self.stages.by_name[name].remote(value)
        return value, [await stage.remote(1) for stage in self.stages.all]

    async def hang_many(self, n: int) -> None:
        await asyncio.gather(*(self.model.hang.remote() for _ in range(n)))

    def hang_sync(self) -> None:
        self.model.hang.remote().result()

    async def contexts(self) -> tuple[str, dict[str, Any]]:
        child: dict[str, Any] = await self.model.options(multiplexed_model_id="m1", session_id="s1").context.remote()
        return _get_serve_request_context().request_id, child

    async def by_name(self, value: Any) -> Any:
        return await serve.get_deployment_handle("Model").remote(value)


def test_calls_from_scripts_loops_and_threads(run: Run) -> None:
    handle = run(Front.bind(Model.bind()))
    assert handle.remote(4).result(timeout_s=20) == 8
    assert handle.blocking.remote(5).result(timeout_s=20) == 10

    async def main() -> Any:
        return await asyncio.gather(*(handle.remote(i) for i in range(50)))

    assert asyncio.run(main()) == [2 * i for i in range(50)]
    with pytest.raises(RuntimeError, match="Use `await response` instead"):
        handle.wrong.remote().result(timeout_s=20)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda i=i: answers.append(handle.remote(i).result())) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [2 * i for i in range(8)]


def test_a_response_answers_as_often_as_it_is_asked(run: Run) -> None:
    handle = run(Model.bind())
    response = handle.remote([1])
    assert response.result(timeout_s=20) is response.result()

    async def main() -> tuple[Any, Any]:
        response = handle.remote(2)
        return await response, await response

    assert asyncio.run(main()) == (4, 4)
    failed = handle.fail.remote()
    for _ in range(2):
        with pytest.raises(Refused):
            failed.result(timeout_s=20)


def test_handles_are_found_in_whatever_was_bound(run: Run) -> None:
    add, times = Model.options(name="Second").bind(3), Model.options(name="Third").bind(5)
    handle = run(Front.bind(Model.bind(), stages=Stages({"a": add, "b": times}, [add, [times][0]])))
    assert handle.chain.remote(1).result(timeout_s=20) == (15, [3, 5])


def test_one_deployment_calls_many_times_at_once(run: Run) -> None:
    assert run(Front.bind(Model.bind())).fan_out.remote(32).result(timeout_s=20) == sum(2 * i for i in range(32))


def test_five_deployments_in_a_chain(run: Run) -> None:
    app = Model.bind()
    for i in range(4):
        app = Front.options(name=f"Front{i}").bind(app)
    handle = run(app)
    assert [r.result(timeout_s=20) for r in [handle.remote(i) for i in range(64)]] == [2 * i for i in range(64)]


def test_a_deployment_calls_itself(run: Run) -> None:
    @serve.deployment(max_ongoing_requests=50)
    class Factorial:
        async def __call__(self, n: int) -> int:
            if n < 2:
                return 1
            return n * await serve.get_deployment_handle("Factorial").remote(n - 1)

    assert run(Factorial.bind()).remote(20).result(timeout_s=20) == 2432902008176640000


def test_cancelling_reaches_the_coroutine_and_gives_the_slot_back(run: Run) -> None:
    handle = run(Model.options(max_ongoing_requests=2).bind())
    running = [handle.hang.remote() for _ in range(2)]
    queued, never = handle.remote(1), handle.hang.remote()
    with pytest.raises(TimeoutError):
        queued.result(timeout_s=0.2)
    never.cancel()
    for response in running:
        response.cancel()
        with pytest.raises(RequestCancelledError):
            response.result(timeout_s=20)
        assert response.cancelled()
    assert queued.result(timeout_s=20) == 2
    wait_for(lambda: handle.cancellations.remote().result(timeout_s=20) == 2, 10)


@pytest.mark.parametrize(("method", "args", "calls"), [("hang_many", (5,), 5), ("hang_sync", (), 1)])
def test_cancelling_reaches_what_was_called_on_behalf_of_the_call(
    run: Run, method: str, args: tuple[int, ...], calls: int
) -> None:
    handle = run(Front.bind(Model.bind()))
    model = serve.get_deployment_handle("Model", "default")
    response = handle.options(method_name=method).remote(*args)
    wait_for(lambda: model.hanging.remote().result(timeout_s=20) == calls, 10)
    response.cancel()
    with pytest.raises(RequestCancelledError):
        response.result(timeout_s=20)
    wait_for(lambda: model.cancellations.remote().result(timeout_s=20) == calls, 10)


def test_a_full_queue_is_back_pressure(run: Run) -> None:
    handle = run(Model.options(max_ongoing_requests=1, max_queued_requests=2).bind())
    handle.remote(1).result(timeout_s=20)
    first, second, third = (handle.hang.remote() for _ in range(3))
    with pytest.raises(BackPressureError, match=r"num_queued_requests=2, max_queued_requests=2"):
        handle.remote(1).result(timeout_s=20)
    for response in (third, second, first):
        response.cancel()
    assert handle.remote(1).result(timeout_s=20) == 2


def test_contexts_are_those_of_the_request_and_of_the_replica(run: Run) -> None:
    handle = run(Front.bind(Model.bind()), name="app", route_prefix=None)
    response = handle.contexts.remote()
    own, child = response.result(timeout_s=20)
    assert own == response.request_id
    assert child == {
        "request_id": own,
        "in_thread": own,
        "app_name": "app",
        "model": "m1",
        "session": "s1",
        "deployment": "Model",
        "application": "app",
        "self": True,
    }
    with pytest.raises(RayServeException):
        serve.get_replica_context()


def test_handles_by_name(run: Run) -> None:
    run(Front.bind(Model.bind()), name="app", route_prefix=None)
    assert serve.get_app_handle("app").remote(1).result(timeout_s=20) == 2
    assert serve.get_app_handle("app").by_name.remote(2).result(timeout_s=20) == 4
    assert serve.get_deployment_handle("Model", "app").remote(3).result(timeout_s=20) == 6
    with pytest.raises(KeyError, match=r"Deployment\(name='Nothing', app='app'\) does not exist"):
        serve.get_deployment_handle("Nothing", "app")


def test_user_config_and_redeploys(run: Run) -> None:
    handle = run(Model.options(user_config={"version": 1}).bind())
    assert handle.configured.remote().result(timeout_s=20) == {"version": 1}
    run(Model.options(user_config={"version": 2}).bind(10))
    assert handle.configured.remote().result(timeout_s=20) == {"version": 2}
    assert handle.remote(1).result(timeout_s=20) == 10
    serve.delete("default")
    with pytest.raises(RayServeException):
        handle.remote(1).result(timeout_s=20)


def test_models_are_multiplexed_behind_a_handle(run: Run) -> None:
    @serve.deployment
    class Models:
        def __init__(self) -> None:
            self.loads: list[str] = []

        @serve.multiplexed(max_num_models_per_replica=2)
        async def load(self, model_id: str) -> str:
            self.loads.append(model_id)
            return f"model {model_id}"

        async def __call__(self) -> tuple[str, list[str]]:
            return await self.load(serve.get_multiplexed_model_id()), self.loads

    handle = run(Models.bind())
    for model in ("a", "b", "a", "c", "a", "b"):
        answer, loads = handle.options(multiplexed_model_id=model).remote().result(timeout_s=20)
        assert answer == f"model {model}"
    assert loads == ["a", "b", "c", "b"]


def test_a_broadcast_reaches_every_replica(run: Run) -> None:
    handle = run(Model.options(user_config=1).bind())
    assert handle.broadcast("configured").results(timeout_s=20) == [1]
    assert asyncio.run(handle.broadcast("sync", 2).results_async(timeout_s=20)) == [4]
    with pytest.raises(Refused):
        handle.broadcast("fail").results(timeout_s=20)
    assert isinstance(handle.broadcast("fail").results(timeout_s=20, return_exceptions=True)[0], Refused)
