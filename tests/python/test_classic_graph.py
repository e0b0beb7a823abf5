"""Deployment graphs: how nodes become handle calls, what travels where, and how they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import cloudpickle

from rayserve_fast import serve
from rayserve_fast.classic.graph import CallNode
from rayserve_fast.classic.plan import GraphHandle, Plan, compile_graph
from rayserve_fast.dag import InputNode
from rayserve_fast.deployment_graph import RayServeDAGHandle
from rayserve_fast.drivers import DAGDriver
from rayserve_fast.handle import DeploymentHandle, RayServeSyncHandle

light = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=20)


@light
def add_one(n: int) -> int:
    return n + 1


@light
async def slow(value: Any) -> Any:
    await asyncio.sleep(0.5)
    return value


@light
class Meeting:
    """Calls that end when so many of them run."""

    def __init__(self, size: int) -> None:
        self.size, self.came, self.complete = size, 0, asyncio.Event()

    async def meet(self, value: Any) -> Any:
        complete = self.complete
        self.came += 1
        if self.came == self.size:
            complete.set()
            self.came, self.complete = 0, asyncio.Event()
        await asyncio.wait_for(complete.wait(), 20)
        return value


@light
def gather(values: list[Any], named: dict[str, Any] | None = None) -> Any:
    assert type(values) is list
    return [*values, *(named or {}).items()]


@light
def default() -> str:
    return "a default"


@light
class Model:
    def __init__(self, increment: int = 0) -> None:
        self.increment, self.calls = increment, 0

    def predict(self, n: int, scale: int = 1) -> int:
        self.calls += 1
        return (n + self.increment) * scale

    def count(self, _: Any = None) -> int:
        return self.calls

    def __call__(self, *args: Any) -> Any:
        return "called", *args

    def fail(self, _: Any) -> None:
        raise KeyError("broken step")


class Sealed:
    """A value that says where it was opened."""

    def __init__(self, opened_by: tuple[str, ...] = ()) -> None:
        self.opened_by = opened_by

    def __reduce__(self) -> tuple[Any, ...]:
        return unseal, (self.opened_by,)


def unseal(opened_by: tuple[str, ...]) -> Sealed:
    return Sealed((*opened_by, serve.get_replica_context().deployment))


@light
def seal(_: Any) -> Sealed:
    return Sealed()


@light
def openers(sealed: Sealed) -> tuple[str, ...]:
    return sealed.opened_by


@pytest.fixture
def driver(serve_url: str) -> Iterator[Any]:
    """Runs a graph; gives its handle."""

    def run(graph: Any) -> Any:
        bound = DAGDriver.options(ray_actor_options={"num_cpus": 0}).bind(graph)
        return serve.run(bound, name="graph", route_prefix=None)

    yield run
    serve.delete("graph")


def predicted(handle: Any, *args: Any, **kwargs: Any) -> Any:
    return ray.get(handle.predict.remote(*args, **kwargs), timeout=60)


def test_functions_and_methods_are_called_in_turn(driver: Any) -> None:
    with InputNode() as inp:
        graph = Model.bind(increment=2).predict.bind(add_one.bind(inp), scale=add_one.bind(inp))
    handle = driver(graph)
    assert type(handle) is RayServeSyncHandle
    assert predicted(handle, 1) == 8
    with pytest.raises(Exception, match="takes one argument; it was called with 2"):
        predicted(handle, 1, 2)
    assert serve.status().applications["graph"].deployments.keys() == {"add_one", "Model", "DAGDriver"}


def test_a_functions_constant_arguments_stay_an_error() -> None:
    with pytest.raises(ValueError, match="init_args not supported for function deployments"):
        add_one.bind(9)
    with pytest.raises(ValueError, match="init_args not supported for function deployments"):
        add_one.bind(Model.bind())


def test_parts_of_the_input(driver: Any) -> None:
    with InputNode() as inp:
        graph = gather.bind([inp[0], inp["key"], inp.key])
    handle = driver(graph)
    assert predicted(handle, "first", key="named") == ["first", "named", "named"]
    with pytest.raises(TypeError, match="needs argument 'key'"):
        predicted(handle, "first", "second")


def test_parts_of_the_only_argument(driver: Any) -> None:
    with InputNode() as inp:
        graph = gather.bind([inp["numbers"], inp["numbers"]], named={"text": [inp["text"]]})
    assert predicted(driver(graph), {"numbers": [1, 2], "text": "t"}) == [[1, 2], [1, 2], ("text", ["t"])]
    with InputNode() as inp:
        plan = compile_graph(add_one.bind(inp.imag))
    assert plan.steps[0].args[0].source()(((3 + 4j,), {}), []) == 4


def test_branches_run_at_the_same_time_and_a_shared_node_once(driver: Any) -> None:
    with InputNode() as inp:
        model = Model.bind(10)
        shared = model.predict.bind(inp)
        meeting = Meeting.bind(8)
        branches = [meeting.meet.bind(shared) for _ in range(8)]
        graph = gather.bind([*branches, model.count.bind(branches[0])])
    handle = driver(graph)
    predicted(handle, 0)
    assert predicted(handle, 1) == [*[11] * 8, 2]  # once for each request


def test_a_late_step_does_not_hold_up_the_others(driver: Any) -> None:
    with InputNode() as inp:
        late = gather.bind([slow.bind(inp)])
        after = gather.bind([slow.bind(late)], named={"direct": slow.bind(inp), "top": inp})
        graph = gather.bind(after, named={"again": [late]})
    assert predicted(driver(graph), 1) == [[1], ("direct", 1), ("top", 1), ("again", [[1]])]


def test_answers_pass_the_driver_unopened(driver: Any) -> None:
    with InputNode() as inp:
        graph = openers.bind(seal.bind(inp))
    assert predicted(driver(graph), 0) == ("openers",)


def test_an_application_is_a_value_for_functions_and_methods_and_a_handle_for_classes(driver: Any) -> None:
    @light
    class Holder:
        def __init__(self, handle: Any) -> None:
            self.kind = type(handle)

        def check(self, *values: Any) -> Any:
            return self.kind is DeploymentHandle, values

    with InputNode() as inp:
        graph = Holder.bind(Model.bind()).check.bind(inp, Model.bind(), default.bind())
    assert predicted(driver(graph), 1) == (True, (1, ("called",), "a default"))


def test_an_application_instead_of_a_graph_is_called_with_everything(driver: Any) -> None:
    assert predicted(driver(Model.bind()), 1, 2) == ("called", 1, 2)


def test_errors_of_steps_come_out(driver: Any) -> None:
    with InputNode() as inp:
        model = Model.bind()
        graph = gather.bind([slow.bind(model.fail.bind(inp)), slow.bind(inp)])
    handle = driver(graph)
    with pytest.raises(KeyError, match="broken step"):
        predicted(handle, 1)
    with InputNode() as inp:
        graph = add_one.bind(model.fail.bind(inp))
    with pytest.raises(KeyError, match="broken step"):
        predicted(driver(graph), 1)


def test_a_class_of_ones_own_can_hold_a_graph(serve_url: str) -> None:
    @light
    class Own:
        def __init__(self, graph: RayServeDAGHandle, many: dict[str, Any]) -> None:
            self.graph, self.many = graph, many

        async def predict(self, n: int) -> Any:
            ref = await self.graph.remote(n)
            assert type(ref) is ray.ObjectRef
            return await ref

        async def fail(self, n: int) -> Any:
            return await (await self.many["fails"].remote(n))

    with InputNode() as inp:
        model = Model.bind(5)
        app = Own.bind(model.predict.bind(inp), {"fails": model.fail.bind(inp)})
    handle = serve.run(app, name="own", route_prefix=None)
    assert type(handle) is DeploymentHandle
    assert handle.predict.remote(1).result(timeout_s=60) == 6
    with pytest.raises(KeyError, match="broken step"):
        handle.fail.remote(1).result(timeout_s=60)
    serve.delete("own")


def test_a_graph_runs_in_local_testing_mode() -> None:
    with InputNode() as inp:
        graph = gather.bind([add_one.bind(inp), add_one.bind(add_one.bind(inp))])
    handle = serve.run(DAGDriver.bind(graph), name="here", _local_testing_mode=True)
    assert handle.predict.remote(1).result(timeout_s=10) == [2, 3]
    serve.delete("here")


def test_compiling_orders_steps_and_marks_the_late_ones() -> None:
    with InputNode() as inp:
        first = add_one.bind(inp)
        late = gather.bind([first, 1], named={"constant": [1, 2]})
        plan = compile_graph(add_one.bind(late))
    assert plan.steps[0].target is plan.steps[2].target  # one deployment for all nodes of a function
    for step in plan.steps:
        step.target = Recorder()
    ready = plan.ready()._steps
    assert [step.target.method for step in plan.steps] == ["__call__"] * 3
    assert [(step._nested, step.late) for step in ready] == [((), False), ((0,), True), ((), True)]


class Answer:
    def __init__(self, text: str) -> None:
        self.text = text

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.text


class Recorder:
    """Stands for handles: notes the arguments of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[Answer] = []
        self.method = ""

    def options(self, method_name: str) -> Recorder:
        self.method = method_name
        return self

    def remote(self, *args: Any) -> Answer:
        self.calls.append(args)
        self.answers.append(Answer(f"answer {len(self.calls)}"))
        return self.answers[-1]


def test_a_call_that_needs_an_answer_is_given_the_response() -> None:
    with InputNode() as inp:
        plan = compile_graph(slow.bind(add_one.bind(inp)))
    handle = Recorder()
    for step in plan.steps:
        step.target = handle
    assert asyncio.run(plan.ready()(7)) == "answer 2"
    assert handle.calls == [(7,), (handle.answers[0],)]


def test_nodes_and_plans_describe_and_pickle() -> None:
    with InputNode() as inp:
        node = Model.bind().predict.bind(inp)
    assert repr(node) == "CallNode(Model.predict)"
    assert type(node) is CallNode
    plan = compile_graph(InputNode())
    assert type(cloudpickle.loads(cloudpickle.dumps(GraphHandle(plan)))) is GraphHandle
    assert asyncio.run(plan.ready()("through")) == "through"
    assert type(plan) is Plan


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: DAGDriver.bind(3), TypeError, "takes a node of a graph"),
        (lambda: DAGDriver.bind({}), ValueError, "at least one graph"),
        (lambda: DAGDriver.bind({"x": InputNode()}), ValueError, "must start with '/'"),
        (lambda: DAGDriver.bind({1: InputNode()}), TypeError, "by their routes"),
        (lambda: DAGDriver.bind(InputNode(), http_adapter=3), TypeError, "http_adapter"),
        (lambda: DAGDriver.bind(InputNode(), http_adapter="no.such:thing"), ImportError, "no"),
        (lambda: InputNode()[1.5], TypeError, "int or a str"),
        (lambda: Model.bind().nothing, AttributeError, "no method of this name"),
        (lambda: add_one.bind().anything, AttributeError, "no method of this name"),
        (lambda: compile_graph(3), TypeError, "Expected a node"),
    ],
)
def test_what_is_no_graph_is_refused(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        wrong()
