"""The driver script of a peer with Ray Serve's API: starts a local Ray, deploys the applications, waits, cleans up.

`python -m bench.host '{"module": ..., "port": ..., "apps": [...], "logging_config": ...}'` prints one line of JSON when
everything is deployed (Ray's address, and the time that the first and the second deployment took) and shuts down when
its standard input closes.
"""

from __future__ import annotations

import importlib
import json
import sys
import time


def main() -> None:
    """Serve what the argument names until standard input closes."""
    import ray

    from bench import apps, calls, traffic

    wish = json.loads(sys.argv[1])
    serve = importlib.import_module(wish["module"])
    logging_config = {"logging_config": wish["logging_config"]} if wish["logging_config"] else {}
    ray.init(address="local", num_cpus=32, include_dashboard=False, object_store_memory=512 << 20)
    try:
        known = apps.applications(serve) | calls.applications(serve) | traffic.applications(serve)
        times = {}
        arranged = [name for name in wish["apps"] if name not in known]
        first, *others = [name for name in wish["apps"] if name in known] or ["async_noop"]
        started = time.monotonic()
        serve.start(http_options={"host": "127.0.0.1", "port": wish["port"]}, **logging_config)
        serve.run(known[first], name=first, route_prefix=f"/{first}", **logging_config)
        times["first_deploy_s"] = time.monotonic() - started
        if others:
            second, *others = others
            started = time.monotonic()
            serve.run(known[second], name=second, route_prefix=f"/{second}", **logging_config)
            times["next_deploy_s"] = time.monotonic() - started
        if others:
            targets = [
                serve.RunTarget(known[name], name=name, route_prefix=f"/{name}", **logging_config) for name in others
            ]
            serve.run_many(targets)
        for name in arranged:
            traffic.arranged(serve)[name]()
        print("READY " + json.dumps({"address": ray.get_runtime_context().gcs_address, "times": times}), flush=True)
        sys.stdin.read()
        if wish["module"] != "ray.serve":  # its best mode drains for 30 s; ending Ray ends it, bench ends the rest
            serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
