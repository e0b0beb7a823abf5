"""Deployment graphs as the user writes them: an `InputNode`, and calls of deployments bound to it and to each other.

Nodes only say what depends on what. Given to `DAGDriver.bind`, or bound to a class of the user's own, a graph is
compiled once into a plan of handle calls (`plan.py`); nothing here runs when a request comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayserve_fast.deployment import Application


class Node:
    """A value that every request has its own of."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Among a constructor's arguments a graph arrives as what runs it."""
        from rayserve_fast.classic.plan import GraphHandle, compile_graph

        return GraphHandle, (compile_graph(self),)


class InputNode(Node):
    """What the graph is called with.

    With one argument `inp` is it, and `inp["key"]`, `inp[0]` and `inp.name` are its items and attributes. With several
    `inp[0]` is the first of them, and `inp["key"]` or `inp.key` the one that was given by this keyword.

    >>> with InputNode() as inp:
    ...     inp, inp["image"], inp[0]
    (InputNode(), InputNode()['image'], InputNode()[0])
    >>> inp.user
    InputNode().user
    """

    def __enter__(self) -> InputNode:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getitem__(self, key: int | str) -> InputPart:
        if not isinstance(key, (int, str)):
            raise TypeError(f"An InputNode's key must be an int or a str, got {type(key)}.")
        return InputPart(key, is_item=True)

    def __getattr__(self, name: str) -> InputPart:
        if name.startswith("_"):  # asked for by copying and inspection
            raise AttributeError(f"'InputNode' has no attribute {name!r}")
        return InputPart(name, is_item=False)

    def __repr__(self) -> str:
        return "InputNode()"


class InputPart(Node):
    """One argument, or one part of the only one; made by an `InputNode`."""

    def __init__(self, key: int | str, is_item: bool) -> None:
        self.key = key
        self.is_item = is_item

    def __repr__(self) -> str:
        return f"InputNode()[{self.key!r}]" if self.is_item else f"InputNode().{self.key}"


class CallNode(Node):
    """The answer of a method of a deployment; made by `.bind` of a function or of a method."""

    def __init__(self, app: Application, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.app = app
        self.method = method
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        return f"CallNode({self.app._bound_deployment.name}.{self.method})"


class Method:
    """A method of a bound class, before it is bound to its arguments."""

    def __init__(self, app: Application, name: str) -> None:
        self._app = app
        self._name = name

    def bind(self, *args: Any, **kwargs: Any) -> CallNode:
        """The method's answer as a node of a graph.

        Args:
            *args, **kwargs: nodes, Applications (their answers), and other values, nested in lists, tuples and dicts.
        """
        return CallNode(self._app, self._name, args, kwargs)


def method_of(app: Application, name: str) -> Method:
    """A method of a bound class, to be bound as a node of a graph.

    Raises:
        AttributeError: the class has none of this name.
    """
    code = app._bound_deployment.func_or_class
    if isinstance(code, type) and callable(getattr(code, name, None)) and (name == "__call__" or name[:2] != "__"):
        return Method(app, name)
    raise AttributeError(f"{app!r} has no attribute {name!r}, and the deployment no method of this name to bind.")


def holds_node(value: Any) -> bool:
    """Whether there is a node in it, within lists, tuples and dicts.

    >>> holds_node({"a": [1, (InputNode(),)]}), holds_node([1])
    (True, False)
    """
    if isinstance(value, (list, tuple)):
        return any(map(holds_node, value))
    if isinstance(value, dict):
        return any(map(holds_node, value.values()))
    return isinstance(value, Node)
