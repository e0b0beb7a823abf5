"""serve.ingress: what is frozen at decoration answers on the replica, whatever kind of application it is."""

from __future__ import annotations

import inspect
import threading
from typing import Annotated, Any

import pytest
from asgi_replica import Serve, fetch, replica_of, serving  # noqa: F401 - a fixture
from fastapi import Body, FastAPI, Header, Query, Request
from fastapi.responses import PlainTextResponse
from starlette.applications import Starlette
from starlette.routing import Route

from rayserve_fast.application import build
from rayserve_fast.controlplane.spec import DeploymentID
from rayserve_fast.deployment import deployment
from rayserve_fast.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from rayserve_fast.ingress import asgi_app_of, ingress


def test_changes_after_decoration_do_not_count(serve: Serve) -> None:
    app = FastAPI()

    @app.get("/before")
    def before() -> str:
        return "before"

    cls = ingress(app)()

    @app.get("/after")
    def after() -> str:
        return "after"

    ask = serve(cls)
    assert (ask("GET", "/before").json(), ask("GET", "/after").status_code) == ("before", 404)


def test_a_method_may_mention_its_application(serve: Serve) -> None:
    app = FastAPI()

    @ingress(app)
    class View:
        @app.get("/items/{number}")
        def item(self, number: int) -> str:
            return str(app.url_path_for("item", number=str(number)))

    assert serve(View)("GET", "/items/3").json() == "/items/3"


def test_exceptions_of_handles_become_their_status(serve: Serve) -> None:
    app = FastAPI()

    @app.get("/busy")
    def busy() -> None:
        raise BackPressureError(3, 2, 429, 1.5)

    @app.get("/gone")
    def gone() -> None:
        raise DeploymentUnavailableError(DeploymentID("D", "a"))

    ask = serve(ingress(app)())
    answer = ask("GET", "/busy")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.text == BackPressureError(3, 2).message
    answer = ask("GET", "/gone")
    assert (answer.status_code, answer.text) == (503, DeploymentUnavailableError(DeploymentID("D", "a")).message)

    @app.exception_handler(BackPressureError)
    async def own(request: Request, error: BackPressureError) -> PlainTextResponse:
        return PlainTextResponse("mine", 418)

    assert serve(ingress(app)())("GET", "/busy").status_code == 418


def test_prefix_is_respected_by_urls_redirects_and_docs(serve: Serve) -> None:
    app = FastAPI()

    @app.get("/where/", name="where")
    def where(request: Request) -> list[str]:
        return [str(request.url), str(request.base_url), str(request.url_for("where"))]

    ask = serve(ingress(app)())
    url = "http://host/pre/fix"
    assert ask("GET", "/pre/fix/where/?a=1", root_path="/pre/fix").json() == [
        f"{url}/where/?a=1",
        f"{url}/",
        f"{url}/where/",
    ]
    answer = ask("GET", "/pre/fix/where", root_path="/pre/fix")
    assert (answer.status_code, answer.headers["location"]) == (307, f"{url}/where/")
    assert "/pre/fix/openapi.json" in ask("GET", "/pre/fix/docs", root_path="/pre/fix").text
    assert ask("GET", "/pre/fix/openapi.json", root_path="/pre/fix").json()["servers"] == [{"url": "/pre/fix"}]


def test_the_schema_is_that_of_the_application(serve: Serve) -> None:
    app = FastAPI()

    @app.get("/plain")
    def plain(skip: int = 0, limit: Annotated[int, Query(le=9)] = 1, token: str | None = Header(None)) -> None: ...

    @app.post("/body")
    def body(item: Annotated[list[int], Body(embed=True)], shown: Annotated[int, Query(examples=[3])]) -> None: ...

    @ingress(app)
    class View:
        @app.get("/method")
        def method(self, skip: int = 0) -> None: ...

    schema = serve(View)("GET", "/openapi.json").json()
    del schema["paths"]["/method"]
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") != "/method"]
    assert schema == app.openapi()


def test_builders(serve: Serve) -> None:
    def build() -> FastAPI:
        app = FastAPI(docs_url="/manual")
        app.get("/")(lambda: threading.get_ident() and "built")
        return app

    async def build_async() -> FastAPI:
        return build()

    assert asgi_app_of(ingress(build)()).docs_path is None  # type: ignore[union-attr]
    assert serve(ingress(build)())("GET", "/manual").status_code == 200
    assert serve(ingress(build)())("GET", "/").json() == "built"
    assert serve(ingress(build_async)())("GET", "/").json() == "built"
    with pytest.raises(TypeError, match="must return an ASGI app"):
        serve(ingress(lambda: None)())


def test_late_bound_application(serve: Serve) -> None:
    @ingress()
    class Late:
        def __init__(self, name: str) -> None:
            self.name = name

        async def __serve_build_asgi_app__(self) -> FastAPI:
            app = FastAPI()
            app.get("/")(lambda: self.name)
            return app

    assert serve(Late, "late")("GET", "/").json() == "late"
    with pytest.raises(ValueError, match="__serve_build_asgi_app__"):
        ingress()(type("Nothing", (), {}))


async def raw_app(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


class RawApp:
    """An ASGI application that is an object, keeps a lock, and never looks at the type of its scope."""

    def __init__(self) -> None:
        self.lock, self.relock = threading.Lock(), threading.RLock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with self.lock, self.relock:
            await send({"type": "http.response.start", "status": 202, "headers": []})
            await send({"type": "http.response.body", "body": b"raw"})


def test_any_asgi_callable(serve: Serve) -> None:
    assert serve(ingress(raw_app)())("GET", "/p").text == "/p"
    assert serve(ingress(RawApp())())("GET", "/p").text == "raw"

    async def hello(request: Any) -> PlainTextResponse:
        return PlainTextResponse(f"hello {request.app.state.name}")

    app = Starlette(routes=[Route("/", hello)])
    app.state.name = "star"
    assert serve(ingress(app)())("GET", "/").text == "hello star"


def test_what_may_not_be_decorated() -> None:
    app = FastAPI()
    with pytest.raises(ValueError, match="may not have __call__ method"):

        @ingress(app)
        class Callable:
            def __call__(self) -> None: ...

    with pytest.raises(ValueError, match="must be used with a class"):
        ingress(app)(lambda: None)
    with pytest.raises(TypeError, match="needs an ASGI application"):
        ingress("module:app")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Failed to serialize the ASGI app"):
        ingress(FastAPI(lifespan=lambda app, stuck=(i for i in ()): stuck))()


def test_subclass_must_construct_asynchronously() -> None:
    @ingress(FastAPI())
    class Parent: ...

    with pytest.raises(TypeError, match="must be `async def`"):

        class Child(Parent):  # type: ignore[misc, valid-type]
            def __init__(self) -> None: ...


def test_wrapper_looks_like_the_class() -> None:
    class Named:
        """Doc."""

        def __init__(self, a: int, b: str = "") -> None: ...

        def method(self) -> int:
            return 3

    cls = ingress(FastAPI())(Named)
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        "Named",
        Named.__qualname__,
        __name__,
        "Doc.",
    )
    assert list(inspect.signature(cls).parameters) == ["a", "b"]
    assert asgi_app_of(Named) is None
    assert asgi_app_of(raw_app) is None
    assert ingress(FastAPI())().__name__ == "ASGIIngressDeployment"


def test_application_knows_its_ingress_and_has_only_one() -> None:
    app = FastAPI(docs_url="/manual")
    ingress_deployment = deployment(ingress(app)())
    (spec,) = build(ingress_deployment.bind()).deployments
    assert (spec.is_asgi, spec.docs_path, spec.name) == (True, "/manual", "ASGIIngressDeployment")
    with pytest.raises(RayServeException, match="multiple FastAPI"):
        build(ingress_deployment.options(name="Outer").bind(ingress_deployment.bind()))
