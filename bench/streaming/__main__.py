"""``python -m kvstore.bench.streaming``: what a cache of constant size costs in perplexity, memory and time."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.bench.command import run_command
from kvstore.bench.environment import environment
from kvstore.bench.streaming import decode, report
from kvstore.bench.streaming.arms import arms
from kvstore.bench.streaming.model import SIZES, Begun, trained
from kvstore.bench.streaming.perplexity import score
from kvstore.bench.streaming.sinks import attention_to_first
from kvstore.bench.train_plans import corpus
from kvstore.errors import BadInput
from kvstore.policies.overflow import streaming

HELP = """
Train a small model, then read a long text and write a long answer with a cache that holds only what it was trained on.

Prints the loss of every way to go on when the context is full, what attention the first tokens get, and memory and
time along the answer; writes results.json and losses.png to --out. The trained model stays there, and is used again.

* `python -m kvstore.bench.streaming` takes less than a minute, and shows that everything works;

* `python -m kvstore.bench.streaming --size small --tokens 20000 --generated 100000` takes an hour on a CPU core.
"""


def main(
    size: Annotated[str, typer.Option(help=f"How large, and how long it trains: {', '.join(SIZES)}.")] = "smoke",
    tokens: Annotated[int, typer.Option(min=100, help="Tokens of the text.")] = 600,
    generated: Annotated[int, typer.Option(min=10, help="Tokens of the answer.")] = 200,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text; default: Python's own sources.")] = None,
    seed: Annotated[int, typer.Option(help="Of the model and of the order of its text.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results and the model.")] = Path("out/streaming"),
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results here, and the plot beside.")
    ] = None,
) -> None:
    if size not in SIZES:
        raise BadInput(f"there is no size {size!r}; choose from {', '.join(SIZES)}")
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()  # it warns of texts longer than a model was trained for
    transformers.utils.logging.disable_progress_bar()
    sized = SIZES[size]
    words = Begun.of(corpus.read(text, 64 << 20, sized.context))
    if len(words.validation) < tokens or tokens <= 2 * sized.context:
        raise BadInput(
            f"--tokens {tokens}: give more than {2 * sized.context}, which the window holds twice, and at most "
            f"{len(words.validation)}, which are held out"
        )
    path = json_path or out / "results.json"
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        model = prepared(out / f"{size}-{seed}", words, size, seed, bar)
        measured = measure(model, words, tokens, generated, sized.context, bar)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "setting": {
            "size": size,
            **dataclasses.asdict(sized),
            "seed": seed,
            "text": words.name,
            "digest": words.digest,
            "tokens": tokens,
            "generated": generated,
        },
        **measured,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    report.plot(result, path.with_suffix(".png"))
    for table in (report.losses(result), report.attention(result), report.decoding(result)):
        Console().print(table)
    Console().print(f"written: {path}, {path.with_suffix('.png')}")


def prepared(folder: Path, words: Begun, size: str, seed: int, bar: Progress) -> Any:
    """The trained model."""
    task = bar.add_task("training", total=SIZES[size].steps)
    model: Any = None
    for step in trained(folder, words, SIZES[size], seed):
        if isinstance(step, int):
            bar.update(task, completed=step)
        else:
            model = step
    bar.update(task, completed=SIZES[size].steps)
    return model


def measure(model: Any, words: Begun, tokens: int, generated: int, context: int, bar: Progress) -> dict[str, Any]:
    """All figures."""
    text = words.stream(tokens)
    with torch.no_grad(), kvstore.open(host="16MiB") as store:
        reuse = Reuse(model, store)
        ways = arms(reuse.window, context)
        task = bar.add_task("reading", total=len(ways) * tokens)

        def read(arm: str, count: int) -> None:
            bar.update(task, advance=count, description=arm)

        scores = score(model, text, ways, context, read)
        shares = attention_to_first(model, words.held_out(16, context))
        task = bar.add_task("writing", total=generated)

        def written(count: int) -> None:
            bar.update(task, advance=count, description="writing")

        parts = decode.decode(model, reuse.window(streaming(context)), text[:, : 2 * context], generated, written)
    return {
        "losses": [{**dataclasses.asdict(one), "perplexity": one.perplexity} for one in scores],
        "attention_to_first": shares,
        "decoding": [dataclasses.asdict(part) for part in parts],
    }


def cli() -> None:
    """Runs the command."""
    run_command(main, HELP, "streaming")


if __name__ == "__main__":
    cli()
