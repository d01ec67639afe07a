"""How a benchmark of its own is run from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from kvstore.errors import KVStoreError


def run_command(main: Callable[..., Any], help: str, name: str) -> None:
    """Runs ``main`` with the command line's options; what the caller can mend is one sentence and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command(help=help)(main)
    try:
        app()
    except KVStoreError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
