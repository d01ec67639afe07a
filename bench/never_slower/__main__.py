"""``python -m kvstore.bench.never_slower``: first tokens with a store behind a slow disk, and without one, in pairs."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from kvstore.adapters.transformers import Reuse
from kvstore.bench import logs
from kvstore.bench.command import run_command
from kvstore.bench.encoders import WordEncoder
from kvstore.bench.environment import environment
from kvstore.bench.micro.ttft import build_model
from kvstore.bench.never_slower.figures import plot, summarize, table
from kvstore.bench.never_slower.pairs import MB, Pair, measure, open_store, prompts, warm_up
from kvstore.errors import BadInput

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo.json"
VOCABULARY = 32000
HELP = """
Read the turns of a chat log with a store and without one, one right after the other, with a disk that is as slow as you
say.

The model is a 12-layer, 1024-wide Llama in float32 with random weights. Memory is small, so that the disk has to serve;
what it still has to write runs beside. A store that helps is quicker in the middle (p50), and one that never hurts is
not slower at the end (p99). How expected first tokens compare with what came is `error`.
"""


def main(
    log: Annotated[Path, typer.Option(help="A chat log.")] = DEMO,
    rates: Annotated[str, typer.Option(help="MB a second of the disk, separated by commas; 0: as it is.")] = "0,50,5",
    conversations: Annotated[int, typer.Option(min=1)] = 5,
    turns: Annotated[int, typer.Option(min=2, help="Of each conversation.")] = 4,
    longest: Annotated[int, typer.Option(min=100, help="Tokens of a prompt, at most.")] = 2000,
    host: Annotated[str, typer.Option(help="Size of the host tier.")] = "64MiB",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw how first tokens are spread (PNG).")] = None,
) -> None:
    torch.set_num_threads(threads)
    asked = prompts(logs.read(log), WordEncoder(VOCABULARY), conversations, turns, longest)
    if not asked:
        raise BadInput(f"{log} has no conversation with {turns} prompts of at most {longest} tokens; take another")
    model = build_model()
    warm_up(model)
    measured: dict[str, list[Pair]] = {}
    with Progress() as bar:
        for rate in _rates(rates):
            name = f"{rate:g} MB/s" if rate else "as it is"
            rows = measured[name] = []
            with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".slow-") as folder:
                store = open_store(Path(folder) / "store", host, rate * MB or None)
                for pair in bar.track(measure(model, Reuse(model, store), asked), len(asked), description=name):
                    rows.append(pair)
                store.close(timeout=1.0)
    results = {name: summarize(rows) for name, rows in measured.items()}
    Console().print(table(results))
    if json_path is not None:
        _write(json_path, log, host, results, measured)
    if plot_path is not None:
        plot(dict(measured), plot_path)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise BadInput(f"--rates {text} is no list of MB a second; write it as 0,50,5") from error
    if min(rates) < 0:
        raise BadInput("a disk moves 0 MB a second or more; 0 stands for as it is")
    return rates


def _write(path: Path, log: Path, host: str, results: dict[str, Any], measured: dict[str, list[Pair]]) -> None:
    rows = {name: [dataclasses.asdict(pair) for pair in pairs] for name, pairs in measured.items()}
    settings = {"log": log.name, "host": host, "threads": torch.get_num_threads()}
    written = {"environment": environment(), "settings": settings, "results": results, "pairs": rows}
    path.write_text(json.dumps(written, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    run_command(main, HELP, "never_slower")
