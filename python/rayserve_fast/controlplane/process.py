"""The priority of this process, and waiting for the end of processes of this node that are not our children.

Ray tells that an actor is dead some milliseconds before its process is: who must leave nothing behind waits here as
well. And Ray does not tell at all while a child that user code has forked holds the actor's sockets open. On other
nodes, and without `pidfd_open` (before Linux 5.3, macOS), Ray's word is taken.
"""

from __future__ import annotations

import asyncio
import os
import select
from contextlib import suppress
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Place:
    """Where an actor's process runs."""

    node_id: str
    pid: int

    @staticmethod
    def here() -> Place:
        """This process."""
        return Place(ray.get_runtime_context().get_node_id(), os.getpid())


def serve_at_normal_priority() -> None:
    """Take Ray's niceness off the calling thread, and so off the threads that it will start.

    Ray starts every worker with niceness 15. A proxy at 15 is preempted by its own clients: with 64 of them on one
    machine it was forced off its core 0.8 times a request instead of 0.01, and answered half as many. Without the right
    to do it (CAP_SYS_NICE, or RLIMIT_NICE) Ray's `RAY_worker_niceness` stays.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def wait_gone(place: Place | None, timeout_s: float) -> bool:
    """Block until the process has ended; False if it has not after `timeout_s`."""
    try:
        fd = _open(place)
    except ProcessLookupError:
        return True
    if fd is None:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


async def gone(place: Place | None) -> None:
    """Return when the process has ended; where that cannot be seen from here, never."""
    ended = asyncio.Event()
    try:
        fd = _open(place)
    except ProcessLookupError:
        return
    if fd is None:
        await ended.wait()
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _open(place: Place | None) -> int | None:
    """A descriptor that is readable once the process has ended; None where its end cannot be seen from here.

    Raises:
        ProcessLookupError: it has ended.
    """
    if place is None or not hasattr(os, "pidfd_open") or place.node_id != ray.get_runtime_context().get_node_id():
        return None
    try:
        return os.pidfd_open(place.pid)
    except ProcessLookupError:
        raise
    except OSError:  # no descriptor to be had: Ray's word is taken here too, or a living replica would count as dead
        return None
