"""What travels between deployments, on real replicas and in local testing mode: copies, unread answers, errors."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from composed import Model, Refused, Run
from ray.exceptions import RayTaskError

from rayserve_fast import serve
from rayserve_fast.exceptions import RayServeException
from rayserve_fast.handle import DeploymentHandle


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
    with pytest.raises(TypeError, match="Method 'hidden_items' returned a generator"):
        handle.hidden_items.remote().result(timeout_s=20)
    with pytest.raises(TypeError, match="cannot be pickled"):
        handle.remote(threading.Lock()).result(timeout_s=20)
    with pytest.raises(TypeError, match="cannot be sent"):
        handle.lock.remote().result(timeout_s=20)


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
