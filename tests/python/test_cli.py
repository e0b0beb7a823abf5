"""The command line's faults: each is one readable message, exit status 1, and no traceback but the user's own.

None of these reaches Ray; what the commands do to a running cluster is in test_cli_run.py.
"""

from __future__ import annotations

import signal
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rayserve_fast.cli import main
from rayserve_fast.cli.cluster import interrupts_held

MODULE = """
from pydantic import BaseModel
from rayserve_fast import serve

@serve.deployment
class Echo:
    def __call__(self): return "hello"

app = Echo.bind()

class Options(BaseModel):
    replicas: int

def build(options: Options):
    return Echo.options(num_replicas=options.replicas).bind()

def broken(args):
    raise LookupError("no such model")

def nothing(args):
    return 7
"""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*args: object, **kwargs: object) -> None:
        raise AssertionError("the fault should have been found before Ray is asked for")

    monkeypatch.setattr("ray.init", init)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes `files` beside the module above and calls `rayserve-fast run` with the arguments."""
    name = f"app_{tmp_path.name}"  # imported modules stay in sys.modules: each test has its own

    def call(*arguments: str, **files: str) -> Result:
        for stem, source in {name: MODULE, **files}.items():
            (tmp_path / f"{stem}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        filled = [argument.replace("APP", name) for argument in arguments]
        return CliRunner().invoke(main, ["run", "--app-dir", str(tmp_path), *filled])

    return call


def fault(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.output.startswith("Error: "), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output.removeprefix("Error: ").rstrip()


def test_version_is_the_distribution_s() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert version("rayserve-fast") in result.output


@pytest.mark.parametrize("command", [[], ["run"], ["status"], ["shutdown"]])
def test_help_of_every_command(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("path", ["main", ":app", "main:", "a:b:c"])
def test_not_an_import_path(run, path: str) -> None:
    assert fault(run(path)).startswith(f'Got invalid import path "{path}"')


def test_a_configuration_file_is_refused_by_name(run) -> None:
    assert "configuration files are not supported yet" in fault(run("serve.yaml"))


def test_unknown_module_names_the_directory_and_a_near_one(run, tmp_path: Path) -> None:
    message = fault(run("summarise:app", summarize=""))
    assert (
        message == f"there is no module 'summarise' in {tmp_path} (--app-dir) or installed; did you mean 'summarize'?"
    )


def test_unknown_submodule(run) -> None:
    assert fault(run("json.nowhere:app")).startswith("there is no module 'json.nowhere'")


def test_missing_attribute_suggests_a_near_one(run) -> None:
    assert fault(run("APP:ap")).endswith("has no attribute 'ap'; did you mean 'app'?")


def test_missing_attribute_lists_the_applications(run) -> None:
    assert fault(run("APP:xyzzy")).endswith("has no attribute 'xyzzy'; its applications: app")


def test_missing_attribute_of_a_module_without_applications(run) -> None:
    assert fault(run("json:app")) == "module 'json' has no attribute 'app'; it holds no application"


def test_import_fault_shows_the_user_s_frames_only(run, tmp_path: Path) -> None:
    message = fault(run("outer:app", outer="import inner_with_fault", inner_with_fault="x = 1\ny = 1 / 0"))
    assert message.startswith("importing 'outer' failed\n\nTraceback (most recent call last):")
    assert f'File "{tmp_path}/outer.py", line 1' in message
    assert f'File "{tmp_path}/inner_with_fault.py", line 2' in message
    assert message.endswith("ZeroDivisionError: division by zero")
    assert "rayserve_fast" not in message
    assert "importlib" not in message


def test_a_module_that_the_user_s_module_lacks_is_a_traceback(run) -> None:
    message = fault(run("needs:app", needs="import numpyy"))
    assert 'needs.py", line 1' in message
    assert message.endswith("No module named 'numpyy'")


def test_syntax_error_points_at_the_line(run) -> None:
    message = fault(run("torn:app", torn="x = (\n"))
    assert 'torn.py", line 1' in message
    assert "SyntaxError" in message


def test_a_deployment_is_not_an_application(run) -> None:
    assert fault(run("APP:Echo")).endswith("is a deployment, not an application: write `app = X.bind()`")


@pytest.mark.parametrize("argument", ["model", "model=", "=7"])
def test_bad_argument(run, argument: str) -> None:
    assert fault(run("APP:build", argument)) == f"invalid application argument {argument!r}: write it as key=value"


def test_arguments_for_an_application_that_takes_none(run) -> None:
    assert "Arguments can only be passed to an application builder function" in fault(run("APP:app", "a=1"))


def test_arguments_that_the_builder_s_model_refuses(run) -> None:
    message = fault(run("APP:build", "replicas=many"))
    assert "replicas" in message
    assert "valid integer" in message
    assert "Traceback" not in message


def test_a_builder_that_raises_shows_its_own_frames(run) -> None:
    message = fault(run("APP:broken"))
    assert 'raise LookupError("no such model")' in message
    assert message.endswith("LookupError: no such model")
    assert "cli/loading.py" not in message


def test_a_builder_that_returns_no_application(run) -> None:
    assert "must return an `Application`" in fault(run("APP:nothing"))


def test_ctrl_c_waits_until_ray_has_started() -> None:
    reached = []

    def interrupted() -> None:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of what was under way")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached
    assert signal.getsignal(signal.SIGINT) is before
