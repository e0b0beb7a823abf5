"""The proxy actor of one node: a thin shell around `_core.Proxy`, whose Rust threads do all the work.

It only starts, publishes and waits; no request ever touches its Python side. After a crash Ray restarts it and it
serves again from the last snapshot in its node's file, whether or not there is a controller at that moment; it takes
the port that it had, also when the configuration says 0.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rayserve_fast.controlplane import sockets
from rayserve_fast.controlplane.options import (
    ClusterOptions,
    forwarded_allow_ips,
    prefer_local_node,
    session_header,
)
from rayserve_fast.controlplane.process import Place, serve_at_normal_priority


class ProxyActor:
    """One node's HTTP entrance."""

    def __init__(self, options: ClusterOptions, token: bytes, node_id: str) -> None:
        self._options = options
        self._token = token
        self._node_id = node_id
        self._dir = sockets.directory(token)
        self._port_file = f"{self._dir}/p-{node_id[:8]}.port"
        self._core: Any = None
        self._routing: Any = None
        self._address: tuple[str, int] | None = None
        if os.path.exists(self._port_file):  # this node had one that died
            with suppress(OSError):  # `start` tries again, and tells the controller why not
                self._start()

    async def start(self, snapshot: bytes | None) -> tuple[str, int]:
        """Listen, once; the address. Raises OSError naming host and port when the port is taken."""
        if self._address is None:
            self._address = await asyncio.to_thread(self._start)
        if snapshot is not None:
            with suppress(ValueError):  # it listens all the same; `publish`, which follows, tells why not
                self._publish(snapshot)
        return self._address

    async def place(self) -> Place:
        """Where this process runs."""
        return Place.here()

    async def publish(self, snapshot: bytes) -> None:
        """Swap in a newer snapshot; an older one is ignored. Raises ValueError if it cannot be read."""
        self._publish(snapshot)

    async def wait_linked(self, replica_ids: list[str], timeout_s: float) -> list[str]:
        """The replicas to which not every shard has a link after at most `timeout_s`."""
        missing: list[str] = await asyncio.to_thread(self._core.wait_linked, replica_ids, timeout_s)
        return missing

    async def counters(self) -> dict[str, int]:
        """What the Rust side counts."""
        counters: dict[str, int] = self._core.counters()
        return counters

    async def traffic(self) -> str:
        """What the splits have counted, as JSON; `_core.pyi` says what stands in it."""
        traffic: str = self._core.traffic()
        return traffic

    async def batches(self) -> dict[str, Any]:
        """What the Rust side counts of batches, by `app#deployment`; see `_core.Proxy.batches`."""
        batches: dict[str, Any] = json.loads(self._core.batches())
        return batches

    async def drain(self) -> None:
        """Fail the health check, so that load balancers go elsewhere; requests are served as before."""
        self._core.drain()

    async def watch(self) -> None:
        """Never returns; fails when this process dies."""
        await asyncio.Event().wait()

    async def shutdown(self, timeout_s: float, clean: bool) -> None:
        """Stop listening; what is in flight has `timeout_s` to finish. `clean`: Serve ends, no file stays."""
        if self._core is not None:
            await asyncio.to_thread(self._core.shutdown, timeout_s)
        if clean:
            sockets.remove(self._dir)

    def _start(self) -> tuple[str, int]:
        from rayserve_fast import _core

        serve_at_normal_priority()
        self._lock = sockets.prepare(self._dir)
        sockets.sweep(os.path.dirname(self._dir))
        config = asdict(self._options)
        config = {k: v for k, v in config.items() if k not in ("proxy_location", "placement_notice_s")}
        config |= {
            "port": self._options.port or self._last_port(),
            "shards": self._options.shards or max(1, (os.cpu_count() or 1) // 2),  # replicas need the other half
            "node_id": self._node_id,
            "token": self._token.hex(),
            "session_header": session_header(),
            "prefer_local_node": prefer_local_node(),
            "forwarded_allow_ips": forwarded_allow_ips(),
            "snapshot_path": f"{self._dir}/s-{self._node_id[:8]}.json",
        }
        self._core = _core.Proxy(json.dumps(config).encode())
        address: tuple[str, int] = self._core.start()
        with open(self._port_file, "w") as f:
            f.write(str(address[1]))
        self._address = address
        return address

    def _publish(self, snapshot: bytes) -> None:
        if self._routing is None and b'"custom":' in snapshot:  # no thread and no such code before that
            from rayserve_fast.routing import HttpRouting

            self._routing = HttpRouting(self._core, self._node_id)
        self._core.publish(snapshot)

    def _last_port(self) -> int:
        try:
            with open(self._port_file) as f:
                return int(f.read())
        except (OSError, ValueError):
            return 0
