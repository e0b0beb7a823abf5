"""What `ray.serve.drivers` had: `DAGDriver`, the ingress of a deployment graph. See docs/classic.md.

>>> from rayserve_fast import serve
>>> from rayserve_fast.dag import InputNode
>>> @serve.deployment
... def double(n: int) -> int:
...     return 2 * n
>>> with InputNode() as inp:
...     graph = double.bind(double.bind(inp))
>>> DAGDriver.options(route_prefix="/fourfold").bind(graph)
Application(DAGDriver)
"""

from rayserve_fast.classic.driver import graph_driver

__all__ = ["DAGDriver"]

DAGDriver = graph_driver()
