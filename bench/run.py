"""Measure: rounds over the peers, a visit each for a group of works, a cell for every work and number of connections.

The peers take turns and every round starts with another one, so a disturbance of the machine does not always hit the
same peer; the report takes medians over the rounds. Each cell also records how much CPU foreign processes took
meanwhile, so a disturbed run shows it. Everything that was started is ended by its id.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

from bench import envs, load, peers, procs
from bench.apps import SLEEP_S
from bench.works import BATCHERS, DRIVER, EVERYONE, GROUPS, HANDLES, INSIDE, SERVES, STEADY, Work

Load = Callable[[int, float], dict]  # connections or callers, seconds


@dataclass(frozen=True)
class Settings:
    """How much to measure. wrk takes whole seconds; `warm_s` of 0 leaves the warming out."""

    rounds: int = 3
    seconds: int = 3
    warm_s: int = 1
    connections: tuple[int, ...] = (1, 8, 64)


def run(chosen: list[peers.Peer], works: list[Work], settings: Settings, pythons: dict[str, Path]) -> dict:
    """The raw result of a run, ready for JSON. `pythons` gives the interpreter of each peer."""
    procs.adopt_orphans()
    peers.FOLDER.mkdir(exist_ok=True)
    load.require_wrk()
    result: dict = {
        "format": 1,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "commit": commit(),
        "settings": asdict(settings),
        "peers": {peer.name: {"title": peer.title, "variables": peer.variables} for peer in chosen},
        "versions": {peer.name: envs.versions(pythons[peer.name]) for peer in chosen},
        "samples": [],
        "scalars": [],
        "failures": [],
    }
    began = time.monotonic()
    for number in range(settings.rounds):
        turn = number % len(chosen)
        result["scalars"].append({"name": "one_thread_sleeps_per_s", "value": one_thread_sleeps(), "round": number})
        for group, peer in product(GROUPS, chosen[turn:] + chosen[:turn]):
            if not (todo := [work for work in suited(works, peer) if work.group == group]):
                continue
            print(f"bench: round {number + 1}/{settings.rounds}, {group}, {peer.title}", file=sys.stderr, flush=True)
            for _ in range(2):  # a peer that does not come up gets one more chance
                try:
                    visit(peer, pythons[peer.name], todo, settings, number, result)
                    break
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    failure(result, peer, number, "", error)
                finally:
                    for title in procs.end_all(os.getpid()):
                        print(f"bench: ended a leftover of {peer.name}: {title}", file=sys.stderr)
    result["took_s"] = round(time.monotonic() - began)
    return result


def suited(works: list[Work], peer: peers.Peer) -> list[Work]:
    """The works that make sense for `peer`, those of one application next to each other."""
    kinds = {"serve": {EVERYONE, SERVES, BATCHERS}, "mosec": {BATCHERS}}
    suiting = {peer.name} | kinds.get(peer.kind, {EVERYONE})
    return [work for work in works if work.peers in suiting]


def visit(peer: peers.Peer, python: Path, works: list[Work], settings: Settings, number: int, result: dict) -> None:
    """Start the peer, measure each of its cells once, stop it."""
    apps = list(dict.fromkeys(work.app for work in works if work.app)) or ["async_noop"]
    log = peers.FOLDER / f"{peer.name}.log"
    with peers.Visit(peer, python, apps, log) as running:
        if apps[:2] == ["async_noop", "sync_noop"]:  # the times are those of no-ops only then
            result["scalars"] += [
                {"name": f"{peer.name}:{name}", "value": value, "round": number}
                for name, value in running.times.items()
            ]
        for work in works:
            try:
                make_load = load_of(running, work)
                measure = cell_of(running, work, make_load)
                widest = [count for count in work.connections if count in settings.connections]
                if settings.warm_s and widest:
                    make_load(widest[-1], settings.warm_s)
                for connections in widest:
                    result["samples"].append(measure(connections, settings.seconds * work.stretch) | {"round": number})
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failure(result, peer, number, work.name, error)


def load_of(running: peers.Visit, work: Work) -> Load:
    """A function that loads the peer with `work`, whose answer has been checked."""
    if work.by == DRIVER:
        return running.driver(work)
    url, body = running.endpoint(work), body_file(work)
    if work.by == INSIDE:
        return partial(load.inside, url)
    if work.by == STEADY:
        return lambda _, seconds: load.steady(url, work.rate, seconds, work.body, work.content_type)
    return lambda connections, seconds: load.wrk(url, connections, seconds, body, work.content_type)


def cell_of(running: peers.Visit, work: Work, make_load: Load) -> Load:
    """A function that measures one cell: the load's result with what it cost the peer's processes."""
    peer = running.peer

    def measure(connections: int, seconds: float) -> dict:
        stuck = load.one_stuck_handler(running.url) if work.stuck else nullcontext([])
        with stuck as statuses:
            before, busy = procs.measure(os.getpid()), procs.busy_s()
            sample = make_load(connections, seconds)
            after, busy = procs.measure(os.getpid()), procs.busy_s() - busy
        processes = spent(peer, work, before, after)
        own = sum(process["cpu_s"] for process in processes) + sample["client_cpu_s"]
        sample["errors"]["stuck_client"] = sum(status != 200 for status in statuses)
        sample["foreign_cpus"] = round(max(0.0, busy - own) / sample["seconds"], 3)
        return {"peer": peer.name, "work": work.name, "connections": connections, **sample, "processes": processes}

    return measure


def spent(peer: peers.Peer, work: Work, before: dict[int, procs.Usage], after: dict[int, procs.Usage]) -> list[dict]:
    """What each process of the peer used, under its role in the work."""
    roles = procs.call_roles(work.app) if work.group == HANDLES else procs.ROLES
    return procs.spent(before, after, "other" if peer.kind == "serve" else "replica", roles)


def body_file(work: Work) -> Path | None:
    """The work's body in a file for wrk."""
    if not work.body:
        return None
    path = peers.FOLDER / f"{work.name}.body"
    path.write_bytes(work.body)
    return path


def failure(result: dict, peer: peers.Peer, number: int, work: str, error: Exception) -> None:
    """Record what could not be measured; the report shows it."""
    print(f"bench: {peer.name} {work}: {error}", file=sys.stderr)
    result["failures"].append({"peer": peer.name, "work": work, "round": number, "error": str(error)})


def one_thread_sleeps(seconds: float = 1.0) -> float:
    """How many times a second one Python thread can sleep for `SLEEP_S`: the most that one thread could serve."""
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        time.sleep(SLEEP_S)
        count += 1
    return count / passed


def machine() -> dict:
    """What the figures were taken on."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.machine()),
        "virtual": "hypervisor" in fields.get("flags", "").split(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "wrk": subprocess.run([load.require_wrk(), "-v"], capture_output=True, text=True, check=False).stdout.split(
            " ["
        )[0],
        "load_before": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit of this repository, marked when the tree differs from it."""
    command = ["git", "-C", str(envs.REPOSITORY), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(result: dict, path: Path) -> None:
    """Write the raw result."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
