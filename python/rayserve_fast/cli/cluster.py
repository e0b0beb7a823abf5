"""Which Ray the command line talks to: the one that is named, the one that runs here, or a new local one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click
import ray

ADDRESS_HELP = "Address of the Ray cluster. The default is $RAY_ADDRESS, or the cluster that runs on this machine."


def connect(address: str | None, *, may_start: bool = False, runtime_env: dict[str, Any] | None = None) -> None:
    """Connect this process to Ray.

    Args:
        address: `host:port` of a cluster, or None for the one that runs here.
        may_start: with `address` None, start a local Ray unless `ray start` has made a cluster here.
        runtime_env: the default for the deployments of this driver.

    Raises:
        click.ClickException: there is nothing to connect to.
    """
    if ray.is_initialized():  # the user's module has done it on import
        return
    if address is not None:
        probe(address)
    target = address if may_start else address or "auto"
    try:
        with interrupts_held():
            ray.init(address=target, runtime_env=runtime_env, logging_level=logging.WARNING)
    except ConnectionError as error:
        if address is None:
            hint = "no Ray cluster is running on this machine; start one with `ray start --head`, or pass --address"
        else:  # with an explicit address Ray never sends its token unless it is told to
            hint = f"cannot connect to Ray at {address}; if it asks for a token, set RAY_AUTH_MODE=token"
        raise click.ClickException(hint) from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block: a process whose `ray.init` was interrupted crashes when it exits.

    A second Ctrl-C ends the process at once; what `ray.init` has started on this machine then ends with it.
    """
    if threading.current_thread() is not threading.main_thread():  # signals do not come here
        yield
        return
    held = False

    def hold(_signal: int, _frame: FrameType | None) -> None:
        nonlocal held
        if held:
            os._exit(130)
        held = True
        click.echo("Stopping as soon as Ray has answered; press Ctrl-C again to give up at once.", err=True)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def probe(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself would try for two minutes and then end the process."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:  # "auto", "local", or a form that Ray itself explains
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise click.ClickException(f"no Ray cluster is running at {address}: {error}") from error
