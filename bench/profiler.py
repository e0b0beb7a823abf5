"""Look inside one process under load: system calls, counters, samples, Python frames, each per request.

`python -m bench.profiler strace --role proxy` starts a peer (ours unless `--peer` says otherwise), finds the process of
that role which works for the chosen application, attaches the tool to it while the load runs, and prints what the tool
saw over the requests that were counted. A tool slows its process, strace the most: read counts and shares, not rates.

strace: calls per request by name. perf: hardware and scheduler counters per request, as far as the machine has them.
samples: the hottest functions of the process by perf. pyspy: the hottest Python (and native) frames.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import envs, peers, procs, run, works

PROCESSES = ["proxy", "replica", "caller", "callee"]  # the last two in works of handles
COUNTERS = "instructions:u,instructions:k,cycles,task-clock,context-switches,cpu-migrations,page-faults"


def main() -> None:
    """Parse the arguments, serve, attach, load, print."""
    parser = argparse.ArgumentParser(prog="bench.profiler", description="what one process does per request, under load")
    parser.add_argument("tool", choices=["strace", "perf", "samples", "pyspy"])
    parser.add_argument("--role", default="proxy", choices=PROCESSES, help="which process (default: proxy)")
    parser.add_argument("--work", default="async_noop", choices=list(works.BY_NAME))
    parser.add_argument("--connections", type=int, help="or callers (default: the most that the work has)")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--peer", default="rayserve-fast", choices=list(peers.BY_NAME))
    parser.add_argument(
        "--ours-python", type=Path, help="a Python that has rayserve-fast, instead of installing it anew"
    )
    wish = parser.parse_args()
    peer, work = peers.BY_NAME[wish.peer], works.BY_NAME[wish.work]
    python = wish.ours_python if wish.ours_python and peer.environment.ours else envs.prepare(peer.environment)
    procs.adopt_orphans()
    peers.FOLDER.mkdir(exist_ok=True)
    try:
        with peers.Visit(peer, python, [work.app or "async_noop"], peers.FOLDER / "profiler.log") as running:
            make_load, count = run.load_of(running, work), wish.connections or work.connections[-1]
            pid = busiest(peer, work, wish.role, lambda seconds: make_load(count, seconds))
            print(f"{wish.tool} on {procs.title(pid)} ({wish.role}, process {pid})")
            print(f"{work.title}, {count} {work.source}s")
            attached = Attached(wish.tool, pid, wish.seconds)
            result = make_load(count, wish.seconds)
            print(attached.report(result["requests"]))
            print(f"{result['requests']} {work.unit}s in {result['seconds']:.1f} s, errors {result['errors']}")
    finally:
        procs.end_all(os.getpid())


def busiest(peer: peers.Peer, work: works.Work, role: str, load_for) -> int:
    """The process of `role` that used most CPU in a second of load, which also warms it."""
    before = procs.measure(os.getpid())
    load_for(1)
    rows = run.spent(peer, work, before, procs.measure(os.getpid()))
    mine = [row for row in rows if row["role"] == role]
    if not mine:
        raise SystemExit(f"no process of role {role} worked; those that did: {[row['title'] for row in rows]}")
    return max(mine, key=lambda row: row["cpu_s"])["pid"]


class Attached:
    """A tool attached to a process until `report`."""

    def __init__(self, tool: str, pid: int, seconds: int) -> None:
        self.tool = tool
        self.file = Path(tempfile.mkstemp(prefix="bench-profile-")[1])
        where, target = str(self.file), str(pid)
        command = {
            "strace": ["strace", "-c", "-f", "-o", where, "-p", target],
            "perf": ["perf", "stat", "-e", COUNTERS, "-x", ",", "-o", where, "-p", target],
            "samples": ["perf", "record", "-e", "cpu-clock", "-F", "997", "-g", "-o", where, "-p", target],
            "pyspy": [
                "py-spy",
                "record",
                "--native",
                "-r",
                "200",
                "-d",
                str(seconds),
                "-f",
                "raw",
                "-o",
                where,
                "-p",
                target,
            ],
        }[tool]
        if shutil.which(command[0]) is None:
            raise SystemExit(f"{command[0]} is not installed (Debian: strace, linux-perf; Python: pip install py-spy)")
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.5)  # until it has attached to every thread

    def report(self, requests: int) -> str:
        """Detach and say what was seen, over `requests`."""
        if self.tool != "pyspy":  # it ends by itself, after its seconds
            self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        try:
            if self.tool == "samples":
                command = [
                    "perf",
                    "report",
                    "--stdio",
                    "--no-children",
                    "-g",
                    "none",
                    "--percent-limit",
                    "0.7",
                    "-i",
                    str(self.file),
                ]
                return subprocess.run(command, capture_output=True, text=True, check=False).stdout
            text = self.file.read_text()
            return {"strace": calls, "perf": counters, "pyspy": frames}[self.tool](text, requests)
        finally:
            self.file.unlink()


def calls(text: str, requests: int) -> str:
    """strace's summary as calls per request, the frequent first."""
    found = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", text, re.MULTILINE)
    rows = sorted(((int(count), name) for count, name in found if name != "total"), reverse=True)
    lines = [f"{count / max(1, requests):8.3f} a request  {count:8d}  {name}" for count, name in rows]
    total = sum(count for count, _ in rows)
    return "\n".join([*lines, f"{total / max(1, requests):8.3f} a request  {total:8d}  together"])


def counters(text: str, requests: int) -> str:
    """perf stat's counters per request; those that the machine lacks are named."""
    lines = []
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) > 2 and not line.startswith("#"):
            known = fields[0].replace(".", "", 1).isdigit()
            value = f"{float(fields[0]) / max(1, requests):12.4f} a request" if known else f"{'not counted here':>22}"
            lines.append(f"{value}  {fields[2]} {fields[1]}".rstrip())
    return "\n".join(lines)


def frames(text: str, _requests: int) -> str:
    """py-spy's stacks as the frames in which most samples ended, with their share."""
    leaves: dict[str, int] = {}
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        leaf = stack.rpartition(";")[2]
        leaves[leaf] = leaves.get(leaf, 0) + int(count)
    total = sum(leaves.values()) or 1
    rows = sorted(leaves.items(), key=lambda item: -item[1])[:40]
    return "\n".join(f"{count / total:6.1%}  {leaf}" for leaf, count in rows)


if __name__ == "__main__":
    sys.exit(main())
