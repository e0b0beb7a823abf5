"""Ray Serve and this project side by side: one cluster, one driver, each with its own actors, routes and end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SCRIPT = """
import socket, sys
import ray, requests
import rayserve_fast as ours
try:
    import ray.serve as theirs
except ImportError as error:
    sys.exit(f"no Ray Serve: {error}")

def free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

def application(serve, word):
    @serve.deployment(name="Same")
    class Same:
        async def __call__(self, request):
            return word + request.url.path
        def shout(self, text):
            return word + text.upper()
    return Same.bind()

def get(port):
    return requests.get(f"http://127.0.0.1:{port}/a/b", timeout=20).text

ray.init(address="local", num_cpus=8, include_dashboard=False)
ports, handles = {}, {}
for serve, word in [(theirs, "theirs "), (ours, "ours ")]:
    ports[word] = free()
    serve.start(http_options={"host": "127.0.0.1", "port": ports[word]})
    handles[word] = serve.run(application(serve, word), name="same", route_prefix="/a")
for word, port in ports.items():
    assert get(port) == word + "/a/b", get(port)
    assert handles[word].shout.remote("x").result() == word + "X"
assert theirs.status().applications["same"].status == "RUNNING"
assert ours.status().applications["same"].status == "RUNNING"
actors = ray.util.list_named_actors(all_namespaces=True)
names = {each["name"] for each in actors if each["namespace"] == "rayserve_fast"}
assert len(names) == 3 and all(name.startswith("SERVE_") for name in names), names
ends, stays = (ours, "theirs ") if sys.argv[1] == "ours" else (theirs, "ours ")
ends.shutdown()
assert get(ports[stays]) == stays + "/a/b"
assert handles[stays].shout.remote("y").result() == stays + "Y"
print("both")
for serve in (ours, theirs):
    serve.shutdown()
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_answer_in_one_cluster_and_outlive_each_other(run_script: Callable[..., Any], first: str) -> None:
    outcome = run_script(SCRIPT, first, timeout=110)
    if "no Ray Serve" in outcome.stderr:
        pytest.skip(f'needs the dependencies of "ray[serve]" ({outcome.stderr.strip().splitlines()[-1]})')
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "both" in outcome.stdout
