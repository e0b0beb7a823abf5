"""The directory of a cluster's Unix sockets on one node: `/tmp/rsf-{uid}/{cluster}/`.

Short, because a socket's path is at most 108 bytes; mode 0700 and owned by us, because whoever can connect can try the
handshake. A directory that somebody else has put there first is refused. Every process that uses it holds a shared lock
on it; one that nobody holds is what a cluster left that was killed, and goes when the next one starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time


def directory(token: bytes) -> str:
    """The path for the cluster with this token; eight hexadecimal digits tell clusters apart."""
    return f"/tmp/rsf-{os.getuid()}/{hashlib.sha256(token).hexdigest()[:8]}"


def prepare(path: str) -> int:
    """Make the directory, private to this user, and lock it until the returned descriptor is closed.

    Raises:
        PermissionError: the directory, or its parent, belongs to somebody else or is open to others.
    """
    while True:
        for part in (os.path.dirname(path), path):
            os.makedirs(part, mode=0o700, exist_ok=True)
            found = os.lstat(part)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError(f"{part} must be a directory of this user with mode 0700")
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(lock)):
            return lock
        os.close(lock)  # another process has taken it for a leftover just before


def sweep(parent: str) -> None:
    """Remove the directories under `parent` that no process uses any more, and that have not changed for an hour."""
    for entry in os.scandir(parent):
        if time.time() - entry.stat(follow_symlinks=False).st_mtime < 3600:
            continue  # its users may all be about to come back
        lock = os.open(entry.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use
        else:
            remove(entry.path)
        finally:
            os.close(lock)


def remove(path: str) -> None:
    """Remove the directory with everything in it; absent is fine."""
    shutil.rmtree(path, ignore_errors=True)
