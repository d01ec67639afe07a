"""``kvstore simulate``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvstore.cli.terminal import check_writable, extras, progress_bar
from kvstore.errors import BadInput

if TYPE_CHECKING:
    from kvstore.bench.simulate.requests import Trace
    from kvstore.bench.simulate.sweep import Job, Outcome

HELP = """
Replay a trace of requests against caches of blocks, and see what each eviction policy keeps of what comes back.

Prints one table: the share of prompt tokens that each policy finds at each capacity, and what that is of the optimum,
which knows the future. No model is run and no key or value is stored; the policies are the store's own.

TRACE is recognised by its fields: Mooncake (`hash_ids` and times in ms), Bailian (`hash_ids`, `chat_id` and times in
seconds), AIPerf's multi-turn files (`turns` of `text`), and the chat logs that `kvstore replay` reads. Where a log has
no times they are drawn, and the table says so.

* `kvstore simulate trace.jsonl` compares the default policy with LRU and the optimum (`min`);

* `kvstore simulate trace.jsonl --policy all --report out.html` compares all of them, and draws the curves;

* `kvstore simulate trace.jsonl --capacity 0.05 --look-ahead 32` tells the cache which 32 requests come next.

A capacity is a share of the trace's different blocks: 1.0 holds all of them.
"""


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace or a chat log.", show_default=False)],
    policy: Annotated[
        str, typer.Option(help="Policies, separated by commas; all: all of them; min: the optimum.")
    ] = "default,lru,min",
    capacity: Annotated[
        str, typer.Option(help="Shares of all different blocks, separated by commas.")
    ] = "0.01,0.02,0.05,0.1,0.2,0.5",
    look_ahead: Annotated[
        int, typer.Option(min=0, help="Requests that the cache is told of, that which it serves among them.")
    ] = 0,
    format: Annotated[str, typer.Option(help="auto, mooncake, bailian, aiperf or chat.")] = "auto",
    block_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a block: 512 for mooncake, 16 for bailian, else 64.", show_default=False),
    ] = None,
    on_error: Annotated[str, typer.Option(help="What a bad record of a trace does: stop or skip.")] = "stop",
    warm_up: Annotated[float, typer.Option(help="Share of the first requests that are not counted.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of drawn arrivals, for logs without times.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page here.")] = None,
) -> None:
    from kvstore.bench.simulate import choices, readers, summary, sweep

    check_writable(json_out, report)
    if report:
        with extras("bench"):
            from kvstore.bench.simulate import page
    policies, capacities = choices.policies(policy), choices.capacities(capacity)
    if on_error not in ("stop", "skip"):
        raise BadInput(f"--on-error is stop or skip, not {on_error}")
    if not 0 <= warm_up < 1:
        raise BadInput(f"--warm-up {warm_up} must be from 0 to less than 1: a share of the requests")
    with Console(stderr=True).status("reading the trace"):
        read = readers.read(trace, format, block_tokens, on_error == "skip", seed)
    pairs = product({*policies, sweep.MINIMUM}, capacities)
    jobs = [sweep.Job(name, share, look_ahead, warm_up) for name, share in pairs]
    result = summary.summarize(read, _watched(read, jobs), policies)
    Console().print(summary.table(result))
    if json_out:
        json_out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if report:
        report.write_text(page.html(result), "utf-8")
        Console().print(f"report: {report}")


def _watched(trace: Trace, jobs: list[Job]) -> Iterator[Outcome]:
    """A sweep behind a progress bar on stderr."""
    from kvstore.bench.simulate.sweep import sweep

    with progress_bar("simulating", "caches") as bar:
        task = bar.add_task("", total=len(jobs), share="")
        for outcome in sweep(trace, jobs):
            yield outcome
            bar.update(task, advance=1, share=f"· {outcome.job.policy}")
