"""Desired state in, running replicas and published snapshots out; no request passes here."""
