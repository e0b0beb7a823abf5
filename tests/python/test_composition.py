"""Model composition as a user writes it, on real replicas and in local testing mode, with the same answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from rayserve_fast import serve
from rayserve_fast.context import _get_serve_request_context
from rayserve_fast.exceptions import BackPressureError, RayServeException, RequestCancelledError
from rayserve_fast.handle import DeploymentHandle

Run = Callable[..., DeploymentHandle]


@pytest.fixture(params=["cluster", "local"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """`serve.run` on Ray, and in this process."""
    if request.param == "cluster":
        request.getfixturevalue("serve_instance")
        yield serve.run
        return
    from rayserve_fast.local import applications

    yield partial(serve.run, _local_testing_mode=True)
    applications.shutdown()


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait for what no event tells of."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class Refused(ValueError):
    """The user's own, with a constructor that asks for more than a message."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code


@serve.deployment(max_ongoing_requests=20)
class Model:
    def __init__(self, factor: int = 2) -> None:
        self.factor = factor
        self.hangs = self.cancelled = 0
        self.config: Any = None

    def reconfigure(self, config: Any) -> None:
        self.config = config

    async def __call__(self, value: Any) -> Any:
        return value * self.factor

    def sync(self, value: Any) -> Any:
        return value * self.factor

    async def configured(self) -> Any:
        return self.config

    async def append(self, values: list[int]) -> list[int]:
        values.append(0)
        return values

    async def fail(self) -> None:
        raise Refused("on purpose", 42)

    async def hang(self) -> None:
        self.hangs += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def hanging(self) -> int:
        return self.hangs - self.cancelled

    async def cancellations(self) -> int:
        return self.cancelled

    async def lock(self) -> Any:
        return threading.Lock()

    async def items(self, n: int) -> Any:
        for i in range(n):
            yield i

    async def context(self) -> dict[str, Any]:
        request, replica = _get_serve_request_context(), serve.get_replica_context()
        seen_in_thread = await asyncio.to_thread(lambda: _get_serve_request_context().request_id)
        return {
            "request_id": request.request_id,
            "in_thread": seen_in_thread,
            "app_name": request.app_name,
            "model": request.multiplexed_model_id,
            "session": request.session_id,
            "deployment": replica.deployment,
            "application": replica.app_name,
            "self": replica.servable_object is self,
        }


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


def test_arguments_and_results_are_copies(run: Run) -> None:
    handle = run(Model.bind())
    values = [1]
    assert handle.append.remote(values).result(timeout_s=20) == [1, 0]
    assert values == [1]
    array = np.arange(10_000.0)
    doubled = handle.remote(array).result(timeout_s=20)
    np.testing.assert_array_equal(doubled, array * 2)
    doubled[0] = 1  # a copy of one's own


def test_what_the_user_raises_arrives_through_two_deployments(run: Run) -> None:
    @serve.deployment
    class Outer:
        def __init__(self, model: DeploymentHandle) -> None:
            self.model = model

        async def __call__(self) -> Any:
            return await self.model.fail.remote()

        async def caught(self) -> int:
            try:
                await self.model.fail.remote()
            except Refused as error:
                return error.code
            return 0

    handle = run(Outer.bind(Model.bind()))
    with pytest.raises(Refused, match="in fail") as raised:
        handle.remote().result(timeout_s=20)
    assert isinstance(raised.value, RayTaskError)
    assert isinstance(raised.value.cause, Refused)
    assert handle.caught.remote().result(timeout_s=20) == 42


def test_wrong_calls_are_told_what_is_wrong(run: Run) -> None:
    handle = run(Model.bind())
    with pytest.raises(RayServeException, match=r"Tried to call a method 'nothing' that does not exist.*'fail'"):
        handle.nothing.remote().result(timeout_s=20)
    with pytest.raises(TypeError, match="returned a generator"):
        handle.items.remote(1).result(timeout_s=20)
    with pytest.raises(TypeError, match="cannot be pickled"):
        handle.remote(threading.Lock()).result(timeout_s=20)
    with pytest.raises(TypeError, match="cannot be sent"):
        handle.lock.remote().result(timeout_s=20)


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
    until(lambda: handle.cancellations.remote().result(timeout_s=20) == 2)


@pytest.mark.parametrize(("method", "args", "calls"), [("hang_many", (5,), 5), ("hang_sync", (), 1)])
def test_cancelling_reaches_what_was_called_on_behalf_of_the_call(
    run: Run, method: str, args: tuple[int, ...], calls: int
) -> None:
    handle = run(Front.bind(Model.bind()))
    model = serve.get_deployment_handle("Model", "default")
    response = handle.options(method_name=method).remote(*args)
    until(lambda: model.hanging.remote().result(timeout_s=20) == calls)
    response.cancel()
    with pytest.raises(RequestCancelledError):
        response.result(timeout_s=20)
    until(lambda: model.cancellations.remote().result(timeout_s=20) == calls)


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


@serve.deployment(max_ongoing_requests=20)
class Stream:
    def __init__(self) -> None:
        self.made = 0
        self.ended: list[str] = []

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    def count_sync(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def fails(self, after: int) -> AsyncIterator[int]:
        for i in range(after):
            yield i
        raise Refused("in the middle", 7)

    async def arrays(self, n: int) -> AsyncIterator[Any]:
        for i in range(n):
            self.made += 1
            yield np.full(64 << 10, i, np.uint8)

    def arrays_sync(self, n: int) -> Iterator[Any]:
        for i in range(n):
            self.made += 1
            yield np.full(64 << 10, i, np.uint8)

    async def for_ever(self) -> AsyncIterator[int]:
        try:
            while True:
                self.made += 1
                yield self.made
                await asyncio.sleep(0.001)
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise

    async def plain(self) -> int:
        return 1

    async def state(self) -> tuple[int, list[str]]:
        return self.made, self.ended


@serve.deployment(max_ongoing_requests=20)
class Relay:
    """Passes on the items of another deployment's stream."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model.options(stream=True)

    async def count(self, n: int) -> AsyncIterator[int]:
        async for i in self.model.count.remote(n):
            yield 10 * i

    def count_sync(self, n: int) -> Iterator[int]:
        for i in self.model.count_sync.remote(n):
            yield 10 * i

    async def fails(self, after: int) -> AsyncIterator[int]:
        async for i in self.model.fails.remote(after):
            yield i


def collected(generator: Any) -> list[Any]:
    async def main() -> list[Any]:
        return [item async for item in generator]

    return asyncio.run(main())


@pytest.mark.parametrize("method", ["count", "count_sync"])
@pytest.mark.parametrize("taken", [list, collected])
def test_items_stream_through_two_deployments(run: Run, method: str, taken: Any) -> None:
    handle = run(Relay.bind(Stream.bind())).options(stream=True, method_name=method)
    assert taken(handle.remote(500)) == [10 * i for i in range(500)]


def test_an_error_comes_after_the_items_that_were_made(run: Run) -> None:
    items, got = run(Relay.bind(Stream.bind())).options(stream=True).fails.remote(3), []
    with pytest.raises(Refused, match="in the middle"):
        got.extend(items)
    assert got == [0, 1, 2]


def test_streaming_and_plain_calls_are_told_apart(run: Run) -> None:
    handle = run(Stream.bind())
    with pytest.raises(TypeError, match="did not return a generator"):
        next(handle.options(stream=True).plain.remote())
    with pytest.raises(TypeError, match=r"You must use `handle.options\(stream=True\)`"):
        handle.count.remote(1).result(timeout_s=20)
    items = handle.options(stream=True).count.remote(1)
    with pytest.raises(TypeError):
        items.result()
    assert list(items) == [0]


@pytest.mark.parametrize("method", ["arrays", "arrays_sync"])
def test_a_stream_that_is_not_read_does_not_run_ahead(run: Run, method: str) -> None:
    handle = run(Stream.bind())
    items = handle.options(stream=True, method_name=method).remote(100)
    assert next(items)[0] == 0
    time.sleep(0.3)
    assert handle.state.remote().result(timeout_s=20)[0] < 20
    assert [int(item[0]) for item in items] == list(range(1, 100))


def test_cancelling_a_stream_reaches_its_generator(run: Run) -> None:
    handle = run(Stream.bind())
    items = handle.options(stream=True).for_ever.remote()
    assert [next(items), next(items)] == [1, 2]
    items.cancel()
    with pytest.raises(RequestCancelledError):
        list(items)
    until(lambda: handle.state.remote().result(timeout_s=20)[1] == ["CancelledError"])


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


@serve.deployment(max_ongoing_requests=20)
class Passing:
    """Passes on what it has not read."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def __call__(self, value: Any) -> Any:
        return await self.model.remote(self.model.remote(value))

    def sync(self, value: Any) -> Any:
        return self.model.sync.remote(value=self.model.remote(value)).result()

    async def read_before(self, value: Any) -> Any:
        response = self.model.remote(value)
        await response
        return await self.model.remote(response)

    async def failed(self) -> str:
        try:
            await self.model.remote(self.model.fail.remote())
        except Refused as error:
            return f"{error.code}"
        return "nothing"

    async def nested(self) -> None:
        await self.model.remote([self.model.remote(1)])

    async def stream(self) -> None:
        await self.model.remote(self.model.options(stream=True).items.remote(1))


@pytest.mark.parametrize("method", ["__call__", "sync", "read_before"])
def test_responses_are_passed_on(run: Run, method: str) -> None:
    handle = run(Passing.bind(Model.bind())).options(method_name=method)
    assert handle.remote(3).result(timeout_s=20) == 12
    np.testing.assert_array_equal(handle.remote(np.arange(5)).result(timeout_s=20), 4 * np.arange(5))


def test_what_cannot_be_passed_on_says_so(run: Run) -> None:
    handle = run(Passing.bind(Model.bind()))
    assert handle.failed.remote().result(timeout_s=20) == "42"
    with pytest.raises(RayServeException, match="top-level argument"):
        handle.nested.remote().result(timeout_s=20)
    with pytest.raises(RuntimeError, match="treaming"):
        handle.stream.remote().result(timeout_s=20)


def test_a_broadcast_reaches_every_replica(run: Run) -> None:
    handle = run(Model.options(user_config=1).bind())
    assert handle.broadcast("configured").results(timeout_s=20) == [1]
    assert asyncio.run(handle.broadcast("sync", 2).results_async(timeout_s=20)) == [4]
    with pytest.raises(Refused):
        handle.broadcast("fail").results(timeout_s=20)
    assert isinstance(handle.broadcast("fail").results(timeout_s=20, return_exceptions=True)[0], Refused)
