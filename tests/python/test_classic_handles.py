"""The older handles: real ObjectRefs, there before the answer is, for whatever Ray does with references."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from deployed import failing, plus_one, until_running, wait_for
from ray.exceptions import RayTaskError

from rayserve_fast import serve
from rayserve_fast.classic.handles import older_handle
from rayserve_fast.exceptions import BackPressureError, RayServeException
from rayserve_fast.handle import (
    DeploymentHandle,
    RayServeDeploymentHandle,
    RayServeHandle,
    RayServeSyncHandle,
)


class Unlucky(ValueError):
    """Of this test module, which the bridge can import or not; it travels either way."""


class Target:
    def __init__(self) -> None:
        self.cancelled = 0

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    async def sleep(self, seconds: float, value: Any = None) -> Any:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return value

    def same(self, value: Any) -> Any:
        return value

    def put(self, value: Any) -> Any:
        return [ray.put(value)]

    def fail(self) -> None:
        raise Unlucky("thirteen")

    def many_cancelled(self) -> int:
        return self.cancelled

    def model_and_session(self) -> tuple[str, str]:
        from rayserve_fast.context import _get_serve_request_context

        return serve.get_multiplexed_model_id(), _get_serve_request_context().session_id


@pytest.fixture(scope="module")
def target(serve_url: str) -> Iterator[Any]:
    app = serve.deployment(max_ongoing_requests=100)(Target).bind()
    yield older_handle(serve.run(app, name="target", route_prefix=None), sync=True)
    serve.delete("target")


@pytest.fixture
def deploy(serve_url: str) -> Iterator[Any]:
    """`serve.run` beside the application `target`, for one test."""
    yield lambda app: serve.run(app, name="beside", route_prefix=None)
    serve.delete("beside")


def test_a_call_gives_an_object_ref_before_its_answer(target: Any) -> None:
    ray.get(target.same.remote(0), timeout=60)  # the bridge is there
    began = time.monotonic()
    refs = [target.sleep.remote(3.0, i) for i in range(10)]
    returned = time.monotonic() - began
    assert all(type(ref) is ray.ObjectRef for ref in refs)
    assert returned < 3.0
    assert ray.get(refs, timeout=60) == list(range(10))
    assert time.monotonic() - began < 15  # one after the other they would take 30


def test_wait_sees_them_finish_one_by_one(target: Any) -> None:
    pending = [target.sleep.remote(0.6, "c"), target.sleep.remote(0.3, "b"), target.sleep.remote(0.0, "a")]
    order = []
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=60)
        order += ray.get(done)
    assert order == ["a", "b", "c"]


def test_a_reference_passes_into_tasks_and_into_other_calls(target: Any) -> None:
    assert ray.get(plus_one.remote(target.sleep.remote(0.2, 1)), timeout=60) == 2
    first = target.sleep.remote(0.2, 20)
    assert ray.get(target.remote(first, 1, key=plus_one.remote(first)), timeout=60) == ((20, 1), {"key": 21})


def test_a_call_that_waits_for_another_takes_no_slot(deploy: Any) -> None:
    one = deploy(serve.deployment(max_ongoing_requests=1)(Target).bind())
    handle = older_handle(one, sync=True)
    gate = Gate()
    blocked = handle.same.remote(gate.ref)
    assert ray.get(handle.same.remote("free"), timeout=60) == "free"
    gate.open("late")
    assert ray.get(blocked, timeout=60) == "late"


class Gate:
    """A reference whose value comes when it is told to."""

    def __init__(self) -> None:
        @ray.remote(num_cpus=0)
        class Waiting:
            def __init__(self) -> None:
                self.event, self.value = asyncio.Event(), None

            async def wait(self) -> Any:
                await self.event.wait()
                return self.value

            async def open(self, value: Any) -> None:
                self.value = value
                self.event.set()

        self._actor = Waiting.remote()
        self.ref = self._actor.wait.remote()

    def open(self, value: Any) -> None:
        ray.get(self._actor.open.remote(value))


def test_a_response_of_todays_handle_is_an_argument_too(target: Any) -> None:
    today = serve.get_app_handle("target")
    assert ray.get(target.same.remote(today.sleep.remote(0.1, "value")), timeout=60) == "value"


def test_what_the_method_raises_comes_out_of_get(target: Any) -> None:
    with pytest.raises(Unlucky, match="thirteen") as caught:
        ray.get(target.fail.remote(), timeout=60)
    assert isinstance(caught.value, RayTaskError)
    assert type(caught.value.cause) is Unlucky
    text = str(caught.value)  # the remote traceback, and nothing of the way to it
    assert "fail()" in text.splitlines()[0]
    assert "in fail" in text.splitlines()[1]
    for ours in ("bridge.py", "response.py", "_base.py"):
        assert ours not in text
    with pytest.raises(RayServeException, match="does not exist"):
        ray.get(target.nothing.remote(), timeout=60)
    with pytest.raises(ValueError, match="in the task"):
        ray.get(target.same.remote(failing.remote()), timeout=60)


def test_arguments_that_cannot_be_sent_are_refused_at_once(target: Any) -> None:
    with pytest.raises(TypeError):
        target.same.remote(threading.Lock())
    with pytest.raises(RuntimeError, match="streaming response") as caught:
        target.same.remote(serve.get_app_handle("target").options(method_name="same", stream=True).remote(1))
    assert caught.value.__cause__ is None, "no error is its own cause: who looks for the first one would not end"


def test_limits_hold_as_for_any_call(deploy: Any) -> None:
    app = serve.deployment(max_ongoing_requests=1, max_queued_requests=1)(Target).bind()
    handle = older_handle(deploy(app), sync=True)
    ready, _ = ray.wait([handle.sleep.remote(1.0) for _ in range(6)], num_returns=4, timeout=60)
    for ref in ready:
        with pytest.raises(BackPressureError) as caught:
            ray.get(ref)
        assert caught.value.cause.status_code == 503


def test_cancelling_the_reference_cancels_the_call(target: Any) -> None:
    before = ray.get(target.many_cancelled.remote())
    ref = target.sleep.remote(3600)
    until_running(1)
    ray.cancel(ref)
    with pytest.raises((ray.exceptions.TaskCancelledError, RayTaskError)):
        ray.get(ref, timeout=60)
    wait_for(lambda: ray.get(target.many_cancelled.remote()) > before, 10)


def test_large_values_are_not_decoded_on_the_way(target: Any) -> None:
    array = np.arange(3_000_000, dtype=np.float64)
    back = ray.get(target.same.remote(array), timeout=60)
    np.testing.assert_array_equal(back, array)
    assert not back.flags.owndata  # it stands where Ray keeps it
    assert ray.get(target.same.remote(b"x" * 1_000_000), timeout=60) == b"x" * 1_000_000
    np.testing.assert_array_equal(ray.get(target.same.remote(ray.put(array)), timeout=60), array)


def test_references_inside_of_values_stay_usable(target: Any) -> None:
    (ref,) = ray.get(target.same.remote([ray.put("mine")]), timeout=60)
    assert ray.get(ref, timeout=60) == "mine"
    (ref,) = ray.get(target.put.remote("its own"), timeout=60)
    assert ray.get(plus_one.remote(ray.get(target.put.remote(1))[0]), timeout=60) == 2
    assert ray.get(ref, timeout=60) == "its own"


def test_options_reach_the_replica(target: Any) -> None:
    handle = target.options(method_name="model_and_session", shard_key="user-7", multiplexed_model_id="de")
    assert ray.get(handle.remote(), timeout=60) == ("de", "user-7")
    assert ray.get(pickle.loads(pickle.dumps(handle)).remote(), timeout=60) == ("de", "user-7")


def test_an_async_handle_is_awaited_once_for_the_reference(target: Any) -> None:
    handle = older_handle(serve.get_app_handle("target"), sync=False)

    async def call() -> Any:
        ref = await handle.same.remote(5)
        assert type(ref) is ray.ObjectRef
        return await ref, await asyncio.gather(*[await handle.same.remote(i) for i in range(3)])

    assert asyncio.run(call()) == (5, [0, 1, 2])


def test_get_of_a_response_says_what_to_do(target: Any) -> None:
    response = serve.get_app_handle("target").same.remote(1)
    for wrong in (response, [response]):
        with pytest.raises((TypeError, ValueError), match=r"await.*\.result\(\)"):
            ray.get(wrong)
    assert response.result(timeout_s=20) == 1


class Annotated:
    def __init__(
        self,
        today: DeploymentHandle,
        older: RayServeHandle,
        sync: RayServeSyncHandle,
        named: RayServeDeploymentHandle | None = None,
        many: list[RayServeHandle] = (),  # type: ignore[assignment]
        by_name: dict[str, NotImported[RayServeSyncHandle]] = {},  # noqa: B006, F821
    ) -> None:
        self.handles = [today, older, sync, named, *many, *by_name.values()]

    def kinds(self) -> list[tuple[str, bool]]:
        return [(type(h).__name__, isinstance(h, RayServeHandle) and h.is_sync) for h in self.handles]

    async def ask(self) -> list[Any]:
        today, older, sync, named, *others = self.handles
        answers = [await today.same.remote(0), await (await older.same.remote(1)), await sync.same.remote(2)]
        return [*answers, await (await named.same.remote(3)), *(type(o.same.remote(4)).__name__ for o in others[1:])]

    def pid(self) -> int:
        return os.getpid()


class AnnotatedSafely(Annotated):
    def __init__(self, *handles: RayServeHandle, **by_name: RayServeSyncHandle | None) -> None:
        self.handles = [*handles, *by_name.values()]


@pytest.mark.parametrize("resolvable", [True, False])
def test_annotated_parameters_get_older_handles(deploy: Any, resolvable: bool) -> None:
    t = serve.deployment(Target).bind()
    if not resolvable:
        app = serve.deployment(Annotated).bind(t, t, t, t, many=[t], by_name={"x": t})
        handle = deploy(app)
        assert handle.kinds.remote().result(timeout_s=20) == [
            ("DeploymentHandle", False),
            ("RayServeHandle", False),
            ("RayServeSyncHandle", True),
            ("RayServeDeploymentHandle", False),
            ("RayServeHandle", False),
            ("RayServeSyncHandle", True),
        ]
        assert handle.ask.remote().result(timeout_s=60) == [0, 1, 2, 3, "ObjectRef"]
        return
    app = serve.deployment(AnnotatedSafely).bind(t, t, one=t)
    handle = deploy(app)
    assert handle.kinds.remote().result(timeout_s=20) == [
        ("RayServeHandle", False),
        ("RayServeHandle", False),
        ("RayServeSyncHandle", True),
    ]


class Asks:
    def __call__(self, request: Any) -> str:
        return f"{request.method} {request.url.path}"

    def method(self, value: Any) -> Any:
        return value


class HasDefault:
    def __call__(self, value: str = "default") -> str:
        return value


class AsksNothing:
    def __call__(self) -> str:
        return "nothing"


@pytest.mark.parametrize(("code", "answer"), [(Asks, "GET /"), (HasDefault, "default"), (AsksNothing, "nothing")])
def test_a_call_without_arguments_gives_a_request_to_who_asks_for_one(deploy: Any, code: Any, answer: str) -> None:
    handle = older_handle(deploy(serve.deployment(code).bind()), sync=True)
    assert ray.get(handle.remote(), timeout=60) == answer
    if code is Asks:
        with pytest.raises(TypeError, match="missing 1 required"):
            ray.get(handle.method.remote(), timeout=60)
        with pytest.raises(TypeError, match="missing 1 required"):
            handle._handle.remote().result(timeout_s=20)  # today's handle calls as it is told


def test_there_are_no_references_in_local_testing_mode() -> None:
    handle = serve.run(serve.deployment(Target).bind(), name="here", _local_testing_mode=True)
    with pytest.raises(RuntimeError, match="local testing mode"):
        older_handle(handle, sync=True).remote()
    serve.delete("here")


AGAIN = """
import ray
from rayserve_fast import serve

@serve.deployment
def echo(value):
    return value

def once(value):
    ray.init(address="local", num_cpus=4, include_dashboard=False)
    serve.start(http_options={"port": 0})
    for repeat in range(2):
        if repeat:
            serve.shutdown()
            serve.start(http_options={"port": 0})
        echo.deploy()
        handle = echo.get_handle()
        print(ray.get(handle.remote(value)))
    ray.shutdown()  # with the bridge still there

once("first")
once("second")
"""


def test_the_bridge_is_found_again_after_another_serve_and_another_ray(run_script: Any) -> None:
    ran = run_script(AGAIN, timeout=110)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["first", "first", "second", "second"]
