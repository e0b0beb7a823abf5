"""The directory of a cluster's Unix sockets on one node: `/tmp/rsf-{uid}/{cluster}/`.

Short, because a socket's path is at most 108 bytes; mode 0700 and owned by us, because whoever can connect can try the
handshake. A directory that somebody else has put there first is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat


def directory(token: bytes) -> str:
    """The path for the cluster with this token; eight hexadecimal digits tell clusters apart."""
    return f"/tmp/rsf-{os.getuid()}/{hashlib.sha256(token).hexdigest()[:8]}"


def prepare(path: str) -> None:
    """Make the directory, private to this user.

    Raises:
        PermissionError: the directory, or its parent, belongs to somebody else or is open to others.
    """
    for part in (os.path.dirname(path), path):
        os.makedirs(part, mode=0o700, exist_ok=True)
        found = os.lstat(part)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(f"{part} must be a directory of this user with mode 0700")


def remove(path: str) -> None:
    """Remove the directory with everything in it; absent is fine."""
    shutil.rmtree(path, ignore_errors=True)
