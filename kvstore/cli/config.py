"""``kvstore config``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvstore.cli.terminal import extras

if TYPE_CHECKING:
    from rich.table import Table

    from kvstore.settings import Row

HELP = """
Check the settings of a daemon, and print them as `kvstore serve` would take them.

Settings come from a file in TOML or YAML, over them the environment (`KVSTORE_HOST`, `KVSTORE_REDIS__URL`), over them
the flags of `kvstore serve`. What is printed is a file that says the same, but for secrets, which are never printed.

* `kvstore config --explain` shows what can be set, what each value is, and where it comes from;

* `kvstore config --schema` prints the schema in JSON, for editors.

Exit code 0: the settings are right. 2: they are not; all that is wrong is on stderr.
"""
WIDE = 160  # columns, where nobody looks on: text that is piped need not be folded


def config(
    file: Annotated[Path | None, typer.Option("--config", help="A file that ends in .toml, .yaml or .yml.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="A table of all settings instead.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="The schema instead; reads nothing.")] = False,
) -> None:
    with extras("serve"):
        from kvstore import settings

    if schema:
        print(json.dumps(settings.json_schema(), indent=2))
        return
    found = settings.load(file, serve=False)
    if explain:
        console = Console()
        console = console if console.is_terminal else Console(width=max(WIDE, console.width))
        console.print(table(settings.explain(found)))
    else:
        print(settings.as_toml(found), end="")
    if found.socket_path is None:
        print("kvstore: neither dir nor socket is set; kvstore serve will want one of them", file=sys.stderr)


def table(rows: list[Row]) -> Table:
    """One row a setting, with what it means below its name; what was set by somebody stands out."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table("setting", header_style="bold")
    drawn.columns[0].ratio, drawn.columns[0].overflow = 1, "fold"
    for name in ("value", "comes from"):
        drawn.add_column(name, overflow="fold")
    for row in rows:
        style = "" if row.origin == "default" else "green"
        kind = f"{row.type}, default {row.default}" if row.default else row.type
        said = Text.assemble((row.name, f"bold {style}"), f"  {kind}\n", (row.description, "dim"))
        drawn.add_row(said, Text(row.value or "not set", style), Text(row.origin, style))
    return drawn
