"""Serving threads run at normal priority, not at the niceness that Ray gives its workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from deployed import pid_of, proxy_actor
from starlette.requests import Request

from rayserve_fast import serve

RAISE = "import os; os.nice(5); os.setpriority(os.PRIO_PROCESS, 0, 0)"
may_raise = subprocess.run([sys.executable, "-c", RAISE], stderr=subprocess.DEVNULL, check=False).returncode == 0
pytestmark = pytest.mark.skipif(not may_raise, reason="this user may not raise a priority")


@serve.deployment
class Niceness:
    async def __call__(self, _: Request) -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)  # of the thread, on Linux

    def on_a_thread(self) -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)


def test_handlers_run_at_normal_priority(serve_instance: str) -> None:
    handle = serve.run(Niceness.bind())
    assert requests.get(f"{serve_instance}/", timeout=20).text == "0"
    assert handle.on_a_thread.remote().result() == 0


def test_the_proxy_runs_at_normal_priority(serve_instance: str) -> None:
    serve.run(Niceness.bind())
    pid = pid_of(proxy_actor())
    threads = [stat.read_text().rpartition(") ")[2].split() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    assert 0 in {int(fields[16]) for fields in threads}, "the shards'"
