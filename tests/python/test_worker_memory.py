"""Memory that requests have freed stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BODIES = """
import resource
from rayserve_fast.replica.memory import keep_freed_memory
kept = {keep} and keep_freed_memory()
for _ in range(20):  # eight bodies of a MiB under way at a time, as the library meets them after it has warmed up
    bodies = [bytes(1 << 20) for _ in range(8)]
    del bodies
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bodies = [bytes(1 << 20) for _ in range(8)]
    del bodies
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **environment: str) -> tuple[str, int]:
    """Whether the setting was made, and the page faults of 160 bodies of a MiB."""
    command = [sys.executable, "-c", BODIES.format(keep=keep)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
def test_large_bodies_cost_no_page_faults_once_the_process_has_warmed_up() -> None:
    kept, count = faults(True)
    assert kept == "True"
    assert count < 160
    assert faults(False)[1] > 10 * 160, "otherwise the setting is not needed"


def test_what_the_environment_says_wins() -> None:
    assert faults(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
