"""`make demo` as a newcomer runs it: it tells digits apart, works while port 8000 is taken, and leaves no process."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_demo_recognises_images_it_has_not_seen(own_ray: dict[str, str]) -> None:
    pytest.importorskip("sklearn")
    with socket.socket() as taken:
        with suppress(OSError):  # someone else has it: as good
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        ran = subprocess.run(
            [sys.executable, "examples/demo.py"],
            cwd=ROOT,
            env=own_ray,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"^(\d+) images that the model had not seen: (\d+) right", ran.stdout, re.MULTILINE)
    assert found, ran.stdout
    seen, right = map(int, found.groups())
    assert seen == 540
    assert right / seen > 0.95
    assert "Traceback" not in ran.stdout + ran.stderr
