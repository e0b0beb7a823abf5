"""From what stands on the command line to an application: `module:attribute` and `key=value` arguments.

Everything that can be wrong here is the user's to mend, so each fault says what was looked for and what was found.
"""

from __future__ import annotations

import importlib
import traceback
from difflib import get_close_matches
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click
import pydantic

import rayserve_fast
from rayserve_fast.importing import split

if TYPE_CHECKING:
    from rayserve_fast.deployment import Application

# Whose frames tell a user nothing: this package, the import system, and pydantic, which checks a builder's arguments.
OTHERS = (rayserve_fast.__file__, importlib.__file__, pydantic.__file__)
MACHINERY = ("<frozen importlib", *(str(Path(path).parent) for path in OTHERS))


def load_application(import_path: str, arguments: dict[str, str], app_dir: str) -> Application:
    """The application at `import_path`; a builder function found there is called with `arguments`.

    Raises:
        click.ClickException: there is no such application, or the user's code raised.
    """
    from rayserve_fast.application import call_builder
    from rayserve_fast.deployment import Deployment

    target = find(import_path, app_dir)
    if isinstance(target, Deployment):
        raise click.ClickException(f"{import_path!r} is a deployment, not an application: write `app = X.bind()`")
    try:
        return call_builder(target, arguments)
    except Exception as error:
        raise click.ClickException(told(f"{import_path!r} gave no application", error)) from error


def parse_arguments(arguments: tuple[str, ...]) -> dict[str, str]:
    """`("a=1", "b=x=y")` to `{"a": "1", "b": "x=y"}`."""
    parsed = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if not key or not value:
            raise click.ClickException(f"invalid application argument {argument!r}: write it as key=value")
        parsed[key] = value
    return parsed


def find(import_path: str, app_dir: str) -> Any:
    """The object that `module:attribute` (or `module.attribute`) names."""
    if import_path.endswith((".yaml", ".yml")):
        raise click.ClickException(f"{import_path!r}: configuration files are not supported yet, only module:attribute")
    try:
        name, attribute = split(import_path)
    except ValueError as error:
        raise click.ClickException(f"{error} For example: main:app") from error
    module = import_user_module(name, app_dir)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise click.ClickException(f"module {name!r} has no attribute {attribute!r}{suggestion(attribute, module)}")
        value = getattr(value, part)
    return value


def import_user_module(name: str, app_dir: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            near = get_close_matches(name, [path.stem for path in Path(app_dir).glob("*.py")], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise click.ClickException(
                f"there is no module {missing!r} in {app_dir} (--app-dir) or installed{hint}"
            ) from error
        raise click.ClickException(told(f"importing {name!r} failed", error)) from error


def suggestion(attribute: str, module: ModuleType) -> str:
    from rayserve_fast.deployment import Application

    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    usable = [name for name, value in own.items() if isinstance(value, Application) or isfunction(value)]
    if near := get_close_matches(attribute, usable, n=1):
        return f"; did you mean {near[0]!r}?"
    applications = [name for name, value in own.items() if isinstance(value, Application)]
    return f"; its applications: {', '.join(applications)}" if applications else "; it holds no application"


def told(what: str, error: BaseException) -> str:
    """The fault with the frames of the user's code, or in one line if it arose in ours."""
    trace = traceback.TracebackException.from_exception(error)
    strip(trace)
    if trace.stack or isinstance(error, SyntaxError):
        return f"{what}\n\n{''.join(trace.format()).rstrip()}"
    return f"{what}: {error}"


def strip(trace: traceback.TracebackException) -> None:
    """Leave out the frames that are not the user's, also in the causes."""
    foreign = [frame for frame in trace.stack if not frame.filename.startswith(MACHINERY)]
    trace.stack = traceback.StackSummary.from_list(foreign)
    for inner in (trace.__cause__, trace.__context__):
        if inner is not None:
            strip(inner)
