"""Methods of a class as routes: on the replica they are bound to the user's instance."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest
from asgi_replica import Serve, fetch, replica_of, serving  # noqa: F401 - a fixture
from fastapi import APIRouter, BackgroundTasks, Body, Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.middleware.sessions import SessionMiddleware

from rayserve_fast.exceptions import RayServeException
from rayserve_fast.ingress import asgi_app_of, ingress
from rayserve_fast.replica.asgi import thaw


def test_class_based_view_gets_its_instance(serve: Serve) -> None:
    app = FastAPI()

    @ingress(app)
    class Counter:
        def __init__(self, start: int) -> None:
            self.value = start

        @app.get("/sync/{n}")
        def add(self, n: int, twice: bool = False) -> int:
            self.value += n * (1 + twice)
            return self.value

        @app.post("/async")
        async def put(self, item: Annotated[dict[str, int], Body()], request: Request) -> dict[str, Any]:
            return {"value": self.value, "item": item, "path": request.url.path}

    ask = serve(Counter, 10)
    assert ask("GET", "/sync/5").json() == 15
    assert ask("GET", "/sync/1?twice=1").json() == 17
    assert ask("POST", "/async", json={"a": 1}).json() == {"value": 17, "item": {"a": 1}, "path": "/async"}
    assert ask("POST", "/async", json={"a": "x"}).status_code == 422
    paths = ask("GET", "/openapi.json").json()["paths"]
    assert [p["name"] for p in paths["/sync/{n}"]["get"]["parameters"]] == ["n", "twice"]


def test_user_application_is_left_alone() -> None:
    app = FastAPI()

    @ingress(app)
    class Only:
        @app.get("/")
        def get(self) -> str:
            return "x"

    assert inspect.signature(app.routes[-1].endpoint) == inspect.signature(Only.get)  # type: ignore[attr-defined]
    assert app.routes[-1].dependant.query_params  # type: ignore[attr-defined]


def test_methods_of_bases_and_of_subclasses(serve: Serve) -> None:
    app = FastAPI()

    class Base:
        greeting = "base"

        @app.get("/hello")
        def hello(self) -> str:
            return self.greeting

        @app.get("/kind")
        def kind(self) -> str:
            return "base"

    @ingress(app)
    class Child(Base):
        greeting = "child"

        @app.get("/up")
        def up(self) -> str:
            return super().kind() + type(self).__name__

        def kind(self) -> str:
            return "overridden, which FastAPI cannot know"

    class Grandchild(Child):  # type: ignore[misc, valid-type]
        async def __init__(self) -> None:
            await super().__init__()
            self.greeting = "grandchild"

    assert serve(Child)("GET", "/hello").json() == "child"
    assert serve(Child)("GET", "/kind").json() == "base"
    assert serve(Child)("GET", "/up").json() == "baseChild"
    assert serve(Grandchild)("GET", "/hello").json() == "grandchild"


def test_two_classes_on_one_application_keep_apart(serve: Serve) -> None:
    app = FastAPI()

    class Shared:
        @app.get("/shared")
        def shared(self) -> str:
            return type(self).__name__

    @ingress(app)
    class A(Shared):
        @app.get("/a")
        def a(self) -> str:
            return "a"

    @ingress(app)
    class AA(Shared):
        @app.get("/aa")
        def a(self) -> str:
            return "aa"

    a, aa = serve(A), serve(AA)
    assert (a("GET", "/a").json(), a("GET", "/aa").status_code, a("GET", "/shared").json()) == ("a", 404, "A")
    assert (aa("GET", "/aa").json(), aa("GET", "/a").status_code, aa("GET", "/shared").json()) == ("aa", 404, "AA")
    assert list(aa("GET", "/openapi.json").json()["paths"]) == ["/shared", "/aa"]


def test_class_defined_again_loses_its_former_routes(serve: Serve) -> None:
    app = FastAPI()

    def define(answer: str) -> type:
        @ingress(app)
        class Again:
            @app.get("/")
            def get(self) -> str:
                return answer

        return Again

    define("old")
    assert serve(define("new"))("GET", "/").json() == "new"


def test_declared_order_of_routes_holds(serve: Serve) -> None:
    app = FastAPI()

    @app.get("/items/first")
    def first() -> str:
        return "module"

    @ingress(app)
    class Items:
        @app.get("/items/{name}")
        def item(self, name: str) -> str:
            return name

    app.get("/items/late")(lambda: "late")
    ask = serve(Items)
    assert (ask("GET", "/items/first").json(), ask("GET", "/items/late").json()) == ("module", "late")


def test_static_method_needs_no_instance_and_a_method_without_self_is_refused(serve: Serve) -> None:
    app = FastAPI()

    class Mixed:
        @app.get("/static")
        @staticmethod
        def static() -> str:
            return "static"

    assert serve(ingress(app)(Mixed))("GET", "/static").json() == "static"
    with pytest.raises(RayServeException, match="must have ``self``"):

        @ingress(app)
        class Wrong:
            @app.get("/x")
            def nothing() -> str:  # type: ignore[misc]
                return "x"


def test_included_routers_keep_prefix_dependencies_and_instance(serve: Serve) -> None:
    seen: list[str] = []

    def note(request: Request) -> None:
        request.state.noted = "yes"

    inner, outer, app = APIRouter(prefix="/inner"), APIRouter(), FastAPI()

    @inner.get("/plain")
    def plain(request: Request) -> str:
        return str(request.state.noted)

    class View:
        name = "view"

        @inner.get("/method")
        def method(self, request: Request) -> str:
            return self.name + request.state.noted

        @outer.websocket("/socket")
        async def socket(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.send_text(self.name)
            await websocket.close()

    outer.include_router(inner, prefix="/outer")
    app.include_router(outer, prefix="/api", dependencies=[Depends(note)])
    cls = ingress(app)(View)
    ask = serve(cls)
    assert ask("GET", "/api/outer/inner/plain").json() == "yes"
    assert ask("GET", "/api/outer/inner/method").json() == "viewyes"
    assert "/api/outer/inner/method" in ask("GET", "/openapi.json").json()["paths"]
    assert not seen


def test_websocket_method_gets_its_instance() -> None:
    app = FastAPI()

    @ingress(app)
    class Socket:
        name = "socket"

        @app.websocket("/ws")
        async def talk(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.send_text(self.name + websocket.query_params["q"])
            await websocket.close()

    asgi = asgi_app_of(Socket)
    assert asgi is not None
    assert asgi.frozen is not None
    with TestClient(thaw(asgi.frozen, Socket.__new__(Socket))).websocket_connect("/ws?q=1") as connection:
        assert connection.receive_text() == "socket1"


def test_router_alone_and_mounted_application(serve: Serve) -> None:
    router = APIRouter()

    @ingress(router)
    class View:
        name = "router"

        @router.get("/x")
        async def x(self) -> str:
            return self.name

    assert serve(View)("GET", "/x").json() == "router"

    sub, app = FastAPI(), FastAPI()
    app.mount("/sub", sub)

    @ingress(app)
    class Mounted:
        name = "mounted"

        @sub.get("/x")
        async def x(self, request: Request) -> list[str]:
            return [self.name, str(request.url_for("x"))]

    assert serve(Mounted)("GET", "/p/sub/x", root_path="/p").json() == ["mounted", "http://host/p/sub/x"]


async def user(name: str = "nobody") -> AsyncIterator[str]:
    yield name


def test_dependencies_background_tasks_middleware_and_streams(serve: Serve) -> None:
    app = FastAPI()
    app.add_middleware(SessionMiddleware, secret_key="k")

    @app.middleware("http")
    async def stamp(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["x-stamp"] = "1"
        return response

    @ingress(app)
    class View:
        def __init__(self) -> None:
            self.done: list[str] = []

        @app.get("/user")
        async def get_user(self, tasks: BackgroundTasks, who: Annotated[str, Depends(user)]) -> str:
            tasks.add_task(self.done.append, who)
            return who

        @app.get("/done")
        def get_done(self, request: Request) -> list[str]:
            request.session["visits"] = request.session.get("visits", 0) + 1
            return self.done

        @app.get("/stream")
        def stream(self) -> StreamingResponse:
            return StreamingResponse(iter(["a", "b"]), media_type="text/plain")

        @app.get("/fail")
        def fail(self) -> None:
            raise ValueError("no")

    ask = serve(View)
    answer = ask("GET", "/user?name=ann")
    assert (answer.json(), answer.headers["x-stamp"]) == ("ann", "1")
    answer = ask("GET", "/done")
    assert answer.json() == ["ann"]
    assert "session=" in answer.headers["set-cookie"]
    assert ask("GET", "/stream").text == "ab"
    answer = ask("GET", "/fail")
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")


def test_frozen_class_serves_in_another_process(tmp_path: Any) -> None:
    """Classes and models of a driver's __main__, with locks and super(), in a process that has none of them."""
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "replica.py").write_text(REPLICA)
    subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, "replica.py"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["200", '{"name":"x-base","size":3}']


def test_module_that_the_replica_cannot_import_travels_with_the_application(tmp_path: Any) -> None:
    (tmp_path / "driver.py").write_text(LOADER)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "driver_module.py").write_text(DRIVER.replace("class.pkl", "../class.pkl"))
    (tmp_path / "replica.py").write_text(REPLICA)
    subprocess.run([sys.executable, "../driver.py"], cwd=tmp_path / "elsewhere", check=True)
    done = subprocess.run([sys.executable, "replica.py"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["200", '{"name":"x-base","size":3}']


LOADER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("driver_module", "driver_module.py")
sys.modules["driver_module"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
DRIVER = """
import pydantic
from fastapi import APIRouter, FastAPI
from rayserve_fast.definition import dump_code
from rayserve_fast.ingress import ingress

class Item(pydantic.BaseModel):
    name: str
    size: int

router, app = APIRouter(), FastAPI()

class Base:
    def suffix(self) -> str:
        return "-base"

class View(Base):
    def suffix(self):
        return "-wrong"

    @router.post("/items")
    async def add(self, item: Item) -> Item:
        return Item(name=item.name + super().suffix(), size=item.size + self.more)

    def __init__(self, more: int):
        self.more = more

app.include_router(router, prefix="/v1")
open("class.pkl", "wb").write(dump_code(ingress(app)(View), None, ""))
"""
REPLICA = """
import asyncio, httpx
from ray import cloudpickle
from rayserve_fast.ingress import asgi_app_of
from rayserve_fast.replica.asgi import AsgiApp

async def main():
    cls = cloudpickle.loads(open("class.pkl", "rb").read())
    view = cls.__new__(cls)
    await view.__init__(2)
    app = AsgiApp(asgi_app_of(cls), view)
    await app.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://h") as client:
        answer = await client.post("/v1/items", json={"name": "x", "size": 1})
        print(answer.status_code, answer.text)

asyncio.run(main())
"""
