"""The command line. Heavy things are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys

import typer

from kvstore.cli import pml, replay, simulate, verify
from kvstore.errors import KVStoreError

app = typer.Typer(
    name="kvstore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="A hierarchical KV-cache store for LLM inference: host memory, disk, and the proof that nothing changed.",
)
app.command(help=replay.HELP)(replay.replay)
app.command(help=verify.HELP)(verify.verify)
app.command(help=simulate.HELP)(simulate.simulate)
app.add_typer(pml.app, name="pml")


def main() -> None:
    """The script `kvstore`. What the caller can mend is one sentence on stderr and exit code 2."""
    try:
        app()
    except KVStoreError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        sys.exit(2)
