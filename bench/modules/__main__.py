"""``python -m kvstore.bench.modules``: what do separately encoded documents lose, and what wins it back?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvstore.bench.command import run_command
from kvstore.bench.modules import evaluation, language, report, results, retrieval, training
from kvstore.bench.modules.evaluation import Score
from kvstore.bench.train_plans import corpus
from kvstore.errors import BadInput

HELP = """
Answer questions over documents that were encoded apart: as they are, blended, or with a model trained for it.

A small Llama is trained per seed, with ordinary attention, to look up what several documents have written, among them
aliases of what an earlier document wrote. Then the same questions are asked with documents reused out of context: moved
to their positions or not, with a share of their tokens recomputed where they deviate most or at random, and after
training on the mask that reuse makes, with and without link tokens. A second small model does the same on running text.

Prints tables, and writes the results to --json and a plot beside it, again after every seed; started again with the
same settings, it goes on where it stopped.

* `python -m kvstore.bench.modules --size tiny` takes seconds and shows that everything works;

* `python -m kvstore.bench.modules --seeds 3 --json out/modules/results.json` takes about half an hour on a CPU core.
"""
SIZES = {
    "tiny": (
        retrieval.Size(
            symbols=6, documents=2, writes=2, distinct=3, queries=2, hidden=32, layers=2, heads=2, batch=8, steps=20,
            tuning_steps=5, prompts=16,
        ),
        language.Size(tokens=16, hidden=16, layers=2, heads=2, batch=2, steps=5, texts=4),
    ),
    "small": (retrieval.Size(), language.Size()),
}  # fmt: skip
SERVED = {"tiny": 4, "small": 64}  # prompts that also go through a store
SERVED_LINE = (
    "seed {seed}, through a store: {arm} {share:.0%}, {prompts} prompts, {all:.3f} right, answers equal: "
    "{answers_equal}, logits differ by at most {largest_difference:.1e}"
)


def main(
    size: Annotated[str, typer.Option(help=f"How large and how long: {', '.join(SIZES)}.")] = "small",
    seeds: Annotated[int, typer.Option(min=1, help="Models to train, from seeds 0, 1, ….")] = 1,
    json: Annotated[Path, typer.Option(help="File for the results; the plot goes beside it.")] = Path(
        "out/modules/results.json"
    ),
    text: Annotated[Path | None, typer.Option(help="A file or folder of text; default: Python's own sources.")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Read no more text than this.")] = 64 << 20,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves them alone.")] = 0,
) -> None:
    if size not in SIZES:
        raise BadInput(f"there is no size {size!r}; choose from {', '.join(SIZES)}")
    if threads:
        torch.set_num_threads(threads)
    task, running = SIZES[size]
    read = corpus.read(text, max_bytes, running.training.context)
    setting = {
        "size": size,
        "retrieval": dataclasses.asdict(task),
        "running_text": dataclasses.asdict(running),
        "text": read.name,
        "digest": read.digest,
    }
    runs = results.finished(json, setting)[:seeds]
    columns = TextColumn("{task.fields[doing]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        each = task.steps + 2 * task.tuning_steps + running.steps
        shown = bar.add_task("", total=seeds * each, completed=len(runs) * each, doing="")
        for seed in range(len(runs), seeds):

            def told(doing: str, seed: int = seed) -> None:
                bar.update(shown, advance=1, doing=f"seed {seed}: {doing}")

            runs.append(measured(task, running, read, seed, SERVED[size], told))
            results.write(json, setting, runs)
    finish(runs, task, json)


def measured(
    size: retrieval.Size,
    running: language.Size,
    text: corpus.Corpus,
    seed: int,
    served: int,
    told: Callable[[str], None],
) -> results.Run:
    """All of one seed. ``told`` is called with what is trained, after every step of a training."""
    began = time.perf_counter()
    model = training.base(size, seed, partial(told, "ordinary attention"))
    scores: list[Score] = list(evaluation.of_base(model, size, seed))
    stored = evaluation.through_store(model, size, size.plain, served)
    for links in (size.plain, size.linked):
        doing = f"documents apart, {links.per_document} links"
        tuned = training.tuned(model, size, seed, links, partial(told, doing))
        scores += evaluation.of_tuned(tuned, size, links)
        if links.per_document:
            stored += evaluation.through_store(tuned, size, links, served)
    reader = language.trained(text, running, seed, partial(told, "running text"))
    return results.Run(
        seed=seed,
        seconds=time.perf_counter() - began,
        scores=[dataclasses.asdict(score) for score in scores],
        choices=[dataclasses.asdict(choice) for choice in evaluation.choices(model, size)],
        served=[dataclasses.asdict(one) for one in stored],
        losses=[dataclasses.asdict(loss) for loss in language.losses(reader, text, running, seed)],
    )


def finish(runs: list[results.Run], size: retrieval.Size, path: Path) -> None:
    """Prints the tables and draws the plot."""
    title = (
        f"{size.documents} documents of {size.writes} writes, {size.layers} layers of {size.hidden}, "
        f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    )
    plot = path.with_suffix(".png")
    report.plot(runs, title, plot)
    console = Console()
    for table in (report.retrieval(runs, title), report.running_text(runs)):
        console.print(table)
    for run in runs:
        for one in run.served:
            console.print(SERVED_LINE.format(seed=run.seed, **one))
    console.print(f"written: {path}, {plot}")


def cli() -> None:
    """Runs the command."""
    run_command(main, HELP, "modules")


if __name__ == "__main__":
    cli()
