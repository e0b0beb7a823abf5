"""What the processes of a peer cost: CPU seconds and context switches from /proc, and ending them by id.

The driver makes itself the reaper of its orphans (`adopt_orphans`), so that a Ray or HAProxy process which lost its
parent is still a descendant: everything below the driver, except the load generator, belongs to the one peer that is
running. CPU time is the kernel's utime + stime; switches are voluntary + involuntary, summed over the threads.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36
Roles = tuple[tuple[str, re.Pattern[str]], ...]
ROLES: Roles = (
    ("proxy", re.compile(r"haproxy|proxy", re.IGNORECASE)),
    ("replica", re.compile(r"replica", re.IGNORECASE)),
)


def call_roles(app: str) -> Roles:
    """The roles where deployments of `app` call each other; what serves other applications has none."""
    callee = re.compile(rf":{app}:(Callee|Link)")
    return (("callee", callee), ("caller", re.compile(rf":{app}:|bench\.driver")), ROLES[0])


@dataclass(frozen=True)
class Usage:
    """What one process has used since it started."""

    title: str
    cpu_s: float
    switches: dict[int, tuple[int, int]]  # by thread: voluntary, involuntary


def adopt_orphans() -> None:
    """Make descendants whose parent dies children of this process (Linux)."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot become a subreaper")


def descendants(root: int) -> list[int]:
    """The ids of all processes below `root`."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := stat_fields(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/pid/stat after the command name (which may hold spaces); None if the process is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def usage(pid: int) -> Usage | None:
    """The usage of `pid` so far, or None if it is gone."""
    fields = stat_fields(pid)
    if fields is None:
        return None
    switches = {}
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            try:
                switches[int(task.name)] = context_switches((task / "status").read_text())
            except OSError:
                continue  # the thread ended while we looked
        return Usage(title(pid), (int(fields[11]) + int(fields[12])) * TICK_S, switches)
    except OSError:
        return None


def context_switches(status: str) -> tuple[int, int]:
    """Voluntary and involuntary switches in the text of a /proc status file."""
    counts = dict(line.split(":", 1) for line in status.splitlines() if "ctxt_switches:" in line)
    return int(counts["voluntary_ctxt_switches"]), int(counts["nonvoluntary_ctxt_switches"])


def title(pid: int) -> str:
    """A short name: Ray's own title of a worker, else the program and its first argument, without folders and flags."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    if words[0].startswith("ray::"):
        return words[0].strip()
    return " ".join([os.path.basename(word) for word in words if word and not word.startswith("-")][:2])


def role(name: str, otherwise: str = "other", roles: Roles = ROLES) -> str:
    """One of `roles` or `otherwise` (on Ray: raylet, GCS, controllers, drivers), by the title of the process."""
    return next((known for known, pattern in roles if pattern.search(name)), otherwise)


def measure(root: int) -> dict[int, Usage]:
    """The usage of everything below `root`."""
    return {pid: each for pid in descendants(root) if (each := usage(pid)) is not None}


def spent(
    before: dict[int, Usage], after: dict[int, Usage], otherwise: str = "other", roles: Roles = ROLES
) -> list[dict]:
    """What each process used between two measurements, the idle ones left out."""
    rows = []
    for pid, now in after.items():
        then = before.get(pid, Usage(now.title, 0.0, {}))
        more = [
            (waited - then.switches.get(tid, (0, 0))[0], forced - then.switches.get(tid, (0, 0))[1])
            for tid, (waited, forced) in now.switches.items()
        ]
        forced = sum(forced for _, forced in more)
        switches = sum(waited for waited, _ in more) + forced
        cpu_s = now.cpu_s - then.cpu_s
        if cpu_s > 0 or switches > 0:
            row = {"pid": pid, "title": now.title, "role": role(now.title, otherwise, roles)}
            rows.append(row | {"cpu_s": round(cpu_s, 3), "switches": switches, "involuntary": forced})
    return rows


def busy_s() -> float:
    """CPU seconds that the whole machine has spent working (not idle, not waiting, not stolen)."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, (PROC / "stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) * TICK_S


def end_all(root: int, grace_s: float = 5.0) -> list[str]:
    """End every descendant of `root`: SIGTERM, then SIGKILL after `grace_s`. Returns the titles of what was left."""
    left = {pid: title(pid) for pid in descendants(root) if alive(pid)}
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace_s
        for pid in filter(alive, descendants(root)):
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
        while time.monotonic() < deadline and any(alive(pid) for pid in descendants(root)):
            reap()
            time.sleep(0.02)
    reap()
    return sorted(left.values())


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie does not."""
    fields = stat_fields(pid)
    return fields is not None and fields[0] not in "ZX"


def reap() -> None:
    """Collect the ended children of this process. Only for moments when no subprocess is being waited for."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
