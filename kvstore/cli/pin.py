"""``kvstore pin``."""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

import typer

from kvstore.cli.target import NAMES, VARIABLES, AsJson, daemon
from kvstore.errors import BadInput

HELP = """
Keep a segment where it is fast, whatever else comes: what stands in it, and what stands before it.

ID is what `kvstore ls` shows in its first column, or the first digits of it.

* `kvstore pin cache 5e0c21 --seconds 600` keeps it in memory until ten minutes after its last use, and ten times as
  long at most;

* `--tier disk` keeps it on disk, written there if it is not yet.

Pins take half of a tier at most, and end with the daemon. Exit code 1: only a part of it, or nothing, is pinned.
"""


def pin(
    words: Annotated[list[str], typer.Argument(metavar="[TARGET] ID", show_default=False, help=f"{NAMES}; and an id.")],
    seconds: Annotated[float, typer.Option(min=0.001, help="How long after the last use.", show_default=False)],
    tier: Annotated[Literal["host", "disk"], typer.Option(help="Where.")] = "host",
    as_json: AsJson = False,
) -> None:
    if len(words) > 2:
        raise BadInput("pin takes one id at a time")
    target = words[0] if len(words) == 2 else next(filter(None, map(os.environ.get, VARIABLES)), "")
    with daemon(target) as found:
        pinned = found.pin_segment(words[-1], tier, seconds)
    if as_json:
        said = {name: getattr(pinned, name) for name in ("tier", "asked", "tokens", "seconds", "until", "why")}
        print(json.dumps(said))
    else:
        print(pinned)
    if pinned.tokens < pinned.asked:
        raise typer.Exit(1)
