"""Advanced topics of Ray Serve 1.2, the Client API, as they were written; see `seed_scripts`."""

from __future__ import annotations

import pytest
from seed_scripts import script

# "For a more hands-on take ..." assumes a running instance and a client of it.
START = """
    from ray import serve
    import requests
    client = serve.start()
    """

ROUTES = [
    START,
    # The dots stand for what the reader writes.
    """
    def my_backend(request):
        username = request.path_params["username"]
        ...
        return f"hello {username}"
    """,
    """
    client.create_backend("my_backend", my_backend)
    """,
    """
    client.create_endpoint("my_endpoint", backend="my_backend", route="/api/{username}")
    """,
    """
    assert requests.get("http://127.0.0.1:8000/api/ada").text == "hello ada"
    """,
    """
    def f(request):
        return {name: [type(value).__name__, value] for name, value in request.path_params.items()}

    client.create_backend("f", f)
    """,
    """
    client.create_endpoint(
      "complex", backend="f", route="/api/{user_id:int}/{number:float}")
    """,
    """
    answer = requests.get("http://127.0.0.1:8000/api/123/3.14")
    assert answer.json() == {"user_id": ["int", 123], "number": ["float", 3.14]}, answer.text
    assert requests.get("http://127.0.0.1:8000/api/x/3.14").status_code == 404
    assert requests.post("http://127.0.0.1:8000/api/123/3.14").status_code == 405
    """,
]

HANDLES = [
    START,
    """
    import asyncio

    def double(request):
        return 2 * request.data

    client.create_backend("double", double)
    client.create_endpoint("double", backend="double")

    # "When you set sync=True (the default) ... handle.remote() should return a Ray ObjectRef."
    for handle in (client.get_handle("double"), client.get_handle("double", sync=True)):
        ref = handle.remote(21)
        assert isinstance(ref, ray.ObjectRef)
        assert ray.get(ref) == 42

    # "you need to call it with await handle.remote() to return a Ray ObjectRef"
    async def main():
        handle = client.get_handle("double", sync=False)
        ref = await handle.remote(21)
        assert isinstance(ref, ray.ObjectRef)
        assert await ref == 42

    asyncio.run(main())
    """,
]

CONFIG = [
    START,
    """
    # "you will create a BackendConfig ... to set the properties of a particular backend"
    import os

    def pid(request):
        return str(os.getpid())

    config = serve.BackendConfig(num_replicas=2)
    client.create_backend("pid", pid, config=config)
    client.create_endpoint("pid", backend="pid", route="/pid")
    assert len({requests.get("http://127.0.0.1:8000/pid").text for _ in range(50)}) == 2
    assert client.get_backend_config("pid").num_replicas == 2
    client.update_backend_config("pid", serve.BackendConfig(num_replicas=1))
    assert client.list_backends()["pid"].num_replicas == 1
    """,
]


@pytest.mark.parametrize("document", [ROUTES, HANDLES, CONFIG], ids=["routes", "handles", "config"])
def test_the_document_runs_as_written(document: list[str], run_script, free_port: int) -> None:
    ran = run_script(script(document, free_port), timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("the end\n")


LOCATIONS = """
import ray
from rayserve_fast import serve
ray.init(address="local", num_cpus=2, include_dashboard=False)
"""


def test_the_location_of_the_http_servers_is_an_option(run_script, free_port: int) -> None:
    started = [
        f"""
        client = serve.start(http_options={{"location": {location}, "port": {free_port}}})
        assert len(serve.status().proxies) == {servers}, {location}
        client.shutdown()
        """
        for location, servers in (('"HeadOnly"', 1), ('"EveryNode"', 1), ('"NoServer"', 0), ("None", 0))
    ]
    ran = run_script(script(started, free_port, LOCATIONS), timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("the end\n")
    assert "Deprecat" not in ran.stderr  # older spellings work silently
