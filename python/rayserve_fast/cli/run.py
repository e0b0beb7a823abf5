"""`rayserve-fast run`: deploy one application, say where it listens, wait for Ctrl-C, leave nothing behind."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import ray

from rayserve_fast import serve
from rayserve_fast.cli.cluster import ADDRESS_HELP, connect
from rayserve_fast.cli.loading import load_application, parse_arguments
from rayserve_fast.controlplane import client
from rayserve_fast.controlplane.spec import DEFAULT_ROUTE
from rayserve_fast.exceptions import RayServeException

if TYPE_CHECKING:
    from rayserve_fast.deployment import Application


@click.command()
@click.argument("import_path", metavar="MODULE:APP")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("-a", "--address", envvar="RAY_ADDRESS", help=ADDRESS_HELP + " Without either, a local Ray is started.")
@click.option("--host", help="Where the HTTP proxies listen.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="The HTTP port, 0 for a free one.  [default: 8000]")
@click.option(
    "--route-prefix", help="The path under which the application answers.  [default: the deployment's own, else /]"
)
@click.option("--name", default="default", show_default=True, help="The application's name.")
@click.option("-d", "--app-dir", default=".", show_default=True, help="Where MODULE is looked for.")
@click.option("--working-dir", help="A directory or remote URI that the replicas run in.")
@click.option(
    "--blocking/--non-blocking", default=True, show_default=True, help="Stay until Ctrl-C, or return once it serves."
)
def run(
    import_path: str,
    arguments: tuple[str, ...],
    address: str | None,
    host: str | None,
    port: int | None,
    route_prefix: str | None,
    name: str,
    app_dir: str,
    working_dir: str | None,
    blocking: bool,
) -> None:
    """Serve the application MODULE:APP over HTTP.

    APP is what `Deployment.bind()` returned, or a function that takes the KEY=VALUE arguments as a dict (or as the
    pydantic model that it is annotated with) and returns one. Ctrl-C or SIGTERM finishes the requests in flight and
    shuts Serve down.

    \b
      rayserve-fast run main:app
      rayserve-fast run main:build model=/models/a.onnx --port 9000
    """
    sys.path.insert(0, app_dir := str(Path(app_dir).resolve()))
    app = load_application(import_path, parse_arguments(arguments), app_dir)
    connect(address, may_start=blocking, runtime_env={"working_dir": working_dir} if working_dir else None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        deploy(app, name, route_prefix, {"host": host, "port": port})
        if blocking:
            click.echo("Ctrl-C finishes the requests in flight and stops.")
            threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("\nStopping.")
        serve.shutdown()
    finally:
        ray.shutdown()


def deploy(app: Application, name: str, route_prefix: str | None, http: dict[str, Any]) -> None:
    """Start Serve if needed, deploy, and print where the application answers."""
    try:
        serve.start(http_options={key: value for key, value in http.items() if value is not None})
        serve.run(app, name=name, route_prefix=DEFAULT_ROUTE if route_prefix is None else route_prefix)
    except (TypeError, ValueError, RuntimeError, RayServeException) as error:
        raise click.ClickException(str(error)) from error
    options, address = client.ready(client.require())
    if address is None:
        click.echo(f"{name!r} is ready; HTTP is disabled on this cluster.")
        return
    host, port = address
    root = f"http://{f'[{host}]' if ':' in host else host}:{port}{options.root_path}"
    served = sorted(routes().items())
    own = next((prefix for prefix, other in served if other == name), None)
    click.echo(f"{name!r} is ready; it has no route." if own is None else f"{name!r} is ready at {root}{own}")
    for prefix, other in served:
        click.echo(f"  {prefix:<20} {other}")
    click.echo(f"Routes: {root}/-/routes  Health: {root}/-/healthz")


def routes() -> dict[str, str]:
    """Every route of the cluster and its application."""
    return {route["prefix"]: route["app"] for route in json.loads(client.snapshot())["routes"]}
