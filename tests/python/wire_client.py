"""A caller of replicas in plain Python: frames made with `struct` from the tables of ARCHITECTURE.md.

It shares no code with the Rust side and so checks the contract, not the implementation.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import pickle
import socket
import struct
from dataclasses import dataclass, field

HELLO, CHALLENGE, PROOF, WELCOME = 1, 2, 3, 4
REQUEST, BODY, RESPONSE, CHUNK = 10, 11, 20, 21
CALL, RESULT, ERROR = 30, 31, 32
CANCEL, WINDOW, BUSY, RETURNED, DRAIN, PING, PONG, CREDIT, UNUSED = 40, 41, 42, 43, 44, 45, 46, 47, 48
BATCH = 50
FIN, FAST, GRANTED, BATCHED, LEFT = 1, 2, 4, 16, 32
USER, ABORTED, CANCELLED, NO_METHOD, WRONG_KIND = 2, 3, 4, 6, 7

_HEADER = struct.Struct("<IBBHII")


@dataclass
class Frame:
    kind: int
    flags: int
    load: int
    stream: int
    aux: int
    payload: bytes

    @property
    def fin(self) -> bool:
        return bool(self.flags & FIN)

    @property
    def head(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body bytes of a RESPONSE."""
        count, _, size = struct.unpack_from("<HHI", self.payload)
        at, headers = 8, []
        for _ in range(count):
            name, value = struct.unpack_from("<HI", self.payload, at)
            at += 6
            headers.append((self.payload[at : at + name], self.payload[at + name : at + name + value]))
            at += name + value
        assert at == 8 + size
        return headers, self.payload[at:]


@dataclass
class Answer:
    """All frames of one stream's answer, put together."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    frames: list[Frame] = field(default_factory=list)

    @property
    def last(self) -> Frame:
        return self.frames[-1]


class Refused(Exception):
    """The replica closed the link during the handshake."""


class Link:
    """One link to a replica; blocking, with a timeout on every read."""

    def __init__(self, address: str, replica_id: str, token: bytes, role: int = 1, timeout: float = 10.0) -> None:
        if address.startswith("/"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(address)
        else:
            host, port = address.rsplit(":", 1)
            self.sock = socket.create_connection((host, int(port)))
        self.sock.settimeout(timeout)
        self._buf = b""
        self._late: list[Frame] = []
        nonce, rid = os.urandom(32), replica_id.encode()
        self.send(HELLO, payload=b"RSF1" + struct.pack("<HB", 1, role) + nonce + rid)
        challenge = self._expect(CHALLENGE)
        theirs, mac = challenge.payload[:32], challenge.payload[32:]

        def expected(side: bytes) -> bytes:
            text = b"RSF1" + struct.pack("<H", 1) + side + bytes([role]) + nonce + theirs + rid
            return hmac.new(token, text, hashlib.sha256).digest()

        assert mac == expected(b"R"), "the replica knows the token"
        self.send(PROOF, payload=expected(b"C"))
        (self.max_ongoing,) = struct.unpack("<I", self._expect(WELCOME).payload)

    def send(self, kind: int, stream: int = 0, *, flags: int = 0, aux: int = 0, payload: bytes = b"") -> None:
        self.sock.sendall(frame(kind, stream, flags=flags, aux=aux, payload=payload))

    def request(self, stream: int, body: bytes = b"", *, fin: bool = True, flags: int = 0, **head: object) -> None:
        self.send(REQUEST, stream, flags=flags | (FIN if fin else 0), payload=request_head(**head) + body)

    def call(self, stream: int, method: str = "__call__", *args: object, flags: int = 0, **kwargs: object) -> None:
        self.send(CALL, stream, flags=flags, payload=call_payload(method, args, kwargs))

    def batch(self, *streams: int, flags: int = 0) -> None:
        """Has the parked requests of these streams run together."""
        self.send(BATCH, flags=flags, payload=struct.pack(f"<{len(streams)}I", *streams))

    def post_batch(self, *bodies: bytes, first: int = 1) -> list[int]:
        """Sends one batch of POST requests; their streams."""
        streams = list(range(first, first + len(bodies)))
        for stream, body in zip(streams, bodies, strict=True):
            self.request(stream, body, method="POST", flags=BATCHED)
        self.batch(*streams)
        return streams

    def frame(self) -> Frame:
        """The next frame."""
        if self._late:
            return self._late.pop(0)
        return self._read()

    def answer(self, stream: int, *, window: bool = True) -> Answer:
        """Reads until the stream's last frame; frames of other streams are kept for later."""
        answer, others = Answer(), []
        while not answer.frames or not answer.last.fin:
            got = self._late.pop(0) if self._late else self._read()
            if got.stream != stream:
                others.append(got)
                continue
            answer.frames.append(got)
            if got.kind == RESPONSE:
                answer.status = got.aux
                answer.headers, answer.body = got.head
            elif got.kind == CHUNK:
                answer.body += got.payload
                if window and not got.fin:
                    self.send(WINDOW, stream, aux=len(got.payload))
        self._late = others + self._late
        return answer

    def get(self, stream: int = 1, body: bytes = b"", **head: object) -> Answer:
        self.request(stream, body, **head)
        return self.answer(stream)

    def silent(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        if self._late:
            return False
        before = self.sock.gettimeout()
        self.sock.settimeout(seconds)
        try:
            self._late.append(self._read())
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(before)
        return False

    def close(self) -> None:
        self.sock.close()

    def _expect(self, kind: int) -> Frame:
        got = self._read()
        assert got.kind == kind, got
        return got

    def _read(self) -> Frame:
        head = _HEADER.unpack(self._exactly(16))
        return Frame(*head[1:], payload=self._exactly(head[0]))

    def _exactly(self, size: int) -> bytes:
        while len(self._buf) < size:
            try:
                more = self.sock.recv(1 << 18)
            except ConnectionResetError:
                more = b""
            if not more:
                raise Refused("the replica closed the link")
            self._buf += more
        out, self._buf = self._buf[:size], self._buf[size:]
        return out


def frame(kind: int, stream: int = 0, *, flags: int = 0, load: int = 0, aux: int = 0, payload: bytes = b"") -> bytes:
    return _HEADER.pack(len(payload), kind, flags, load, stream, aux) + payload


def request_head(
    *,
    method: str = "GET",
    path: str = "/",
    query: str = "",
    root_path: str = "",
    route: str = "/",
    request_id: str = "id-1",
    headers: list[tuple[str, str]] | None = None,
    https: bool = False,
    http_version: int = 11,
) -> bytes:
    client, server = b"127.0.0.1", b"localhost"
    parts = [part.encode("latin-1") for part in (method, path, query, root_path, route, request_id)]
    m, p, q, rp, ro, rid = parts
    pairs = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in headers or []]
    block = b"".join(struct.pack("<HI", len(n), len(v)) + n + v for n, v in pairs)
    fixed = struct.pack(
        "<BBBBHHHHHHHHIII",
        len(m), http_version, int(https), 0, len(rp), len(ro), len(rid), len(client), 5555, len(server), 8000,
        len(pairs), len(p), len(q), len(block),
    )  # fmt: skip
    return fixed + m + p + q + rp + ro + rid + client + server + block


def call_payload(method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> bytes:
    texts = [text.encode() for text in (method, "id-1", "/", "default", "", "")]
    buffers: list[pickle.PickleBuffer] = []
    encoded = pickle.dumps((args, kwargs), 5, buffer_callback=buffers.append)
    raw = [bytes(buffer.raw()) for buffer in buffers]
    return aligned(struct.pack("<6H", *map(len, texts)) + b"".join(texts), value_bytes(encoded, raw))


def value_bytes(encoded: bytes, buffers: list[bytes]) -> bytes:
    """A value: its head, the pickle, the buffers at multiples of 16."""
    lens = struct.pack("<IQ", len(buffers), len(encoded)) + b"".join(struct.pack("<Q", len(b)) for b in buffers)
    out = lens + encoded
    for buffer in buffers:
        out = aligned(out, buffer)
    return out


def aligned(out: bytes, more: bytes) -> bytes:
    """Appends at the next multiple of 16."""
    return out + bytes(-len(out) % 16) + more


def value_at(payload: bytes, at: int = 0) -> tuple[bytes, list[bytes], int]:
    """Pickle and buffers of the value that begins there, and its end."""
    count, size = struct.unpack_from("<IQ", payload, at)
    lens = struct.unpack_from(f"<{count}Q", payload, at + 12)
    start, end = at, at + 12 + 8 * count + size
    encoded, buffers = payload[end - size : end], []
    for length in lens:
        begin = end + (start - end) % 16
        end = begin + length
        buffers.append(payload[begin:end])
    assert end <= len(payload)
    return encoded, buffers, end


def value(payload: bytes) -> object:
    """Decodes a RESULT's payload."""
    encoded, buffers, end = value_at(payload)
    assert end == len(payload)
    return pickle.loads(encoded, buffers=buffers)
