"""``python -m kvstore.bench.workers LOG``: every turn of a chat log goes to another worker than the turn before.

One daemon for all workers of a host; with ``--hosts 2 --redis URL`` a daemon and a directory for each, that share what
they have through Redis. Nothing but Unix sockets in a folder of its own is opened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kvstore
from kvstore.bench import logs
from kvstore.bench.command import run_command
from kvstore.bench.hosting import daemon
from kvstore.bench.replay import ordered
from kvstore.errors import BadInput

HELP = """
Have workers continue each other's conversations: every turn of LOG goes to another one than the turn before.

All answers are compared with a recompute's. One daemon serves them all; with `--hosts 2 --redis URL` there are two,
each with a directory of its own, that share what they have through Redis. Nothing is opened but sockets in a folder
that is gone in the end.
"""


def main(
    log: Annotated[Path, typer.Argument(help="A chat log, as kvstore replay reads it.")],
    workers: Annotated[int, typer.Option(min=1, help="Workers, each with a model of its own.")] = 2,
    hosts: Annotated[int, typer.Option(min=1, help="Daemons, each with a directory; workers go round them.")] = 1,
    redis: Annotated[str | None, typer.Option(help="The Redis that daemons share.")] = None,
    model: Annotated[str, typer.Option(help="As kvstore replay takes it.")] = "tiny",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model says in each turn.")] = 8,
    host: Annotated[str, typer.Option(help="Memory of each daemon.")] = "64MiB",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all measurements here.")] = None,
) -> None:
    """See ``HELP``."""
    if hosts > 1 and redis is None:
        raise typer.BadParameter("daemons of several hosts share through Redis; give --redis URL")
    conversations = logs.read(log)
    places = {id(conversation): place for place, conversation in enumerate(conversations)}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-workers-")))
        urls = [daemon(stack, folder / f"host{number}", host, redis) for number in range(hosts)]
        crew = [_Worker(stack, urls[n % hosts], log, model, tokens) for n in range(workers)]
        for conversation, number in ordered(conversations, interleave=True):
            place = places[id(conversation)]
            at = (place + number) % workers
            rows.append({"conversation": place, "turn": number, "worker": at, **crew[at].ask(place, number)})
        for url in urls:
            with kvstore.connect(url) as store:
                store.flush(10.0)
    Console().print(_table(rows, workers))
    if json_out is not None:
        json_out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    if any(row["differ"] for row in rows):
        raise BadInput("a worker's answer differs from a recompute's")


class _Worker:
    """A worker's process."""

    def __init__(self, stack: ExitStack, url: str, log: Path, model: str, tokens: int) -> None:
        command = [sys.executable, "-m", "kvstore.bench.workers.worker", url, str(log), model, str(tokens)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        )
        self._heard()

    def ask(self, conversation: int, turn: int) -> dict[str, Any]:
        """Has it answer a turn; what it measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{conversation} {turn}\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BadInput("a worker ended; what it says is above")
        found: dict[str, Any] = json.loads(line)
        return found


def _table(rows: list[dict[str, Any]], workers: int) -> Table:
    table = Table(title="turns that another worker began", title_justify="left")
    for name in ("conversation", "turns by worker", "tokens read", "reused", "equal", "first token", "recomputed"):
        table.add_column(name, justify="left" if name == "conversation" else "right")
    for place in sorted({row["conversation"] for row in rows}):
        mine = [row for row in rows if row["conversation"] == place]
        turns = " ".join(str(row["worker"]) for row in mine)
        read, reused = sum(row["prompt"] for row in mine), sum(row["cached"] for row in mine)
        equal = sum(not row["differ"] for row in mine)
        last = mine[-1]
        times = [f"{1000 * last[name]:.1f} ms" for name in ("ttft", "ttft_recompute")]
        table.add_row(str(place + 1), turns, f"{read:,}", f"{reused / read:.0%}", f"{equal} of {len(mine)}", *times)
    table.caption = f"{workers} workers; times are of the last turn; equal: all tokens as in a recompute"
    return table


if __name__ == "__main__":
    run_command(main, HELP, "kvstore.bench.workers")
