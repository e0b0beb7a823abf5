"""Threads that stay up for the next request sleep when there is none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import requests
from deployed import pid_of, proxy_actor
from starlette.requests import Request

from rayserve_fast import serve


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@serve.deployment
async def pid(_: Request) -> int:
    return os.getpid()


def test_quick_requests_leave_nobody_awake(serve_instance: str) -> None:
    serve.run(pid.bind())
    with requests.Session() as session:
        for _ in range(500):  # quick enough to keep both threads up between two of them
            replica = int(session.get(f"{serve_instance}/", timeout=20).text)
    pids = [replica, pid_of(proxy_actor())]
    before = [cpu_s(pid) for pid in pids]
    time.sleep(1)
    spent = [cpu_s(pid) - was for pid, was in zip(pids, before, strict=True)]
    assert max(spent) < 0.3, "seconds of CPU in an idle second; Ray's own threads take some"
