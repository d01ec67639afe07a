"""``kvstore verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvstore.errors import BadInput

HELP = """
Read every block of a cache directory, check it against its checksums, and print what is wrong.

Exit code 0: every block is what was written. 1: something is wrong; each problem has a line. 2: DIR cannot be verified,
because it is no cache or because a running process holds it.
"""


def verify(
    dir: Annotated[Path, typer.Argument(metavar="DIR", help="A cache directory.", show_default=False)],
) -> None:
    from kvstore.config import verify as found

    if not (dir / "CACHEDIR.TAG").is_file():
        raise BadInput(f"{dir} is not a cache directory of kvstore; give the folder that --dir or kvstore.open() named")
    seen = found(dir)
    blocks = next(seen)
    with Console(stderr=True).status(f"reading {blocks} blocks"):
        problems = [problem for problem in seen if not isinstance(problem, int)]
    for problem in problems:
        print(f"block {problem.key[:16]}: {problem.what}" if problem.key else problem.what)
    print(
        f"{blocks} blocks read, {len(problems)} with problems" if problems else f"{blocks} blocks read, all as written"
    )
    if problems:
        raise typer.Exit(1)
