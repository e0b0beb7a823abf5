"""The command line of the benchmark: `python -m bench [run|render|readme|venvs]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import envs, peers, plot, report, run, works

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = run.Settings(rounds=1, seconds=1, warm_s=0, connections=(1, 8, 64))
QUICK_CELLS = {"upload_1m": (8,), "download_1m": (8,), "async_noop": (1, 64)}  # the others by HTTP: 64 only


def main() -> None:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="bench", description="rayserve-fast and its peers, measured in one run")
    parser.add_argument(
        "action",
        nargs="?",
        default="run",
        choices=["run", "render", "readme", "venvs"],
        help="run (default); render JSON again; put the tables into a README; only make the environments",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few minutes; its figures are rough")
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default="",
        help=(
            "peers and works to measure, all of a sort when none of it is named; peers: "
            + ", ".join(peers.BY_NAME)
            + "; works: "
            + ", ".join(works.BY_NAME)
            + "; groups of works: "
            + ", ".join(works.GROUPS)
        ),
    )
    parser.add_argument("--rounds", type=int, help="rounds over the peers (default 3)")
    parser.add_argument("--seconds", type=int, help="whole seconds a cell (default 3)")
    parser.add_argument("--connections", metavar="N,...", help="measure only these numbers of connections")
    parser.add_argument(
        "--ours-python", type=Path, help="a Python that has rayserve-fast, instead of installing it anew"
    )
    parser.add_argument("--name", help="name of the files in bench/results (default: full, or quick)")
    parser.add_argument("--readme", type=Path, default=envs.REPOSITORY / "README.md", help="the file for `readme`")
    wish = parser.parse_args()
    path = RESULTS / f"{wish.name or ('quick' if wish.quick else 'full')}.json"
    if wish.action == "run":
        run.save(measure(wish), path)
    elif wish.action == "venvs":
        interpreters(chosen_peers(wish.only), wish.ours_python)
        return
    raw = json.loads(path.read_text())
    if wish.action == "readme":
        wish.readme.write_text(report.replace_section(wish.readme.read_text(), report.readme_section(raw)))
        return
    path.with_suffix(".md").write_text(report.render(raw))
    path.with_suffix(".svg").write_text(plot.render(raw))
    print(report.targets_table(report.Medians(raw)))
    print(f"\nwritten: {path}, .md, .svg")


def measure(wish: argparse.Namespace) -> dict:
    """The raw result of the run that the arguments describe."""
    names = {name for name in wish.only.split(",") if name}
    if unknown := names - set(peers.BY_NAME) - set(works.BY_NAME) - set(works.GROUPS):
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; see --help")
    base = QUICK if wish.quick else run.Settings()
    counts = tuple(map(int, wish.connections.split(","))) if wish.connections else base.connections
    settings = run.Settings(wish.rounds or base.rounds, wish.seconds or base.seconds, base.warm_s, counts)
    todo = [work for work in works.WORKS if names & {work.name, work.group}] or list(works.WORKS)
    chosen = [peer for peer in chosen_peers(wish.only) if run.suited(todo, peer)]
    if wish.quick and not wish.connections:
        todo = [
            works.with_connections(work, QUICK_CELLS.get(work.name, (64,))) if work.group == works.HTTP else work
            for work in todo
        ]
    return run.run(chosen, todo, settings, interpreters(chosen, wish.ours_python))


def chosen_peers(only: str) -> list[peers.Peer]:
    """The peers that `only` names, or all when it names none of them."""
    named = [peer for peer in peers.PEERS if peer.name in only.split(",")]
    return named or list(peers.PEERS)


def interpreters(chosen: list[peers.Peer], ours: Path | None) -> dict[str, Path]:
    """The Python of each peer's environment."""
    return {peer.name: ours if ours and peer.environment.ours else envs.prepare(peer.environment) for peer in chosen}


if __name__ == "__main__":
    main()
