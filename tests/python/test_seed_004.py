"""The first introduction to RayServe, as it was written; see `seed_scripts`."""

from __future__ import annotations

from seed_scripts import script

# "Serve a stateless function", which the document only includes.
QUICKSTART_FUNCTION = [
    """
    import requests
    from ray import serve

    serve.init()

    def greet(flask_request):
        return "hello " + flask_request.args.get("name", "stranger")

    serve.create_backend("greet", greet)
    serve.create_endpoint("greet", "/greet")
    serve.set_traffic("greet", {"greet": 1.0})

    assert requests.get("http://127.0.0.1:8000/greet").text == "hello stranger"
    assert requests.get("http://127.0.0.1:8000/greet?name=serve").text == "hello serve"
    """
]

# "Serve a stateful class", which the document only includes.
QUICKSTART_CLASS = [
    """
    import requests
    from ray import serve

    serve.init()

    class Counter:
        def __init__(self):
            self.count = 0

        def __call__(self, flask_request):
            self.count += 1
            return {"count": self.count}

    serve.create_backend("counter", Counter)
    serve.create_endpoint("counter", "/counter")
    serve.set_traffic("counter", {"counter": 1.0})

    assert [requests.get("http://127.0.0.1:8000/counter").json()["count"] for _ in range(3)] == [1, 2, 3]
    """
]

CONCEPTS = [
    """
    from ray import serve
    serve.init() # initializes serve and Ray
    """,
    """
    serve.create_endpoint("simple_endpoint", "/simple")
    """,
    "assert serve.list_endpoints()['simple_endpoint']['methods'] == ['GET']",
    """
    serve.delete_endpoint("simple_endpoint")
    """,
    "assert serve.list_endpoints() == {}",
    """
    def handle_request(flask_request):
      return "hello world"

    class RequestHandler:
      def __init__(self):
          self.msg = "hello, world!"

      def __call__(self, flask_request):
          return self.msg

    serve.create_backend("simple_backend", handle_request)
    serve.create_backend("simple_backend_class", RequestHandler)
    """,
    # What the next block names has been deleted above.
    """
    serve.create_endpoint("simple_endpoint", "/simple")
    """,
    """
    serve.set_traffic("simple_backend", {"simple_endpoint": 1.0})
    """,
    """
    import requests
    print(requests.get("http://127.0.0.1:8000/-/routes", timeout=0.5).text)
    """,
    """
    assert requests.get("http://127.0.0.1:8000/simple").text == "hello world"
    # "the backend must not be use by any endpoints in order to be delete"
    serve.delete_endpoint("simple_endpoint")
    """,
    """
    serve.delete_backend("simple_backend")
    """,
    """
    # "Once a backend is deleted, its tag can be reused."
    serve.create_backend("simple_backend", handle_request)
    """,
]

CONFIGURING = [
    """
    import os
    import requests
    from ray import serve
    serve.init()

    def handle_request(flask_request):
        return f"hello from {os.getpid()}"
    """,
    """
    config = {"num_replicas": 2}
    serve.create_backend("my_scaled_endpoint_backend", handle_request, config=config)
    """,
    """
    # "This will scale out the number of workers that can accept requests."
    assert serve.list_backends()["my_scaled_endpoint_backend"]["num_replicas"] == 2
    serve.create_endpoint("scaled", "/scaled")
    serve.set_traffic("scaled", {"my_scaled_endpoint_backend": 1.0})
    assert len({requests.get("http://127.0.0.1:8000/scaled").text for _ in range(50)}) == 2

    # The backends that the next block names.
    def one(flask_request):
        return "one"

    class Other:
        def __call__(self, flask_request):
            return "other"

    serve.create_backend("my_endpoint_backend", one)
    serve.create_backend("my_endpoint_backend_class", Other)
    """,
    """
    serve.create_endpoint("endpoint_identifier_split", "/split", methods=["GET", "POST"])

    # splitting traffic 70/30
    serve.set_traffic("endpoint_identifier_split", {"my_endpoint_backend": 0.7, "my_endpoint_backend_class": 0.3})
    """,
    """
    texts = [requests.post("http://127.0.0.1:8000/split").text for _ in range(100)]
    assert (texts.count("one"), texts.count("other")) == (70, 30), texts
    assert requests.put("http://127.0.0.1:8000/split").status_code == 405
    """,
    """
    class BatchingExample:
        def __init__(self):
            self.count = 0

        @serve.accept_batch
        def __call__(self, flask_request):
            self.count += 1
            batch_size = serve.context.batch_size
            return [self.count] * batch_size

    serve.create_endpoint("counter1", "/increment")

    config = {"max_batch_size": 5}
    serve.create_backend("counter1", BatchingExample, config=config)
    serve.set_traffic("counter1", {"counter1": 1.0})
    """,
    """
    # Requests of one batch see the same count, and at most five do.
    from collections import Counter
    from concurrent.futures import ThreadPoolExecutor

    assert serve.list_backends()["counter1"] == {"accepts_batches": True, "num_replicas": 1, "max_batch_size": 5}
    assert requests.get("http://127.0.0.1:8000/increment").json() == 1
    with ThreadPoolExecutor(20) as pool:
        counts = Counter(pool.map(lambda _: requests.get("http://127.0.0.1:8000/increment").json(), range(200)))
    assert sum(counts.values()) == 200
    assert max(counts.values()) <= 5, counts
    assert sorted(counts) == list(range(2, 2 + len(counts))), counts
    """,
]


def run(document: list[str], run_script, port: int) -> str:
    ran = run_script(script(document, port), timeout=150)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("the end\n")
    return ran.stdout


def test_a_stateless_function_is_served(run_script, free_port: int) -> None:
    run(QUICKSTART_FUNCTION, run_script, free_port)


def test_a_stateful_class_is_served(run_script, free_port: int) -> None:
    run(QUICKSTART_CLASS, run_script, free_port)


def test_the_key_concepts_run_as_written(run_script, free_port: int) -> None:
    assert '{"/simple":["simple_endpoint",["GET"]]}\n' in run(CONCEPTS, run_script, free_port)


def test_the_configuration_of_backends_runs_as_written(run_script, free_port: int) -> None:
    run(CONFIGURING, run_script, free_port)
