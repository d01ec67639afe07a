"""The command line. Heavy things are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvstore.errors import BadInput, KVStoreError

if TYPE_CHECKING:
    from rich.progress import Progress

    from kvstore.bench.replay import Replay

app = typer.Typer(
    name="kvstore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="A hierarchical KV-cache store for LLM inference: host memory, disk, and the proof that nothing changed.",
)

REPLAY_HELP = """
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

VERIFY_HELP = """
Read every block of a cache directory, check it against its checksums, and print what is wrong.

Exit code 0: every block is what was written. 1: something is wrong; each problem has a line. 2: DIR cannot be verified,
because it is no cache or because a running process holds it.
"""


PML_HELP = """
Prompt modules: text that is read once and reused wherever a prompt places it.
"""

ENCODE_HELP = """
Compute every module of a schema with a model and keep it in a cache directory, before any prompt comes.

SCHEMA is a file in PML:

    <schema name="trip">
      <module name="city">The city is <parameter name="name" length="8"/>. </module>
      <module name="rules">Answer in three lines. </module>
    </schema>

* `kvstore pml encode trip.xml --model ./my-model --dir cache` stores what is not stored yet; a program that opens
  `cache` then loads any prompt of this schema without computing its modules;

* `--layout packed` is for prompts without gaps between positions, `--bos` encodes every module behind the tokenizer's
  beginning-of-sequence token;

* without `--dir` nothing is kept: it shows how many tokens there are, and how long they take.
"""


pml = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=PML_HELP)
app.add_typer(pml, name="pml")


@app.callback()
def _kvstore() -> None:
    """Keeps `kvstore replay` a sub-command, however many there are."""


@app.command(help=REPLAY_HELP)
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
    for target in (json_out, report):
        if target is not None and not target.absolute().parent.is_dir():
            raise BadInput(f"cannot write {target}: the folder {target.parent} is not there; make it first")
    with _extras("transformers,bench"):
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
    with _bar("replaying", "turns") as bar:
        task = bar.add_task("", total=sum(len(one.turns) for one in conversations), share="")
        for row in run.run(conversations):
            prompt, cached = prompt + row.prompt_tokens, cached + row.cached_tokens
            bar.update(task, advance=1, share=f"· {100 * cached / prompt:.0f}% of tokens reused")


@pml.command(help=ENCODE_HELP)
def encode(
    schema: Annotated[Path, typer.Argument(help="A schema in PML.", show_default=False)],
    model: Annotated[str, typer.Option(help="tiny (bytes), tiny-words, tiny:PLAN, a folder, or a model id.")] = "tiny",
    dir: Annotated[Path | None, typer.Option(help="Where the disk tier lives; without it nothing is kept.")] = None,
    host: Annotated[str, typer.Option(help="Size of the host tier.")] = "1GiB",
    disk: Annotated[str, typer.Option(help="Size of the disk tier, which needs --dir.")] = "8GiB",
    layout: Annotated[
        str, typer.Option(help="paper: room that a prompt leaves empty stays; packed: it closes.")
    ] = "paper",
    bos: Annotated[bool, typer.Option(help="Encode each module behind the beginning-of-sequence token.")] = False,
) -> None:
    with _extras("transformers,bench"):
        from kvstore.adapters.transformers import Reuse
        from kvstore.bench import models
    import kvstore
    from kvstore.pml import Schema

    subject = models.load(model)
    tokenizer = subject.encoder.tokenizer
    first = getattr(tokenizer, "bos_token_id", None)
    if bos and first is None:
        raise BadInput(f"the tokenizer of {model} has no beginning-of-sequence token; leave --bos out")
    parsed = Schema.load(schema, tokenizer=tokenizer, layout=layout, context=[first] if bos else [])
    with kvstore.open(dir, host=host, disk=disk) as store, _bar("encoding", "tokens") as bar:
        task = bar.add_task("", total=None, share="")
        encoded = Reuse(subject.model, store).encode(
            parsed, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
        durable = store.flush() if dir else False
    where = f"in {dir}" if durable else "nowhere: give --dir to keep them"
    print(f"{parsed.name}: {encoded.tokens:,} tokens of modules, {encoded.new_tokens:,} computed now; stored {where}")
    if encoded.left_out:
        raise BadInput(f"{encoded.left_out:,} tokens found no room in memory; give a larger --host than {host}")


@app.command(help=VERIFY_HELP)
def verify(
    dir: Annotated[Path, typer.Argument(metavar="DIR", help="A cache directory.", show_default=False)],
) -> None:
    from kvstore.config import verify as found

    if not (dir / "CACHEDIR.TAG").is_file():
        raise BadInput(f"{dir} is not a cache directory of kvstore; give the folder that --dir or kvstore.open() named")
    seen = found(dir)
    blocks = next(seen)
    with Console(stderr=True).status(f"reading {blocks} blocks"):
        problems = [problem for problem in seen if not isinstance(problem, int)]
    for problem in problems:
        print(f"block {problem.key[:16]}: {problem.what}" if problem.key else problem.what)
    print(
        f"{blocks} blocks read, {len(problems)} with problems" if problems else f"{blocks} blocks read, all as written"
    )
    if problems:
        raise typer.Exit(1)


def _bar(work: str, unit: str) -> Progress:
    """A progress bar on stderr that leaves nothing behind."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(work), BarColumn(), MofNCompleteColumn(), TextColumn(unit + " {task.fields[share]}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


@contextmanager
def _extras(names: str) -> Iterator[None]:
    """Names the extras to install where a library is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "kvstore":
            raise
        raise BadInput(f"this needs {error.name}; install it with: pip install 'kvstore-llm[{names}]'") from error


def main() -> None:
    """The script `kvstore`. What the caller can mend is one sentence on stderr and exit code 2."""
    try:
        app()
    except KVStoreError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        sys.exit(2)
