"""``python -m kvstore.bench.train_plans``: do models that store half learn as well?"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvstore.bench.command import run_command
from kvstore.bench.environment import environment
from kvstore.bench.train_plans import arms, corpus, report, results, training
from kvstore.bench.train_plans.arms import ARMS, SIZES, Size
from kvstore.errors import BadInput

HELP = """
Train every layer plan, and grouped queries with a cache of the same size, from the same seeds on the same text.

Prints a table of validation losses, mean and spread over seeds, and writes results.json, curves.png and runs.jsonl to
--out. Finished runs are kept there: started again with the same settings, it goes on where it stopped.

* `python -m kvstore.bench.train_plans` takes a minute on a CPU and shows that everything works;

* `python -m kvstore.bench.train_plans --size small --seeds 3` takes an hour or two on a CPU core;

* `python -m kvstore.bench.train_plans --size large --seeds 3 --text corpus/` is for a GPU.

Parameters are not matched: plans that store half project keys and values in half of the layers only. The table says how
many each has.
"""


def main(
    text: Annotated[Path | None, typer.Option(help="A file or folder of text; default: Python's own sources.")] = None,
    size: Annotated[str, typer.Option(help=f"How large and how long: {', '.join(SIZES)}.")] = "smoke",
    plans: Annotated[str, typer.Option(help=f"Which to train, of {', '.join(ARMS)}.")] = ",".join(ARMS),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each plan, from seeds 0, 1, ….")] = 1,
    steps: Annotated[int, typer.Option(min=0, help="Steps of a run; 0 is what the size says.")] = 0,
    rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate; 0 is what the size says.")] = 0.0,
    fusion_init: Annotated[str, typer.Option(help="What weighted sums start from: lite or normal.")] = "lite",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves them alone.")] = 0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Read no more text than this.")] = 64 << 20,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/train_plans"),
    save: Annotated[Path | None, typer.Option(help="Folder for trained models, as from_pretrained takes them.")] = None,
) -> None:
    if size not in SIZES:
        raise BadInput(f"there is no size {size!r}; choose from {', '.join(SIZES)}")
    chosen = [name.strip() for name in plans.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in ARMS]
    if unknown or not chosen:
        raise BadInput(f"--plans {plans!r}: choose from {', '.join(ARMS)}")
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    sized = SIZES[size]
    sized = dataclasses.replace(sized, steps=steps or sized.steps, rate=rate or sized.rate)
    read = corpus.read(text, max_bytes, sized.context)
    setting = {
        "size": size,
        **dataclasses.asdict(sized),
        "fusion_init": fusion_init,
        "text": read.name,
        "bytes": len(read.train),
        "digest": read.digest,
        "device": where.type,
    }
    out.mkdir(parents=True, exist_ok=True)
    runs = compare(chosen, seeds, sized, read, setting, where, out, save)
    finish(runs, setting, out)


def compare(
    chosen: list[str],
    seeds: int,
    size: Size,
    text: corpus.Corpus,
    setting: dict[str, Any],
    device: torch.device,
    out: Path,
    save: Path | None,
) -> list[results.Run]:
    """Trains what is not there yet, seed by seed, so that all plans have as many seeds at any moment."""
    done = results.finished(out, setting)
    wanted = [(arm, seed) for seed in range(seeds) for arm in chosen]
    columns = (
        TextColumn("{task.fields[run]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps · {task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * size.steps, run="", loss="")
        for arm, seed in wanted:
            if (arm, seed) in done:
                bar.update(task, advance=size.steps)
                continue
            config = arms.configured(arm, size, setting["fusion_init"])
            model = arms.build(config, seed)
            curve = []
            bar.update(task, run=f"{arm}, seed {seed}")
            for step in training.train(model, text, size, seed, device):
                if isinstance(step, int):
                    bar.update(task, advance=1)
                else:
                    curve.append(step.as_json())
                    bar.update(task, loss=f"loss {step.validation:.3f}")
            parameters = sum(weight.numel() for weight in model.parameters())
            run = results.Run(arm, seed, setting, parameters, arms.cached_numbers(config), curve)
            results.append(out, run)
            done[arm, seed] = run
            if save is not None:
                model.to("cpu").save_pretrained(save / f"{arm}-{seed}")
    return [done[key] for key in wanted]


def finish(runs: list[results.Run], setting: dict[str, Any], out: Path) -> None:
    """Prints the table and writes the files."""
    found = results.standings(runs)
    seeds = len({run.seed for run in runs})
    title = (
        f"{setting['layers']} layers of {setting['hidden']}, {runs[0].curve[-1]['tokens']:,} tokens of "
        f"{setting['text']}, {seeds} seed{'s' if seeds > 1 else ''}"
    )
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "setting": setting,
        "standings": [dataclasses.asdict(standing) for standing in found],
        "runs": [{key: value for key, value in vars(run).items() if key != "setting"} for run in runs],
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    report.plot(runs, title, out / "curves.png")
    Console().print(report.table(found, title))
    Console().print(f"written: {out / 'results.json'}, {out / 'curves.png'}")


def cli() -> None:
    """Runs the command."""
    run_command(main, HELP, "train_plans")


if __name__ == "__main__":
    cli()
