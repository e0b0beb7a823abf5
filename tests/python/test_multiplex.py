"""`serve.multiplexed`: the cache of one replica, what the replica tells its callers, where their requests then go."""

from __future__ import annotations

import asyncio
import json
import struct
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from deployed import wait_for
from wire_client import Frame, Link, value
from worker_replica import serving

from rayserve_fast import multiplex, serve
from rayserve_fast.context import ReplicaContext, _get_serve_request_context, _set_replica_context
from rayserve_fast.controlplane.spec import DeploymentConfig, DeploymentID, ReplicaID, ReplicaRank

MODELS = 49


class Model:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __del__(self) -> None:
        self.log.append(f"unload {self.name}")


class Loader:
    """Keeps two; its log says in which order what happened."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.busy = 0

    @serve.multiplexed(max_num_models_per_replica=2)
    async def load(self, model_id: str) -> Model:
        self.busy += 1
        assert self.busy == 1, "loads are one after the other"
        await asyncio.sleep(0)
        self.busy -= 1
        if model_id == "broken":
            raise KeyError(model_id)
        self.log.append(f"load {model_id}")
        return Model(model_id, self.log)

    async def ask(self, *models: str) -> list[str]:
        await asyncio.gather(*(self.load(model) for model in models))
        return self.log

    async def __call__(self, request: Any) -> str:
        return (await self.load(serve.get_multiplexed_model_id())).name

    async def refused(self, model_id: Any) -> str:
        try:
            await self.load(model_id)
        except Exception as error:
            return repr(error)
        return "accepted"


@pytest.fixture
def link() -> Iterator[Link]:
    with serving(Loader, max_ongoing_requests=20) as replica:
        yield replica.link()


def ask(link: Link, method: str, *args: Any) -> Any:
    link.call(1, method, *args)
    answer = link.answer(1).last
    return value(answer.payload)


def names(frame: Frame) -> list[str]:
    assert (frame.kind, frame.stream) == (MODELS, 0)
    found, at = [], 0
    while at < len(frame.payload):
        (size,) = struct.unpack_from("<H", frame.payload, at)
        found.append(frame.payload[at + 2 : at + 2 + size].decode())
        at += 2 + size
    return found


def test_a_model_is_loaded_once_however_many_ask_for_it(link: Link) -> None:
    assert ask(link, "ask", "a", "a", "b", "a") == ["load a", "load b"]


def test_the_least_recently_used_model_leaves_before_the_next_is_loaded(link: Link) -> None:
    ask(link, "ask", "a")
    ask(link, "ask", "b")
    ask(link, "ask", "a")
    assert ask(link, "ask", "c") == ["load a", "load b", "unload b", "load c"]


def test_what_cannot_be_a_model_is_refused_and_a_loaders_error_passes_through(link: Link) -> None:
    assert ask(link, "refused", "") == "ValueError('The model ID cannot be empty.')"
    assert ask(link, "refused", 5) == "TypeError('The model ID must be a string.')"
    assert ask(link, "refused", "broken") == "KeyError('broken')"
    assert ask(link, "ask", "a") == ["load a"], "the loader goes on"


def test_callers_are_told_what_is_held_before_they_get_the_answer() -> None:
    with serving(Loader) as replica:
        first = replica.link()
        first.call(1, "ask", "a")
        assert names(first.frame()) == ["a"]
        assert first.frame().stream == 1
        late = replica.link()
        assert names(late.frame()) == ["a"], "a new caller learns it first of all"
        first.call(1, "ask", "b")
        assert names(late.frame()) == ["a", "b"]
        first.call(2, "ask", "c")
        assert names(late.frame()) == ["b", "c"]
        first.call(3, "refused", "broken")
        assert [names(late.frame()), names(late.frame())] == [["c", "broken"], ["c"]]


def test_every_model_is_unloaded_once_when_the_replica_stops() -> None:
    log: list[str] = []

    class Holder:
        @serve.multiplexed(max_num_models_per_replica=-1)
        async def load(self, model_id: str) -> Model:
            return Model(model_id, log)

        async def __call__(self, *models: str) -> None:
            for model in models:
                await self.load(model)

    context = ReplicaContext(ReplicaID("r", DeploymentID("D")), None, DeploymentConfig(), ReplicaRank(0, 0, 0), 1)
    _set_replica_context(context)
    try:

        async def life() -> None:
            await Holder()("a", "b", "c")
            await multiplex.unload(context)

        asyncio.run(life())
    finally:
        _set_replica_context(None)
    assert sorted(log) == ["unload a", "unload b", "unload c"]


def test_a_header_names_the_model_and_the_session_of_an_http_request() -> None:
    async def handler(request: Any) -> list[str]:
        context = _get_serve_request_context()
        in_thread = await asyncio.to_thread(lambda: _get_serve_request_context().session_id)
        return [serve.get_multiplexed_model_id(), context.session_id, in_thread]

    with serving(handler) as replica:
        link = replica.link()
        for model_header, session_header in [
            ("serve_multiplexed_model_id", "x-session-id"),
            ("serve-multiplexed-model-id", "x_session_id"),
        ]:
            answer = link.get(headers=[(model_header, "m"), (session_header, "s")])
            assert answer.body == b'["m","s","s"]'
        assert link.get().body == b'["","",""]'


def test_outside_a_deployment_there_is_no_model() -> None:
    @serve.multiplexed
    async def load(model_id: str) -> str:
        return model_id

    assert serve.get_multiplexed_model_id() == ""
    with pytest.raises(RuntimeError, match="can only be used within a deployment"):
        asyncio.run(load("m"))


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-2, ValueError), ("3", TypeError), (1.5, TypeError), (True, TypeError)]
)
def test_a_limit_that_is_none_is_refused(limit: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_num_models_per_replica"):
        serve.multiplexed(max_num_models_per_replica=limit)


def test_only_an_async_function_of_a_model_id_can_load() -> None:
    async def nothing() -> None: ...
    async def too_many(self: Any, a: str, b: str) -> None: ...
    def sync(model_id: str) -> None: ...

    for function in (nothing, too_many, sync):
        with pytest.raises(TypeError, match="can only be used to decorate"):
            serve.multiplexed(function)


# Real replicas from here on.


@serve.deployment(num_replicas=3, max_ongoing_requests=20)
class Shelf:
    """Says who loaded what."""

    def __init__(self) -> None:
        self.me = serve.get_replica_context().replica_tag
        self.loads: Counter[str] = Counter()

    @serve.multiplexed(max_num_models_per_replica=4)
    async def load(self, model_id: str) -> str:
        self.loads[model_id] += 1
        await asyncio.sleep(0.01)
        return model_id

    async def __call__(self, request: Any) -> str:
        if model := serve.get_multiplexed_model_id():
            await self.load(model)
        return self.me

    async def call(self) -> tuple[str, Counter[str]]:
        await self.load(serve.get_multiplexed_model_id())
        return self.me, self.loads

    async def whose(self) -> tuple[str, str]:
        return self.me, _get_serve_request_context().session_id

    async def hold(self) -> str:
        await self.load(serve.get_multiplexed_model_id())
        await asyncio.sleep(0.5)
        return self.me


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
        return str(response.read().decode())


def test_every_model_is_loaded_by_one_replica_whoever_asks(serve_instance: str) -> None:
    handle = serve.run(Shelf.bind())
    models = [f"m{i}" for i in range(9)]
    homes = {model: get(serve_instance, serve_multiplexed_model_id=model) for model in models}
    assert len(set(homes.values())) == 3, "models spread over the replicas that hold the fewest"
    for _ in range(3):
        for model in models:
            assert get(serve_instance, serve_multiplexed_model_id=model) == homes[model]
    loads: dict[str, Counter[str]] = {}
    link_all(handle)
    for model in models:
        home, loaded = handle.options(multiplexed_model_id=model).call.remote().result()
        assert home == homes[model], "the driver has learnt it from the replicas, not from the proxy"
        loads[home] = loaded
    assert sum(loads.values(), Counter()) == Counter(models)


def test_a_hot_model_spreads_and_a_burst_for_a_new_one_does_not(serve_instance: str) -> None:
    handle = serve.run(Shelf.bind())
    link_all(handle)
    assert len(set(at_once(handle.options(multiplexed_model_id="cool"), 4))) == 1
    assert len(set(at_once(handle.options(multiplexed_model_id="hot"), 40))) > 1


def link_all(handle: Any) -> None:
    """The first calls of a process go to whoever is linked first."""
    wait_for(lambda: len({handle.whose.remote().result() for _ in range(6)}) == 3, 10)


def at_once(handle: Any, count: int) -> list[str]:
    return [response.result() for response in [handle.hold.remote() for _ in range(count)]]


def test_a_session_stays_at_its_replica_over_http_and_handles(serve_instance: str) -> None:
    handle = serve.run(Shelf.bind())
    link_all(handle)
    homes = {}
    for session in (f"s{i}" for i in range(24)):
        asked = {handle.options(session_id=session).whose.remote().result() for _ in range(3)}
        ((homes[session], seen),) = asked
        assert seen == session
        assert get(serve_instance, **{"X-Session-ID": session}) == homes[session]
    assert len(set(homes.values())) == 3


@serve.deployment
class Outer:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    async def __call__(self, request: Any) -> dict[str, Any]:
        in_thread = await asyncio.to_thread(context_here)
        children = await asyncio.gather(
            self.inner.aware.remote(),
            self.inner.aware_in_thread.remote(),
            self.inner.options(multiplexed_model_id="m2", session_id="s2").aware.remote(),
        )
        return {"me": context_here(), "thread": in_thread, "children": children}


@serve.deployment
class Inner:
    async def aware(self) -> dict[str, Any]:
        return context_here()

    def aware_in_thread(self) -> dict[str, Any]:
        return context_here()


def context_here() -> dict[str, Any]:
    context = _get_serve_request_context()
    names = ("route", "request_id", "app_name", "multiplexed_model_id", "session_id")
    return {name: getattr(context, name) for name in names}


def test_the_request_context_is_seen_in_coroutines_threads_and_child_calls(serve_instance: str) -> None:
    serve.run(Outer.bind(Inner.bind()), name="app", route_prefix="/x")
    headers = {"x-request-id": "r1", "serve-multiplexed-model-id": "m1", "X-Session-Id": "s1"}
    seen = json.loads(get(f"{serve_instance}/x/y", **headers))
    mine = {"route": "/x", "request_id": "r1", "app_name": "app", "multiplexed_model_id": "m1", "session_id": "s1"}
    assert seen["me"] == seen["thread"] == mine
    child = mine | {"multiplexed_model_id": "", "session_id": ""}  # those are of one call, as in the reference
    assert seen["children"] == [child, child, child | {"multiplexed_model_id": "m2", "session_id": "s2"}]
