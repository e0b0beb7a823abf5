"""Start and end of Serve, each in a process and a Ray of its own."""

from __future__ import annotations

import socket
from typing import Any

HEADER = """
import os, re, sys, time, threading
from pathlib import Path
import ray
from rayserve_fast import serve
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=128 << 20)

@serve.deployment
async def f(request):
    return str(os.getpid())

def workers():
    # Our processes in this Ray, by their titles.
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            title = (p / "cmdline").read_bytes().decode(errors="replace")
            if re.match("ray::.*(Controller|ProxyActor|Replica)", title):
                if os.environ["RAY_TMPDIR"] in str([os.readlink(x) for x in (p / "fd").iterdir()]):
                    found.append(title.rstrip("\\0"))
        except OSError:
            continue
    return found
"""


def check(result: Any) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    out: str = result.stdout + result.stderr
    return out


def test_shutdown_leaves_no_process_no_socket_and_no_key(run_script: Any) -> None:
    out = check(
        run_script(
            HEADER
            + """
from rayserve_fast.controlplane import client, sockets
from ray.experimental.internal_kv import _internal_kv_list
serve.start(http_options={"port": 0})
serve.run_many([serve.RunTarget(f.options(num_replicas=2).bind(), "a", "/a"), serve.RunTarget(f.bind(), "b", "/b")])
directory = sockets.directory(client.cluster_token())
assert os.listdir(directory)
assert len(workers()) >= 5, workers()
serve.shutdown()
assert workers() == [], workers()
assert ray.util.list_named_actors(all_namespaces=True) == []
assert not os.path.exists(directory)
assert _internal_kv_list(b"", namespace=b"rayserve_fast") == []
assert serve.status().applications == {}
serve.shutdown()
serve.start(http_options={"port": 0})
serve.run(f.bind())
serve.shutdown()
print("all gone")
"""
        )
    )
    assert "all gone" in out
    assert "Nothing to shut down" in out


def test_a_taken_port_is_named_and_nothing_is_left(run_script: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        out = check(
            run_script(
                HEADER
                + f"""
try:
    serve.start(http_options={{"port": {port}}})
except RuntimeError as e:
    print("REFUSED", e)
assert workers() == [], workers()
serve.start(http_options={{"port": 0}})
serve.run(f.bind())
serve.shutdown()
"""
            )
        )
    (line,) = [line for line in out.splitlines() if line.startswith("REFUSED")]
    assert f"127.0.0.1:{port}" in line


def test_run_starts_ray_and_the_options_of_a_running_serve_stay(run_script: Any) -> None:
    out = check(
        run_script(
            """
import os, ray
os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"
from rayserve_fast import serve

@serve.deployment
async def f(request):
    return "x"

serve.start(http_options={"port": 0})
serve.start(http_options={"port": 12345})
assert ray.is_initialized()
serve.run(f.bind(), route_prefix="/x")
serve.shutdown()
ray.shutdown()
"""
        )
    )
    assert "differs from the existing one in the following fields: ['port']" in out
    assert "Application 'default' is ready at http://127.0.0.1:" in out


def test_replicas_without_room_are_reported_and_waited_for(run_script: Any) -> None:
    out = check(
        run_script(
            HEADER
            + """
from dataclasses import replace
from rayserve_fast import api
from rayserve_fast.controlplane import client
options = replace(api._cluster_options(None, {"port": 0}), placement_notice_s=1.0)
client.ready(client.start(options))
serve.run(f.options(ray_actor_options={"num_cpus": 3}).bind(), name="small", route_prefix="/small")
threading.Timer(4, lambda: serve.delete("small")).start()
serve.run(f.options(ray_actor_options={"num_cpus": 4}).bind(), name="big", route_prefix="/big")
print(serve.status().applications["big"].status)
serve.run(f.options(name="renamed", ray_actor_options={"num_cpus": 4}).bind(), name="big", route_prefix="/big")
print(list(serve.status().applications["big"].deployments))
serve.shutdown()
"""
        )
    )
    assert "['renamed']" in out, "the one that it replaces makes room"
    assert "Each needs 4 CPU" in out
    assert "free in the cluster: 1 CPU" in out
    assert "RUNNING" in out


def test_a_replica_that_does_not_leave_in_time_is_killed(run_script: Any) -> None:
    out = check(
        run_script(
            HEADER
            + """
import requests
begun = os.path.abspath("begun")
@serve.deployment(graceful_shutdown_timeout_s=1)
class Stuck:
    def __call__(self, request):
        open(begun, "w").close()
        time.sleep(600)

serve.start(http_options={"port": 0})
serve.run(Stuck.bind())
from rayserve_fast.controlplane import client
_, (host, port) = client.ready(client.find())
def ask():
    try: print("GOT", requests.get(f"http://{host}:{port}/", timeout=60).status_code)
    except requests.RequestException as e: print("GOT", e)
threading.Thread(target=ask).start()
while not os.path.exists(begun):
    time.sleep(0.01)
began = time.monotonic()
serve.delete("default")
assert time.monotonic() - began < 6
assert not any("Replica" in w for w in workers()), workers()
serve.shutdown()
"""
        )
    )
    assert "GOT" in out


def test_a_second_driver_inherits_nothing_of_the_first_ones_environment(run_script: Any, tmp_path: Any) -> None:
    (tmp_path / "second.py").write_text(
        """
import os, sys, ray
ray.init(address=sys.argv[1])
from rayserve_fast import serve

@serve.deployment
async def g(request):
    return f"{os.environ.get('COLOUR')} {os.path.exists('only_in_the_first.txt')} {os.environ.get('SHAPE')}"

options = {"runtime_env": {"env_vars": {"SHAPE": "round"}}}
serve.run(g.options(ray_actor_options=options).bind(), name="g", route_prefix="/g")
"""
    )
    out = check(
        run_script(
            """
import os, pathlib, subprocess, sys, ray, requests
home = pathlib.Path("first")
home.mkdir()
(home / "only_in_the_first.txt").write_text("here")
ray.init(
    address="local", num_cpus=4, include_dashboard=False, object_store_memory=128 << 20,
    runtime_env={"env_vars": {"COLOUR": "red"}, "working_dir": str(home)},
)
from rayserve_fast import serve
from rayserve_fast.controlplane import client

@serve.deployment
async def f(request):
    return f"{os.environ.get('COLOUR')} {os.path.exists('only_in_the_first.txt')}"

serve.start(http_options={"port": 0})
serve.run(f.bind(), route_prefix="/f")
subprocess.run([sys.executable, "second.py", ray.get_runtime_context().gcs_address], check=True)
_, (host, port) = client.ready(client.find())
for path in "fg":
    print("ANSWER", requests.get(f"http://{host}:{port}/{path}", timeout=30).text)
serve.shutdown()
"""
        )
    )
    assert [line for line in out.splitlines() if line.startswith("ANSWER")] == [
        "ANSWER red True",
        "ANSWER None False round",
    ]


def test_proxies_stand_where_they_are_wanted_and_reach_replicas_on_other_nodes(run_script: Any) -> None:
    out = check(
        run_script(
            """
import ray, requests
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
cluster.add_node(num_cpus=2, resources={"second": 1})
ray.init(address=cluster.address)
from rayserve_fast import serve
from rayserve_fast.controlplane.options import proxy_name

@serve.deployment(ray_actor_options={"resources": {"second": 0.1}})
async def f(request):
    return "reached"

for location in ("EveryNode", "HeadOnly", "Disabled"):
    serve.start(proxy_location=location, http_options={"port": 0})
    handle = serve.run(f.bind())
    answers = [handle.remote("x").result()]
    for node in serve.status().proxies:
        proxy = ray.get_actor(proxy_name(node), namespace="rayserve_fast")
        host, port = ray.get(proxy.__ray_call__.remote(lambda self: self._address))
        answers.append(requests.get(f"http://{host}:{port}/", timeout=30).text)
    print("ANSWERS", location, *answers)
    serve.shutdown()
assert ray.util.list_named_actors(all_namespaces=True) == []
ray.shutdown()
cluster.shutdown()
"""
        )
    )
    assert [line for line in out.splitlines() if line.startswith("ANSWERS")] == [
        "ANSWERS EveryNode reached reached reached",
        "ANSWERS HeadOnly reached reached",
        "ANSWERS Disabled reached",
    ]
