"""Handles in drivers that bring a Ray of their own: in a forked child, across a shutdown, and after one."""

from __future__ import annotations

from typing import Any

ECHO = """
import ray
from rayserve_fast import serve

ray.init(address="local", num_cpus=4, include_dashboard=False)

@serve.deployment
def echo(x):
    return x
"""


def test_a_call_in_a_forked_child_is_refused(run_script: Any) -> None:
    """Its parent's connection to Ray answers nobody: such a call would wait for ever."""
    outcome = run_script(
        ECHO
        + """
import os, signal

serve.start(http_options={"port": 0})
handle = serve.run(echo.bind())
for i in range(2):  # before the parent's first call and after it
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            handle.remote(i).result(timeout_s=5)
        except RuntimeError as error:
            os._exit(3 if "forked from one that is connected to Ray" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert handle.remote(i).result(timeout_s=20) == i
print("both refused")
serve.shutdown()
ray.shutdown()
"""
    )
    assert outcome.stdout.splitlines()[-1:] == ["both refused"], outcome.stderr


def test_handles_find_the_next_cluster_after_a_shutdown(run_script: Any) -> None:
    outcome = run_script(
        ECHO
        + """
for i in range(2):
    serve.start(http_options={"port": 0})
    handle = serve.run(echo.bind())
    assert handle.remote(i).result(timeout_s=20) == i
    serve.shutdown()
print("both answered")
"""
    )
    assert outcome.stdout.strip().endswith("both answered"), outcome.stderr
    assert outcome.returncode == 0


def test_a_handle_starts_no_ray(run_script: Any) -> None:
    outcome = run_script(
        ECHO
        + """
import asyncio, time
from rayserve_fast.exceptions import DeploymentUnavailableError, RayServeException

def refused(kind, call):
    began = time.monotonic()
    try:
        call()
    except kind as error:
        assert "not connected to Ray" in str(error), error
    else:
        raise AssertionError("answered")
    assert time.monotonic() - began < 1
    assert not ray.is_initialized()

serve.start(http_options={"port": 0})
handle = serve.run(echo.bind())
echo.options(name="older").deploy()
older = echo.options(name="older").get_handle()
assert ray.get(older.remote(1)) == 1
response = handle.remote(1)
assert response.result(timeout_s=20) == 1
serve.shutdown()
ray.shutdown()
refused(DeploymentUnavailableError, lambda: handle.remote(1))
refused(DeploymentUnavailableError, lambda: handle.options(stream=True).items.remote(1))
refused(DeploymentUnavailableError, lambda: handle.broadcast("__call__", 1).results(timeout_s=5))
refused(DeploymentUnavailableError, lambda: older.remote(1))
refused(RayServeException, response._to_object_ref_sync)

ray.init(address="local", num_cpus=4, include_dashboard=False)
serve.start(http_options={"port": 0})
@serve.deployment(name="echo")
class Echo:
    def __call__(self, value):
        return value
    async def wait(self):
        await asyncio.sleep(60)
serve.run(Echo.bind())
assert handle.remote(2).result(timeout_s=20) == 2
waits = handle.options(method_name="wait").remote()
ray.shutdown()  # with Serve still there
refused(DeploymentUnavailableError, lambda: handle.remote(3))
try:
    waits.result(timeout_s=20)
except RayServeException as error:
    assert "shut down" in str(error), error
else:
    raise AssertionError("answered")
print("nothing started")
"""
    )
    assert outcome.stdout.splitlines()[-1:] == ["nothing started"], outcome.stderr
