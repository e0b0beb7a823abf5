"""A replica whose every frame a test decides: for refusals, drains and deaths that a real one shows only by chance.

It speaks the wire format of ARCHITECTURE.md over a Unix socket, in one thread per link; handlers get each CALL.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from wire_client import value_at, value_bytes

from rayserve_fast import caller, values
from rayserve_fast.handle import DeploymentHandle

HELLO, CHALLENGE, PROOF, WELCOME = 1, 2, 3, 4
CALL, RESULT, ERROR, CANCEL = 30, 31, 32, 40
BUSY, RETURNED, DRAIN, PING, PONG, CREDIT, UNUSED, BATCH = 42, 43, 44, 45, 46, 47, 48, 50
FIN, FAST, GRANTED, BATCHED = 1, 2, 4, 16
TOKEN = b"a cluster token"


class Link:
    """One caller's connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()

    def send(
        self, kind: int, stream: int = 0, payload: bytes = b"", *, flags: int = 0, load: int = 0, aux: int = 0
    ) -> None:
        with self._lock:
            self.sock.sendall(struct.pack("<IBBHII", len(payload), kind, flags, load, stream, aux) + payload)

    def read(self) -> tuple[int, int, int, int, bytes]:
        length, kind, flags, _, stream, aux = struct.unpack("<IBBHII", self._exactly(16))
        return kind, flags, stream, aux, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        out = bytearray()
        while len(out) < count:
            if not (more := self.sock.recv(min(count - len(out), 1 << 20))):
                raise EOFError
            out += more
        return bytes(out)


class Call:
    """A CALL frame that a handler answers, whenever it likes."""

    def __init__(self, link: Link, flags: int, stream: int, payload: bytes) -> None:
        self.link, self.flags, self.stream = link, flags, stream
        lengths = struct.unpack_from("<6H", payload)
        at, texts = 12, []
        for length in lengths:
            texts.append(payload[at : at + length].decode())
            at += length
        self.method, self.request_id, self.route, self.app, self.model_id, self.session_id = texts
        encoded, buffers, at = value_at(payload, at + -at % 16)
        #: Arguments that other calls have answered: place, pickle, buffers.
        self.relayed = []
        while at < len(payload):
            (slot,) = struct.unpack_from("<I", payload, at)
            pickle, parts, at = value_at(payload, at + 4 + -(at + 4) % 16)
            self.relayed.append((slot, pickle, [bytearray(part) for part in parts]))
        self.args, self.kwargs = values.load_arguments(encoded, [bytearray(part) for part in buffers], self.relayed)

    def reply(self, value: Any, *, flags: int = 0, load: int = 0) -> None:
        pickle, buffers = values.dumps(value)
        payload = value_bytes(pickle, [bytes(buffer.raw()) for buffer in buffers])
        self.link.send(RESULT, self.stream, payload, flags=FIN | flags, load=load)

    def fail(self, fault: int, payload: bytes) -> None:
        self.link.send(ERROR, self.stream, payload, flags=FIN, aux=fault)

    def send(self, kind: int, **fields: Any) -> None:
        self.link.send(kind, self.stream, **fields)


class ScriptedReplica:
    """Listens on a Unix socket; `handler` answers calls on the link's thread, other frames land in `frames`."""

    def __init__(
        self, directory: Path, replica_id: str, handler: Callable[[Call], None] | None = None, max_ongoing: int = 5
    ) -> None:
        self.id = replica_id
        self.path = str(directory / f"{replica_id}.sock")
        self.handler = handler or (lambda call: call.reply(call.args))
        self.max_ongoing = max_ongoing
        self.calls: queue.Queue[Call] = queue.Queue()
        self.frames: queue.Queue[tuple[int, int, int]] = queue.Queue()
        #: The streams of each BATCH, and its flags.
        self.batches: queue.Queue[tuple[list[int], int]] = queue.Queue()
        self.links: list[Link] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Link(sock),), daemon=True).start()

    def _shake(self, link: Link) -> None:
        kind, _, _, _, hello = link.read()
        assert (kind, hello[:6]) == (HELLO, b"RSF1\x01\x00")
        role, theirs, wanted = hello[6:7], hello[7:39], hello[39:]
        ours = os.urandom(32)

        def mac(side: bytes) -> bytes:
            covered = hello[:6] + side + role + theirs + ours + wanted
            return hmac.new(TOKEN, covered, hashlib.sha256).digest()

        link.send(CHALLENGE, payload=ours + mac(b"R"))
        kind, _, _, _, proof = link.read()
        assert (kind, proof) == (PROOF, mac(b"C"))
        assert wanted.decode() == self.id
        link.send(WELCOME, payload=struct.pack("<I", self.max_ongoing))

    def _serve(self, link: Link) -> None:
        try:
            self._shake(link)
            self.links.append(link)
            while True:
                kind, flags, stream, aux, payload = link.read()
                if kind == BATCH:
                    self.batches.put(([stream for (stream,) in struct.iter_unpack("<I", payload)], flags))
                    continue
                if kind != CALL:
                    self.frames.put((kind, stream, aux))
                    continue
                call = Call(link, flags, stream, payload)
                self.calls.put(call)
                self.handler(call)
        except (EOFError, OSError):
            link.sock.close()

    def die(self) -> None:
        """What a killed process looks like from outside."""
        self.stop_listening()
        for link in self.links:
            link.sock.shutdown(socket.SHUT_RDWR)
            link.sock.close()

    def stop_listening(self) -> None:
        self._listener.close()
        Path(self.path).unlink(missing_ok=True)


class Cluster:
    """A controller's part: snapshots of one deployment, `app#D`."""

    def __init__(self, *replicas: ScriptedReplica, **config: Any) -> None:
        self.version = 0
        self.asked = 0
        self.config = {"max_ongoing_requests": 5, "max_queued_requests": -1, **config}
        self.down: Exception | None = None
        self._waiting: list[tuple[int, Future[bytes]]] = []
        self.publish(*replicas)

    def publish(self, *replicas: ScriptedReplica) -> None:
        self.replicas = [{"id": r.id, "node_id": "n", "unix": r.path, "tcp": None} for r in replicas]
        self.push()

    def push(self) -> None:
        """A new version, for whoever waits for one."""
        self.version += 1
        waiting, self._waiting = self._waiting, []
        for newer_than, future in waiting:
            self._answer(newer_than, future)

    def crash(self, error: Exception) -> None:
        """Whoever waits or asks gets `error`, until `down` is None again."""
        self.down = error
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            future.set_exception(error)

    def present(self) -> bytes:
        self.asked += 1
        if self.down:
            raise self.down
        deployment = {"app": "app", "name": "D", "replicas": self.replicas, **self.config}
        return json.dumps({"version": [1, self.version], "deployments": {"app#D": deployment}}).encode()

    def next(self, newer_than: tuple[int, int] | None) -> Future[bytes]:
        future: Future[bytes] = Future()
        if self.down:
            future.set_exception(self.down)
        else:
            self._answer(newer_than[1] if newer_than else 0, future)
        return future

    def _answer(self, newer_than: int, future: Future[bytes]) -> None:
        if self.version > newer_than:
            future.set_result(self.present())
        else:
            self._waiting.append((newer_than, future))


Replicas = Callable[..., ScriptedReplica]


@pytest.fixture(name="replica")
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    made: list[ScriptedReplica] = []

    def make(handler: Callable[[Call], None] | None = None, **options: Any) -> ScriptedReplica:
        made.append(ScriptedReplica(tmp_path, f"r{len(made)}", handler, **options))
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(OSError):
            each.die()


@pytest.fixture(name="connect")
def connecting() -> Iterator[Callable[[Cluster], DeploymentHandle]]:
    def to(cluster: Cluster) -> DeploymentHandle:
        caller._set(caller.Caller("n", TOKEN, cluster))
        return DeploymentHandle("D", "app")

    yield to
    caller.reset()


def silent(call: Call) -> None:
    """Takes a call and never answers."""
