"""Handles in drivers that bring a Ray of their own: in a forked child, and across a shutdown."""

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
