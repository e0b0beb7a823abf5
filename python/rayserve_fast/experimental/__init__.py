"""Where `ray.serve.experimental` has its routers; they are defined in `request_router.py`."""
