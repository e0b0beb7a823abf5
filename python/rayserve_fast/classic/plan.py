"""A graph compiled into handle calls: which calls, in which order, and where each argument comes from.

All calls of a request are begun at once, in topological order; a call that needs another's answer is given the response
itself, and the data plane starts it when the answer is there and passes the answer on undecoded. So branches run
concurrently, and a node that several others use is called once. Only an answer nested within an argument (a list of
answers) has to be read here first: such a step waits in a task of its own, with what depends on it.

Invariant: a step's arguments refer to the input and to earlier steps only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from rayserve_fast import promises
from rayserve_fast.classic.graph import CallNode, InputNode, InputPart, Node
from rayserve_fast.deployment import Application

if TYPE_CHECKING:
    from ray import ObjectRef

    from rayserve_fast.handle import DeploymentHandle, DeploymentResponse

#: What a request brings, as positional and keyword arguments.
Input = tuple[tuple[Any, ...], dict[str, Any]]
#: The responses of the steps that have begun, and tasks that will give those of the others.
Begun = list[Any]
Source = Callable[[Input, Begun], Any]


@dataclass(frozen=True)
class Given:
    """A value that is the same for all requests."""

    value: Any

    def source(self) -> Source:
        return lambda given, begun: self.value


@dataclass(frozen=True)
class FromInput:
    """The input, or a part of it."""

    key: int | str | None = None
    is_item: bool = True

    def source(self) -> Source:
        if self.key is None:
            return lambda given, begun: _only(given)
        part: Callable[[Any], Any] = itemgetter(self.key) if self.is_item else attrgetter(str(self.key))
        key = self.key
        return lambda given, begun: part(given[0][0]) if len(given[0]) == 1 and not given[1] else _one(given, key)


@dataclass(frozen=True)
class FromStep:
    """The answer of an earlier step."""

    index: int

    def source(self) -> Source:
        return lambda given, begun: begun[self.index]


@dataclass(frozen=True)
class Nested:
    """A list, tuple or dict with something in it that changes from request to request."""

    kind: type
    keys: tuple[Any, ...]  # of a dict
    parts: tuple[Given | FromInput | FromStep | Nested, ...]

    def steps(self) -> Iterable[int]:
        """The steps whose answers are in it."""
        for part in self.parts:
            if isinstance(part, FromStep):
                yield part.index
            elif isinstance(part, Nested):
                yield from part.steps()

    def source(self) -> Source:
        sources = [part.source() for part in self.parts]
        if self.kind is dict:
            return lambda given, begun: dict(zip(self.keys, (s(given, begun) for s in sources), strict=True))
        return lambda given, begun: self.kind(s(given, begun) for s in sources)


Argument = Given | FromInput | FromStep | Nested


@dataclass
class Step:
    """One call of every request.

    Args:
        target: an Application, which is a handle where the plan runs.
    """

    target: Any
    method: str
    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = field(default_factory=dict)
    forwards_all: bool = False  # its arguments are those that the graph is called with


@dataclass
class Plan:
    """The steps of one graph, and what it gives: the answer of its last step, or of its input."""

    steps: list[Step]
    answer: Argument

    def ready(self) -> ReadyPlan:
        """With its handles' methods looked up; called once, where it runs."""
        return ReadyPlan(self)


class ReadyPlan:
    """A plan that can be run."""

    def __init__(self, plan: Plan) -> None:
        self._steps: list[_ReadyStep] = []
        for step in plan.steps:
            self._steps.append(_ReadyStep(step, self._steps))
        self._answer = plan.answer.source()
        self._last = plan.answer.index if isinstance(plan.answer, FromStep) else None
        self._has_late = any(step.late for step in self._steps)
        #: The call that the whole graph is, if it is one call with nothing but the input.
        self.single: Callable[[Any], Any] | None = None
        if len(plan.steps) == 1 and (plan.steps[0].forwards_all or _takes_only_input(plan.steps[0])):
            self.single = self._steps[0].remote

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on these arguments, and return what its last node gives."""
        given: Input = (args, kwargs)
        begun: Begun = []
        if self._has_late or self._last is None:
            return await self._run_late(given, begun)
        for step in self._steps:
            begun.append(step.begin(given, begun))
        return await begun[self._last]

    async def _run_late(self, given: Input, begun: Begun) -> Any:
        tasks = []
        try:
            for step in self._steps:
                if step.late:
                    tasks.append(asyncio.ensure_future(step.begin_late(given, begun)))
                    begun.append(tasks[-1])
                else:
                    begun.append(step.begin(given, begun))
            answer = self._answer(given, begun)
            return await (await _begun(answer)) if self._last is not None else answer
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _ReadyStep:
    """A step with its method's handle, and functions that fetch its arguments.

    Args:
        step: the step.
        earlier: those that it may need answers of.
    """

    def __init__(self, step: Step, earlier: Sequence[_ReadyStep]) -> None:
        handle: DeploymentHandle = step.target
        self.remote = handle.options(method_name=step.method).remote
        self._args = [argument.source() for argument in step.args]
        self._kwargs = {name: argument.source() for name, argument in step.kwargs.items()}
        given = (*step.args, *step.kwargs.values())
        self._needs = [a.index for a in given if isinstance(a, FromStep)]
        #: The steps whose answers are nested within its arguments.
        self._nested = tuple(dict.fromkeys(index for a in given if isinstance(a, Nested) for index in a.steps()))
        #: Whether it must wait here before it can be begun.
        self.late: bool = bool(self._nested) or any(earlier[index].late for index in self._needs)
        if step.forwards_all:
            self.begin = self._forward  # type: ignore[method-assign]

    def begin(self, given: Input, begun: Begun) -> DeploymentResponse:
        """Call now."""
        args = [source(given, begun) for source in self._args]
        if not self._kwargs:
            return self.remote(*args)  # type: ignore[return-value]
        return self.remote(*args, **{name: s(given, begun) for name, s in self._kwargs.items()})  # type: ignore[return-value]

    def _forward(self, given: Input, begun: Begun) -> DeploymentResponse:
        return self.remote(*given[0], **given[1])  # type: ignore[return-value]

    async def begin_late(self, given: Input, begun: Begun) -> DeploymentResponse:
        """Call once the answers that are nested in its arguments are here, and the late steps it needs have begun."""
        mine = list(begun)
        for index in (*self._needs, *self._nested):
            mine[index] = await _begun(begun[index])
        values = await asyncio.gather(*(mine[index] for index in self._nested))
        for index, value in zip(self._nested, values, strict=True):
            mine[index] = value
        return self.begin(given, mine)


class GraphHandle:
    """Calls a whole graph: what a constructor gets for a graph among its arguments."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._run: ReadyPlan | None = None

    async def remote(self, *args: Any, **kwargs: Any) -> ObjectRef[Any]:
        """Call the graph; it is on its way when the reference is there.

        Args:
            *args, **kwargs: the graph's input.

        Returns:
            The `ray.ObjectRef` of its answer: `await (await handle.remote(1))`.
        """
        if self._run is None:
            self._run = self._plan.ready()
        ref: ObjectRef[Any] = promises.of_awaitable(self._run(*args, **kwargs))
        return ref

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphHandle, (self._plan,)


def compile_graph(root: Node | Application) -> Plan:
    """The plan of the graph that ends in `root`.

    Raises:
        TypeError: it is no node.
    """
    if isinstance(root, Application):
        return Plan([Step(root, "__call__", forwards_all=True)], FromStep(0))
    if not isinstance(root, Node):
        raise TypeError(f"Expected a node of a deployment graph or an Application, got {type(root)}.")
    compiler = _Compiler()
    answer = compiler.argument(root)
    return Plan(compiler.steps, answer)


class _Compiler:
    """One walk over a graph, in which each node becomes one step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        # By id(), with the node itself, so that no other one gets its id meanwhile.
        self._known: dict[int, tuple[Any, FromStep]] = {}

    def argument(self, value: Any) -> Argument:
        if isinstance(value, InputPart):
            return FromInput(value.key, value.is_item)
        if isinstance(value, InputNode):
            return FromInput()
        if isinstance(value, (CallNode, Application)):
            return self._step(value)
        if type(value) in (list, tuple):
            return _nested(type(value), (), [self.argument(part) for part in value], value)
        if type(value) is dict:
            return _nested(dict, tuple(value), [self.argument(part) for part in value.values()], value)
        return Given(value)

    def _step(self, node: CallNode | Application) -> FromStep:
        known = self._known.get(id(node))
        if known is None:
            self.steps.append(self._call_of(node))  # after those of its arguments
            known = self._known[id(node)] = node, FromStep(len(self.steps) - 1)
        return known[1]

    def _call_of(self, node: CallNode | Application) -> Step:
        if isinstance(node, Application):
            return Step(node, "__call__")
        args = tuple(self.argument(value) for value in node.args)
        return Step(node.app, node.method, args, {name: self.argument(value) for name, value in node.kwargs.items()})


def _nested(kind: type, keys: tuple[Any, ...], parts: list[Argument], value: Any) -> Argument:
    changes = any(not isinstance(part, Given) for part in parts)
    return Nested(kind, keys, tuple(parts)) if changes else Given(value)


def _takes_only_input(step: Step) -> bool:
    return step.args == (FromInput(),) and not step.kwargs


async def _begun(response: Any) -> Any:
    """The response of a step, which may not have begun yet."""
    return await asyncio.shield(response) if isinstance(response, asyncio.Future) else response


def _only(given: Input) -> Any:
    args, kwargs = given
    if len(args) != 1 or kwargs:
        raise TypeError(
            f"The graph uses its InputNode as a whole, and takes one argument; it was called with {len(args)} "
            f'positional and {len(kwargs)} keyword arguments. Bind inp[0], inp[1] or inp["name"] for several.'
        )
    return args[0]


def _one(given: Input, key: int | str) -> Any:
    args, kwargs = given
    try:
        return args[key] if isinstance(key, int) else kwargs[key]
    except (IndexError, KeyError):
        raise TypeError(
            f"The graph needs argument {key!r}; it was called with {len(args)} positional arguments and the keywords "
            f"{sorted(kwargs)}."
        ) from None
