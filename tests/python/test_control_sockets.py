"""The socket directory: private, locked while in use, swept when not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayserve_fast.controlplane import sockets


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_the_directory_is_private(parent: Path) -> None:
    os.close(sockets.prepare(str(parent / "a")))
    assert (parent / "a").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_can_enter_is_refused(parent: Path) -> None:
    (parent / "a").mkdir()
    (parent / "a").chmod(0o755)
    with pytest.raises(PermissionError, match="mode 0700"):
        sockets.prepare(str(parent / "a"))


def test_a_link_to_elsewhere_is_refused(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (parent / "a").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(PermissionError):
        sockets.prepare(str(parent / "a"))


def test_only_directories_that_nobody_uses_are_swept(parent: Path) -> None:
    used = sockets.prepare(str(parent / "used"))
    left = sockets.prepare(str(parent / "left"))
    (parent / "left" / "r-x.sock").touch()
    os.close(left)
    os.close(sockets.prepare(str(parent / "young")))
    for name in ("used", "left"):
        os.utime(parent / name, (1, 1))
    sockets.sweep(str(parent))
    assert sorted(p.name for p in parent.iterdir()) == ["used", "young"]
    os.close(used)


def test_two_clusters_have_two_short_directories() -> None:
    a, b = sockets.directory(b"a"), sockets.directory(b"b")
    assert a != b
    assert len(f"{a}/r-12345678.sock") < 60
