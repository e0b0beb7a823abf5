"""What `ray.serve.deployment_graph` had: `InputNode`, and the handle that a constructor gets for a graph."""

from rayserve_fast.classic.graph import InputNode
from rayserve_fast.classic.plan import GraphHandle as RayServeDAGHandle

__all__ = ["InputNode", "RayServeDAGHandle"]
