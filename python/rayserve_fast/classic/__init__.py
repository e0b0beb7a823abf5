"""The older APIs of Ray Serve, each as a thin adapter on today's core.

What is deployed here is an application like any other: same controller, same replicas, same data plane. Only what the
older handles return is different, a `ray.ObjectRef`, and that is `bridge.py`'s.
"""
