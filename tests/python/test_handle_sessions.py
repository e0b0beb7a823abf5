"""Sessions of handles while this process is still linking to the replicas."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from scripted_replica import Cluster, Replicas, connecting, replicas  # noqa: F401

SESSIONS = [f"session-{i}" for i in range(16)]  # with two replicas, some belong to each


def add(cluster: Cluster, path: Path) -> None:
    """Lists one more replica, which is at `path`."""
    cluster.replicas.append({"id": "other", "node_id": "n", "unix": str(path), "tcp": None})
    cluster.push()


def test_nobody_waits_for_a_replica_that_cannot_be_reached(replica: Replicas, connect: Any, tmp_path: Path) -> None:
    cluster = Cluster(replica())
    add(cluster, tmp_path / "nobody-listens-here")
    handle = connect(cluster)
    for name in SESSIONS:
        handle.options(session_id=name).remote().result(timeout_s=5)


def test_a_session_waits_for_the_first_attempt_to_link_to_its_replica(
    replica: Replicas, connect: Any, tmp_path: Path
) -> None:
    linked = replica()
    cluster = Cluster(linked, max_ongoing_requests=100)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute"))
        mute.listen()
        add(cluster, tmp_path / "mute")
        handle = connect(cluster)
        responses = [handle.options(session_id=name).remote() for name in SESSIONS]
        attempt, _ = mute.accept()
        for _ in range(16):
            handle.remote().result(timeout_s=5)  # passes those who wait
        before = linked.calls.qsize()
        assert 16 < before < 32, "those whose session is there, and no others"
        attempt.close()
    for response in responses:
        response.result(timeout_s=5)
    assert linked.calls.qsize() == 32
