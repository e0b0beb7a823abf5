"""Waiting for the end of processes of this node that are not our children.

Ray tells that an actor is dead some milliseconds before its process is: who must leave nothing behind waits here as
well. On other nodes, and without `pidfd_open` (before Linux 5.3, macOS), Ray's word is taken.
"""

from __future__ import annotations

import os
import select
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


def wait_gone(place: Place | None, timeout_s: float) -> bool:
    """Block until the process has ended; False if it has not after `timeout_s`."""
    if place is None or not hasattr(os, "pidfd_open") or place.node_id != ray.get_runtime_context().get_node_id():
        return True
    try:
        fd = os.pidfd_open(place.pid)
    except OSError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)
