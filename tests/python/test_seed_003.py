"""The key concepts of the `.deploy()` era and the first deployment graph, as they were written, run as scripts.

Text replacement changes two things: the imports, which is the whole migration, and the port, since 8000 may be taken
here. What the text around an example implies (an application that is deployed already, a second script) is made by the
lines before and after it; the assertions are what the text says happens.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pytest

# A Ray of its own with CPUs to spare, and Serve on a free port; `serve.start` finds both running.
PRELUDE = """
import os, subprocess, sys
import ray, requests
from rayserve_fast import serve
ray.init(address="local", num_cpus=8, include_dashboard=False)
serve.start(http_options={{"port": {port}}})
"""

DEPLOYMENT = """
    @serve.deployment
    class MyFirstDeployment:
        # Take the message to return as an argument to the constructor.
        def __init__(self, msg):
            self.msg = msg

        def __call__(self, request):
            return self.msg

        def other_method(self, arg):
            return self.msg


    MyFirstDeployment.deploy("Hello world!")
    """
AFTER_DEPLOYMENT = """
assert requests.get("http://127.0.0.1:8000/MyFirstDeployment").text == "Hello world!"  # HTTP, to __call__
assert ray.get(MyFirstDeployment.get_handle().other_method.remote("x")) == "Hello world!"  # the ServeHandle API
"""
OPTIONS = """
    MyFirstDeployment.options(name="hello_service").deploy("Hello!")
    MyFirstDeployment.options(name="hi_service").deploy("Hi!")
    """
AFTER_OPTIONS = """
assert requests.get("http://127.0.0.1:8000/hello_service").text == "Hello!"
assert requests.get("http://127.0.0.1:8000/hi_service").text == "Hi!"
for name in ("hello_service", "hi_service"):
    serve.get_deployment(name).delete()

@serve.deployment
class A:
    pass

A.deploy()
"""
LISTING = """
    listed = serve.list_deployments()

    # Returns the same object as the original MyFirstDeployment object.
    # This can be used to redeploy, get a handle, etc.
    deployment = serve.get_deployment("MyFirstDeployment")
    """
AFTER_LISTING = """
assert repr(listed) == (
    "{'MyFirstDeployment': Deployment(name=MyFirstDeployment,version=None,route_prefix=/MyFirstDeployment), "
    "'A': Deployment(name=A,version=None,route_prefix=/A)}"
)
assert deployment.name == MyFirstDeployment.name
assert deployment.init_args == ("Hello world!",)
deployment.deploy("Again!")  # redeploy
assert ray.get(deployment.get_handle().remote(None)) == "Again!"  # get a handle
deployment.delete()  # etc.
assert list(serve.list_deployments()) == ["A"]
"""

HTTP = """
    @serve.deployment(name="http_deployment", route_prefix="/api")
    class HTTPDeployment:
        def __call__(self, request):
            return "Hello world!"
    """
AFTER_HTTP = "\nHTTPDeployment.deploy()\n"
QUERY = """
    import requests

    print(requests.get("http://127.0.0.1:8000/api").text)
    """
AFTER_QUERY = """
assert requests.get("http://127.0.0.1:8000/api/below/it").text == "Hello world!"  # and any subpaths
assert requests.get("http://127.0.0.1:8000/http_deployment").status_code == 404
assert requests.get("http://127.0.0.1:8000/apix").status_code == 404
"""
HANDLE = """
    # To get a handle from the same script, use the Deployment object directly:
    handle = HTTPDeployment.get_handle()

    # To get a handle from a different script, reference it by name:
    handle = serve.get_deployment("http_deployment").get_handle()

    print(ray.get(handle.remote()))
    """

PROCESSES = """
    import os
    from random import random

    import requests
    import starlette
    from starlette.requests import Request

    import ray
    from ray import serve

    #
    # A simple example model stored in a pickled format at an accessible path
    # that can be reloaded and deserialized into a model instance. Once deployed
    # in Ray Serve, we can use it for prediction. The prediction is a fake condition,
    # based on threshold of weight greater than 0.5.
    #


    class Model:
        def __init__(self, path):
            self.path = path

        def predict(self, data):
            return random() + data if data > 0.5 else data


    @serve.deployment
    class Deployment:
        # Take in a path to load your desired model
        def __init__(self, path: str) -> None:
            self.path = path
            self.model = Model(path)
            # Get the pid on which this deployment is running on
            self.pid = os.getpid()

        # Deployments are callable. Here we simply return a prediction from
        # our request
        def __call__(self, starlette_request) -> str:
            # Request came via an HTTP
            if isinstance(starlette_request, starlette.requests.Request):
                data = starlette_request.query_params['data']
            else:
                # Request came via a ServerHandle API method call.
                data = starlette_request
            pred = self.model.predict(float(data))
            return f"(pid: {self.pid}); path: {self.path}; data: {float(data):.3f}; prediction: {pred:.3f}"


    if __name__ == '__main__':
        # Start a Ray Serve instance. This will automatically start
        # or connect to an existing Ray cluster.
        serve.start()

        # Create two distinct deployments of the same class as
        # two replicas. Associate each deployment with a unique 'name'.
        # This name can be used as to fetch its respective serve handle.
        # See code below for method 1.
        Deployment.options(name="rep-1", num_replicas=2).deploy("/model/rep-1.pkl")
        Deployment.options(name="rep-2", num_replicas=2).deploy("/model/rep-2.pkl")

        # Get the current list of deployments
        print(serve.list_deployments())

        print("ServerHandle API responses: " + "--" * 5)

        # Method 1) Access each deployment using the ServerHandle API
        for _ in range(2):
            for d_name in ["rep-1", "rep-2"]:
                # Get handle to the each deployment and invoke its method.
                # Which replica the request is dispatched to is determined
                # by the Router actor.
                handle = serve.get_deployment(d_name).get_handle()
                print(f"handle name : {d_name}")
                print(f"prediction  : {ray.get(handle.remote(random()))}")
                print("-" * 2)

        print("HTTP responses: " + "--" * 5)

        # Method 2) Access deployment via HTTP Request
        for _ in range(2):
            for d_name in ["rep-1", "rep-2"]:
                # Send HTTP request along with data payload
                url = f"http://127.0.0.1:8000/{d_name}"
                print(f"handle name : {d_name}")
                print(f"prediction  : {requests.get(url, params= {'data': random()}).text}")
    """

GRAPH = """
    import ray
    from ray import serve
    from ray.serve.dag import InputNode
    from ray.serve.drivers import DAGDriver


    @serve.deployment
    def preprocess(inp: int):
        return inp + 1


    @serve.deployment
    class Model:
        def __init__(self, increment: int):
            self.increment = increment

        def predict(self, inp: int):
            return inp + self.increment


    with InputNode() as inp:
        model = Model.bind(increment=2)
        output = model.predict.bind(preprocess.bind(inp))
        serve_dag = DAGDriver.bind(output)

    handle = serve.run(serve_dag)
    assert ray.get(handle.predict.remote(1)) == 4
    """


@pytest.fixture
def run(run_script: Any, free_port: int) -> Any:
    """Runs examples, indented as above, and plain lines between them; gives what they printed."""

    def run(*parts: str) -> str:
        script = "".join(textwrap.dedent(part) for part in parts)
        migrated = script.replace("from ray import serve", "from rayserve_fast import serve")
        migrated = migrated.replace("from ray.serve.", "from rayserve_fast.").replace(":8000", f":{free_port}")
        ran = run_script(PRELUDE.format(port=free_port) + migrated + "\nprint('the end')\n", timeout=110)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert ran.stdout.endswith("the end\n")
        return ran.stdout

    return run


def test_deployments_are_deployed_named_and_listed(run: Any) -> None:
    run(DEPLOYMENT, AFTER_DEPLOYMENT, OPTIONS, AFTER_OPTIONS, LISTING, AFTER_LISTING)


def test_http_ingress_and_serve_handle(run: Any) -> None:
    assert run(HTTP, AFTER_HTTP, QUERY, AFTER_QUERY, HANDLE).startswith("Hello world!\nHello world!\n")


def test_each_deployment_has_processes_of_its_own(run: Any) -> None:
    out = run(PROCESSES)
    assert out.startswith(
        "{'rep-1': Deployment(name=rep-1,version=None,route_prefix=/rep-1), "
        "'rep-2': Deployment(name=rep-2,version=None,route_prefix=/rep-2)}\nServerHandle API responses: ----------\n"
    )
    line = re.compile(
        r"handle name : (rep-[12])\nprediction  : "
        r"\(pid: (\d+)\); path: /model/(rep-[12])\.pkl; data: (0\.\d{3}); prediction: ([01]\.\d{3})\n"
    )
    answers = line.findall(out)
    assert [name for name, *_ in answers] == ["rep-1", "rep-2"] * 4  # by handles twice, then by HTTP
    assert "HTTP responses: ----------\n" in out
    processes: dict[str, set[str]] = {}
    for name, pid, path, data, prediction in answers:
        assert path == name
        assert float(prediction) == float(data) or float(data) >= 0.5
        processes.setdefault(name, set()).add(pid)
    assert not processes["rep-1"] & processes["rep-2"]


def test_a_graph_of_a_function_and_a_model(run: Any) -> None:
    run(GRAPH)
