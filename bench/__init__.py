"""The benchmark: rayserve-fast and its peers, measured in one run on one machine.

Run it with `python -m bench` from the repository (`--help` lists the options). The driver needs only the standard
library; every peer lives in a virtual environment of its own under `bench/.venvs`.
"""
