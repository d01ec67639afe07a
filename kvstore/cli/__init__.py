"""The command line. Heavy things are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys

import typer

from kvstore.cli import (
    config,
    doctor,
    forget,
    ls,
    pin,
    ping,
    pml,
    quota,
    replay,
    serve,
    simulate,
    status,
    top,
    verify,
)
from kvstore.errors import KVStoreError

app = typer.Typer(
    name="kvstore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="A hierarchical KV-cache store for LLM inference: host memory, disk, and the proof that nothing changed.",
)
TRY, SERVE, STORED = "Try and measure", "Serve", "What is stored"
app.command(help=replay.HELP, rich_help_panel=TRY)(replay.replay)
app.command(help=simulate.HELP, rich_help_panel=TRY)(simulate.simulate)
app.add_typer(pml.app, name="pml", rich_help_panel=TRY)
app.command(help=serve.HELP, rich_help_panel=SERVE)(serve.serve)
app.command(help=config.HELP, rich_help_panel=SERVE)(config.config)
app.command(help=doctor.HELP, rich_help_panel=SERVE)(doctor.doctor)
app.command(help=ping.HELP, rich_help_panel=SERVE)(ping.ping)
app.command(help=status.HELP, rich_help_panel=SERVE)(status.status)
app.command(help=top.HELP, rich_help_panel=SERVE)(top.top)
app.command(help=quota.HELP, rich_help_panel=SERVE)(quota.quota)
app.command(help=ls.HELP, rich_help_panel=STORED)(ls.ls)
app.command(help=pin.HELP, rich_help_panel=STORED)(pin.pin)
app.command(help=forget.HELP, rich_help_panel=STORED)(forget.forget)
app.command(help=verify.HELP, rich_help_panel=STORED)(verify.verify)


def main() -> None:
    """The script `kvstore`. What the caller can mend is one sentence on stderr and exit code 2."""
    try:
        app()
    except KVStoreError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        sys.exit(2)
