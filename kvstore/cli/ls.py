"""``kvstore ls``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvstore.cli.target import AsJson, Target, store

if TYPE_CHECKING:
    from kvstore.segments import Segment

HELP = """
List what is stored: segments, which are blocks that are used together, such as a conversation or what several begin
with. It shows how many tokens they have, never which.

* `kvstore ls cache` lists what the daemon of the directory `cache` has; without a daemon it opens the directory;

* `kvstore ls --tenant acme --sort last-use --limit 5` lists what tenant `acme` used last;

* `kvstore pin TARGET ID` and `kvstore forget TARGET --id ID` take what stands in the first column.

*in* says how many of its blocks each tier has, *after* how many tokens stand before it, *uses* how often prompts found
it and *used* how long ago the last one did; *served* is its tokens times uses.
"""

Sort = Literal["served", "last-use", "created", "tokens", "uses"]
KEYS: Mapping[str, Callable[[Segment], Any]] = {
    "served": lambda one: (one.served, one.last_use),
    "last-use": lambda one: one.last_use,
    "created": lambda one: one.created,
    "tokens": lambda one: one.tokens,
    "uses": lambda one: one.uses,
}
LOOKED_AT = 10_000  # segments that are put in another order, the ones that served most


def ls(
    target: Target = "",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's, of those that namespaces name.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=LOOKED_AT, help="How many, at most.")] = 50,
    sort: Annotated[Sort, typer.Option(help="What comes first.")] = "served",
    as_json: AsJson = False,
) -> None:
    with store(target) as found:
        shown = found.segments(limit if sort == "served" else LOOKED_AT, tenant)
    shown = sorted(shown, key=KEYS[sort], reverse=True)[:limit]
    if as_json:
        print(json.dumps([asdict(one) for one in shown], indent=1))
        return
    from kvstore.cli import tables

    console = tables.console()
    console.print(tables.segments(shown, console.width) if shown else "nothing is stored")
