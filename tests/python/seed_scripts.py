"""Documents as scripts: their code blocks as written, and between them what the text says, as assertions.

Text replacement changes two things: the import line, which is the whole migration, and the port, since 8000 may be
taken here. A block in the form of a session (`>>> expression`, then what it shows) becomes an assertion by itself.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

# A Ray of its own with CPUs to spare, and Serve on a free port; what the documents start finds both running.
PRELUDE = """
import ray
from rayserve_fast import serve
ray.init(address="local", num_cpus=8, include_dashboard=False)
serve.start(http_options={{"port": {port}}})
"""


def script(parts: Iterable[str], port: int, prelude: str = PRELUDE) -> str:
    """The script of these blocks and checks, in their order; it prints `the end` when nothing failed."""
    source = "\n".join(_runnable(textwrap.dedent(part)) for part in parts)
    source = source.replace("from ray import serve", "from rayserve_fast import serve").replace(":8000", f":{port}")
    return prelude.format(port=port) + source + "\nprint('the end')\n"


def _runnable(block: str) -> str:
    if not re.search(r"^>>", block, re.MULTILINE):
        return block
    lines = []
    for step in re.split(r"^>>>? ", block, flags=re.MULTILINE)[1:]:
        expression, _, shown = step.partition("\n")
        lines.append(f"assert ({expression}) == ({shown.strip()}), {expression}" if shown.strip() else expression)
    return "\n".join(lines)
