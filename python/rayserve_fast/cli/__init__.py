"""The command line, `rayserve-fast`: run an application, look at what runs, shut it down.

Commands and flags are those of Ray Serve's `serve` where both exist, except that `-a/--address` is always the address
of the Ray cluster, never that of its dashboard. What goes wrong is said in one readable message with exit status 1;
a traceback is shown only for the user's own code.
"""

from __future__ import annotations

import click

from rayserve_fast.cli.inspect import shutdown, status
from rayserve_fast.cli.run import run

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rayserve-fast")
def main() -> None:
    """Serve Python models and functions over HTTP, on a Ray cluster."""


for command in (run, status, shutdown):
    main.add_command(command)
