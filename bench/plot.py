"""One picture of a run as SVG, without a plotting library: requests per second of every peer for every work.

Bars are logarithmic, since the peers differ by two orders of magnitude; the numbers stand beside them.
"""

from __future__ import annotations

import math
from html import escape

from bench.report import Medians
from bench.works import WORKS

COLOURS = {
    "rayserve-fast": "#d1495b",
    "ray-serve": "#9aa5b1",
    "ray-serve-best": "#5f7a95",
    "uvicorn": "#8d96a8",
    "granian": "#66a182",
    "haproxy-granian": "#edae49",
    "mosec": "#a06cb5",
}
LABEL, WIDTH, BAR, GAP, TOP = 250, 660, 13, 14, 58


def render(raw: dict, connections: int = 64) -> str:
    """The SVG document."""
    medians = Medians(raw)
    peers = list(raw["peers"])
    works = [work for work in WORKS if sum((peer, work.name, connections) in medians.cells for peer in peers) > 1]
    shown = [
        medians.cells[key]["rps"] for key in medians.cells if key[2] == connections and medians.cells[key]["rps"] > 0
    ]
    top, bottom = math.ceil(math.log10(max(shown, default=10))), math.floor(math.log10(min(shown, default=1)))
    scale = (WIDTH - 90) / max(1, top - bottom)
    marks, y = legend(raw), float(TOP)
    for work in works:
        marks.append(text(LABEL - 10, y + 11, work.title, "end", "bold"))
        for peer in peers:
            cell = medians.cells.get((peer, work.name, connections))
            if cell and cell["rps"] > 0:
                length = (math.log10(cell["rps"]) - bottom) * scale
                marks.append(
                    f'<rect x="{LABEL}" y="{y:.0f}" width="{length:.1f}" height="{BAR - 2}" fill="{COLOURS[peer]}"/>'
                )
                marks.append(text(LABEL + length + 5, y + 10, f"{cell['rps']:,.0f}"))
                y += BAR
        y += GAP
    body = "\n".join(marks)
    title = f"Requests or calls per second, {connections} at once (logarithmic)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + WIDTH}" height="{y:.0f}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        f"{text(10, 18, title, weight='bold')}\n{body}\n</svg>\n"
    )


def legend(raw: dict) -> list[str]:
    marks, x = [], 10.0
    for peer, about in raw["peers"].items():
        marks.append(f'<rect x="{x:.0f}" y="29" width="10" height="10" fill="{COLOURS[peer]}"/>')
        marks.append(text(x + 14, 38, about["title"]))
        x += 26 + 5.6 * len(about["title"])
    return marks


def text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
