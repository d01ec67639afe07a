"""``kvstore verify``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvstore.cli.target import KEYS, NAMES, VARIABLES, AsJson, daemon, is_cache, place_of
from kvstore.errors import BadInput, Unreachable

if TYPE_CHECKING:
    from rich.status import Status

    from kvstore.tiers.base import Problem

HELP = """
Read every block on disk, check it against its checksums, and print what is wrong.

* `kvstore verify cache` reads the blocks of a directory, by itself or through the daemon that serves it;

* `kvstore verify cache --encryption keys` opens encrypted blocks, too; without their keys, only that what is encrypted
  has changed can be found;

* `kvstore verify unix:/run/kvstore.sock` has a daemon read those of its directory, while it serves.

Exit code 0: every block is what was written. 1: something is wrong; each problem has a line. 2: it cannot be verified,
because it is no cache or because a process that is no daemon holds it.
"""


def verify(
    dir: Annotated[
        str,
        typer.Argument(metavar="[DIR]", help=f"{NAMES}.", envvar=VARIABLES, show_envvar=False, show_default=False),
    ] = "",
    encryption: Annotated[
        Path | None, typer.Option(envvar=KEYS, show_envvar=False, help="The folder of the keys of encrypted blocks.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    place = place_of(dir)
    if not place.is_socket() and not is_cache(place):
        raise BadInput(
            f"{place} is not a cache directory of kvstore; give the folder that --dir or kvstore.open() named"
        )
    blocks, locked, problems = _served(dir, place, encryption)
    if as_json:
        told = {"blocks": blocks, "problems": [asdict(problem) for problem in problems]}
        print(json.dumps(told | ({"locked": locked} if locked else {})))
        raise typer.Exit(bool(problems))
    for problem in problems:
        print(f"block {problem.key[:16]}: {problem.what}" if problem.key else problem.what)
    print(
        f"{blocks} blocks read, {len(problems)} with problems" if problems else f"{blocks} blocks read, all as written"
    )
    if locked:
        print(f"{locked} of them are encrypted with keys that are not there; --encryption names their folder")
    if problems:
        raise typer.Exit(1)


def _served(target: str, place: Path, keys: Path | None) -> tuple[object, object, list[Problem]]:
    """How many blocks there are, how many of them have no key, and what is wrong; through a daemon, if there is one."""
    try:
        with daemon(target) as found:
            blocks = found.stats()["tiers"].get("disk", {"blocks": 0})["blocks"]
            with _reading(blocks):
                return blocks, 0, found.verify()
    except Unreachable:
        if not place.is_dir():
            raise
    from kvstore.directory import verify as checked

    seen = checked(place, keys)
    blocks, locked = next(seen), next(seen)
    with _reading(blocks):
        return blocks, locked, [problem for problem in seen if not isinstance(problem, int)]


def _reading(blocks: object) -> Status:
    return Console(stderr=True).status(f"reading {blocks} blocks")
