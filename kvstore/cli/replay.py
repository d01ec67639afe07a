"""``kvstore replay``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvstore.cli.terminal import check_writable, extras, progress_bar

if TYPE_CHECKING:
    from kvstore.bench.replay import Replay

HELP = """
Replay a chat log through a real model, every turn once from nothing and once from the store.

Prints one table: time to first token and per output token both ways, tokens reused by tier, and whether the outputs
are equal. The format of LOG is recognised by its fields: ShareGPT, OpenAI `messages` (JSON or JSONL, also nested in
trajectories), vLLM multi-turn chats, MT-Bench questions, lists of token ids, traces of hash ids.

Nothing is downloaded and nothing is written unless you say so:

* `kvstore replay chats.json` keeps everything in memory;

* `kvstore replay chats.json --dir cache --report out.html` adds a disk tier in `cache/`, and a page of plots;

* `kvstore replay chats.json --host 16MiB --dir cache` makes memory scarce, so that the disk has to serve;

* `kvstore replay chats.json --host 16MiB --dir cache --interleave --queue 8` tells the store which 8 turns come next,
  so that it brings what they read from disk ahead;

* `kvstore replay chats.json --discover 64` also reuses what stands anywhere, out of its context: an approximation, and
  the table says how far its outputs are from a recompute's;

* `kvstore replay chats.json --model tiny:fusedkv` takes a model that stores half of its layers (or another layer plan);

* `kvstore replay chats.json --model ./my-model` takes your own model and its chat template, in float32.
"""


def replay(
    log: Annotated[Path, typer.Argument(help="A chat log or a trace.", show_default=False)],
    model: Annotated[str, typer.Option(help="tiny (bytes), tiny-words, tiny:PLAN, a folder, or a model id.")] = "tiny",
    conversations: Annotated[int, typer.Option(min=0, help="Only the first N conversations; 0 is all.")] = 0,
    host: Annotated[str, typer.Option(help="Size of the host tier.")] = "1GiB",
    disk: Annotated[str, typer.Option(help="Size of the disk tier, which needs --dir.")] = "8GiB",
    dir: Annotated[Path | None, typer.Option(help="Where the disk tier lives; without it there is none.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model says in each turn.")] = 8,
    interleave: Annotated[bool, typer.Option(help="In rounds over all conversations, one turn of each.")] = False,
    queue: Annotated[int, typer.Option(min=0, help="Turns that wait in line, and that the store is told of.")] = 0,
    discover: Annotated[
        int, typer.Option(min=0, help="Also reuse runs of N tokens from anywhere; 0: do not look.")
    ] = 0,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one hash id of a trace stands for.")] = 512,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all measurements here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page here.")] = None,
) -> None:
    check_writable(json_out, report)
    with extras("transformers,bench"):
        from kvstore.adapters.transformers import Reuse
        from kvstore.bench import logs, models, summary
        from kvstore.bench import report as pages
        from kvstore.bench.replay import Replay, check
    import kvstore

    chosen = logs.read(log, block_tokens)[: conversations or None]
    subject = models.load(model)
    check(chosen, subject.encoder)
    settings = {
        "host": host,
        "disk": disk if dir else "none",
        "interleave": interleave,
        "tokens": tokens,
        "queue": queue,
        "discover": discover,
    }
    with kvstore.open(dir, host=host, disk=disk) as store:
        run = Replay(subject, store, Reuse(subject.model, store), tokens, interleave, discover, queue)
        _watch(run, chosen)
        store.flush()
        result = summary.summarize(run, log.name, settings)
    Console().print(pages.table(result))
    if json_out:
        json_out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if report:
        report.write_text(pages.html(result, run.rows), "utf-8")
        Console().print(f"report: {report}")


def _watch(run: Replay, conversations: list[Any]) -> None:
    """Runs the replay behind a progress bar on stderr."""
    prompt = cached = 0
    with progress_bar("replaying", "turns") as bar:
        task = bar.add_task("", total=sum(len(one.turns) for one in conversations), share="")
        for row in run.run(conversations):
            prompt, cached = prompt + row.prompt_tokens, cached + row.cached_tokens
            bar.update(task, advance=1, share=f"· {100 * cached / prompt:.0f}% of tokens reused")
