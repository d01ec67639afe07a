"""``kvstore pml``: commands for prompt modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.terminal import extras, progress_bar
from kvstore.errors import BadInput

HELP = """
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


app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=HELP)


@app.command(help=ENCODE_HELP)
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
    with extras("transformers,bench"):
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
    with kvstore.open(dir, host=host, disk=disk) as store, progress_bar("encoding", "tokens") as bar:
        task = bar.add_task("", total=None, share="")
        encoded = Reuse(subject.model, store).encode(
            parsed, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
        durable = store.flush() if dir else False
    where = f"in {dir}" if durable else "nowhere: give --dir to keep them"
    print(f"{parsed.name}: {encoded.tokens:,} tokens of modules, {encoded.new_tokens:,} computed now; stored {where}")
    if encoded.left_out:
        raise BadInput(f"{encoded.left_out:,} tokens found no room in memory; give a larger --host than {host}")
