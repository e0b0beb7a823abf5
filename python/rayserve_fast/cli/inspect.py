"""`rayserve-fast status` and `rayserve-fast shutdown`: what runs on a cluster, and the end of it."""

from __future__ import annotations

from dataclasses import asdict

import click
import yaml

from rayserve_fast.cli.cluster import ADDRESS_HELP, connect


@click.command()
@click.option("-a", "--address", envvar="RAY_ADDRESS", help=ADDRESS_HELP)
@click.option("-n", "--name", help="Only this application.")
def status(address: str | None, name: str | None) -> None:
    """Print the proxies and applications of the cluster and their states, as YAML."""
    from rayserve_fast import serve

    connect(address)
    found = asdict(serve.status())
    if name is not None:
        if name not in found["applications"]:
            known = ", ".join(found["applications"]) or "none"
            raise click.ClickException(f"there is no application {name!r}; running: {known}")
        found = found["applications"][name]
    click.echo(yaml.dump(found, Dumper=_Dumper, sort_keys=False), nl=False)


@click.command()
@click.option("-a", "--address", envvar="RAY_ADDRESS", help=ADDRESS_HELP)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def shutdown(address: str | None, yes: bool) -> None:
    """Delete all applications of the cluster, draining them, and stop Serve."""
    from rayserve_fast import serve

    connect(address)
    running = serve.status()
    if not running.proxies and not running.applications:
        click.echo("Serve is not running.")
        return
    if not yes:
        names = ", ".join(running.applications) or "none"
        click.confirm(f"This stops Serve and deletes its applications ({names}). Continue?", abort=True)
    serve.shutdown()
    click.echo("Serve is shut down.")


class _Dumper(yaml.SafeDumper):
    """Enumerations as their values; text of several lines, such as a traceback, as a block."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = str.__str__(text)
        return self.represent_scalar("tag:yaml.org,2002:str", plain, style="|" if "\n" in plain else None)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(str, _Dumper.represent_text)
