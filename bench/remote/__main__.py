"""``python -m kvstore.bench.remote``: what a Redis behind a bad network costs a store."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvstore.bench import logs, models
from kvstore.bench.command import run_command
from kvstore.bench.environment import environment
from kvstore.bench.remote import deadlines, serving
from kvstore.bench.remote.proxy import MODES
from kvstore.bench.remote.server import running

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo.json"
HELP = """
Put a proxy between a store and a redis-server, and have it do what bad networks do.

Loads begin when the network is well, and are waited for 250 ms; what they take longer is `over`. Matches may wait 20 ms
for an answer, until the breaker opens. Then a small model serves a chat log with Redis beside it, dead, silent, slow,
and without; pairs of runs give the ratios.
"""


def main(
    log: Annotated[Path, typer.Option(help="A chat log.")] = DEMO,
    rounds: Annotated[int, typer.Option(min=1, help="Of three loads each, for each mode.")] = 12,
    replays: Annotated[int, typer.Option(min=1, help="Of the log, for each way.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    torch.set_num_threads(1)
    logging.getLogger("kvstore").setLevel(logging.ERROR)
    with running() as server:
        modes = {mode: deadlines.measure(server, mode, rounds) for mode in track(MODES, "networks")}
        cost = deadlines.cost_when_open(2000)
        served = serving.measure(server, models.load("tiny"), logs.read(log), replays)
    results = {"environment": environment(), "modes": modes, "match_with_breaker_open": cost, "replay": served}
    for table in tables(results):
        Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def tables(results: dict[str, Any]) -> list[Table]:
    """What people read."""
    shown = Table("network", "load p50", "p99", "p99 over", "match p50", "p99", "p99 over", "opens after", "wrong")
    for mode, found in results["modes"].items():
        cells = [
            f"{found[what][name]:.1f}" for what in ("load", "match") for name in ("p50_ms", "p99_ms", "p99_over_ms")
        ]
        shown.add_row(mode, *cells, str(found["matches_until_open"] or "never"), str(found["wrong_bytes"]))
    shown.caption = "milliseconds; over: beyond a deadline of 250 ms (load) and 20 ms (match)"
    ways = Table("replay with Redis", "tokens a second", "ratio")
    for way, found in results["replay"].items():
        ways.add_row(way, f"{found['tokens_per_second']:.0f}", f"{found['ratio']:.3f}")
    cost = results["match_with_breaker_open"]
    ways.caption = f"an open breaker adds {cost['added_us']:.1f} us to a match of {cost['without_us']:.0f} us"
    return [shown, ways]


if __name__ == "__main__":
    run_command(main, HELP, "remote")
