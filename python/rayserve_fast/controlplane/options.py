"""Names and cluster-wide settings of the control plane.

`ClusterOptions` is fixed when the controller is first started and the same for every proxy; it is validated by
`rayserve_fast.config` in the driver and travels as a plain value.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

#: Everything of this project lives in this Ray namespace, so that Ray Serve can run in the same cluster.
NAMESPACE = "rayserve_fast"
CONTROLLER_NAME = "SERVE_CONTROLLER_ACTOR"

#: How long a new replica may take to be linked by every live proxy before it counts as ready all the same.
LINK_WAIT_S = 5.0
#: How long `serve.shutdown` waits for drains before it kills what is left, as in the reference.
SHUTDOWN_WAIT_S = 30.0


@dataclass(frozen=True)
class ClusterOptions:
    """What `serve.start` fixes for the life of the controller."""

    host: str
    port: int  # 0: a free one, which a restarted proxy takes again
    root_path: str
    request_timeout_s: float | None
    keep_alive_timeout_s: float
    max_head_bytes: int
    max_body_bytes: int | None
    shards: int | None
    proxy_location: str
    placement_notice_s: float = 30.0  # a replica that is not placed after this is reported to whoever waits


def proxy_name(node_id: str) -> str:
    """The name of a node's proxy actor."""
    return f"SERVE_PROXY_ACTOR-{node_id}"


def session_header() -> str:
    """The HTTP header that names a request's session; `-` and `_` count as the same in it.

    Proxies and replicas look into their own environment, as those of the reference do: the variable is set on nodes.
    """
    return os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY") or "x-session-id"


def prefer_local_node() -> bool:
    """Whether a proxy sends requests to replicas of its own node while one has room, as the reference's does."""
    return os.environ.get("RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING", "1") == "1"


def forwarded_allow_ips() -> str:
    """The reverse proxies whose `X-Forwarded-*` headers are believed: uvicorn's variable, which rules in Ray Serve."""
    return os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1,::1")
