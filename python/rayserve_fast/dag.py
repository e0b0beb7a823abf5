"""What `ray.serve.dag` had: `InputNode`, with which a deployment graph begins. See docs/classic.md."""

from rayserve_fast.classic.graph import InputNode

__all__ = ["InputNode"]
