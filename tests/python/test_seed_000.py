"""The key concepts of Ray Serve 0.8, endpoints and backends, as they were written; see `seed_scripts`."""

from __future__ import annotations

from seed_scripts import script

DOCUMENT = [
    """
    from ray import serve
    serve.init() # Initializes Ray and Ray Serve.
    """,
    """
    serve.create_endpoint("simple_endpoint", "/simple", methods=["GET"])
    """,
    """
    >>> serve.list_endpoints()
    {'simple_endpoint': {'route': '/simple', 'methods': ['GET'], 'traffic': {}}}
    """,
    """
    serve.delete_endpoint("simple_endpoint")
    """,
    "assert serve.list_endpoints() == {}",
    """
    def handle_request(flask_request):
        return "hello world"

    class RequestHandler:
        # Take the message to return as an argument to the constructor.
        def __init__(self, msg):
            self.msg = msg

        def __call__(self, flask_request):
            return self.msg

    serve.create_backend("simple_backend", handle_request)
    # Pass in the message that the backend will return as an argument.
    # If we call this backend, it will respond with "hello, world!".
    serve.create_backend("simple_backend_class", RequestHandler, "hello, world!")
    """,
    """
    >> serve.list_backends()
    {
        'simple_backend': {'accepts_batches': False, 'num_replicas': 1, 'max_batch_size': None},
        'simple_backend_class': {'accepts_batches': False, 'num_replicas': 1, 'max_batch_size': None},
    }
    >> serve.delete_backend("simple_backend")
    >> serve.list_backends()
    {
        'simple_backend_class': {'accepts_batches': False, 'num_replicas': 1, 'max_batch_size': None},
    }
    """,
    # What the next block names has been deleted above.
    """
    serve.create_endpoint("simple_endpoint", "/simple", methods=["GET"])
    serve.create_backend("simple_backend", handle_request)
    """,
    """
    serve.set_traffic("simple_backend", {"simple_endpoint": 1.0})
    """,
    "assert serve.list_endpoints()['simple_endpoint']['traffic'] == {'simple_backend': 1.0}",
    """
    import requests
    print(requests.get("http://127.0.0.1:8000/-/routes", timeout=0.5).text)
    """,
    """
    # The endpoint answers by its backend, and its method is checked.
    assert requests.get("http://127.0.0.1:8000/simple").text == "hello world"
    assert requests.post("http://127.0.0.1:8000/simple").status_code == 405

    # "a backend cannot be deleted while it is in use by an endpoint"
    try:
        serve.delete_backend("simple_backend")
    except ValueError as error:
        assert "is used by endpoint 'simple_endpoint'" in str(error), error
    else:
        raise AssertionError("it was in use")

    # "For instance, you can route 50% of traffic to Model A and 50% of traffic to Model B."
    serve.set_traffic("simple_endpoint", {"simple_backend": 0.5, "simple_backend_class": 0.5})
    texts = [requests.get("http://127.0.0.1:8000/simple").text for _ in range(10)]
    assert sorted(texts) == ["hello world"] * 5 + ["hello, world!"] * 5, texts

    # "an endpoint must be deleted in order to delete the backends", and its backends stay
    serve.delete_endpoint("simple_endpoint")
    assert requests.get("http://127.0.0.1:8000/simple").status_code == 404
    assert set(serve.list_backends()) == {"simple_backend", "simple_backend_class"}
    serve.delete_backend("simple_backend")
    """,
]


def test_the_document_runs_as_written(run_script, free_port: int) -> None:
    ran = run_script(script(DOCUMENT, free_port), timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert '{"/simple":["simple_endpoint",["GET"]]}\n' in ran.stdout
    assert ran.stdout.endswith("the end\n")
