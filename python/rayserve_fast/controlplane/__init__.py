"""Desired state in, running replicas and published snapshots out; no request passes here.

`reconcile` and `transitions` decide and never touch Ray; `controller` is the detached actor that executes what they
decide, with `replicas` and `proxies` for the calls to the two kinds of actors; `client` is the driver's side.
"""
