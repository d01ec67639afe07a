"""``python -m kvstore.adapters.kvlink``: trains a model to read across documents that were encoded alone."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstore.adapters.kvlink.data import Encode, Reader
from kvstore.adapters.kvlink.evaluation import SHARE, evaluate
from kvstore.adapters.kvlink.links import FILE, LinkTokens, add_links
from kvstore.adapters.kvlink.mixture import Mixture, Source, words_of
from kvstore.adapters.kvlink.training import Recipe, train
from kvstore.errors import BadInput, KVStoreError

HELP = """
Link tokens: a few learned tokens behind each document, so that documents can be encoded once, alone, and still be read
together. `train` is what runs when no command is named.
"""
TRAIN_HELP = """
Train a whole model, link tokens and all, on the mask that documents encoded alone make.

--data is a JSON file: `{"files": [{"path": "qa.jsonl", "kind": "qa_memory", "weight": 10}, ...]}`. Paths count from its
folder. Files hold one JSON object a line; kinds, and what a line of them has:

* `text`: "text"

* `chat`, `chat_memory`: "messages", a list of {"role", "content"} that ends with an assistant's reply; in memory, each
earlier exchange is a document that sees only itself

* `qa`: "question", "answer"; `qa_memory`: "documents" (a list of texts) as well

* `summary`: "summary", and "documents" or "text"

Weights that are left out are 20, 30, 25, 10, 10 and 5, in this order. `"words"` in the file says what stands around
each part, for models with a chat template: "system", "document" (with {text}), "role" (with {role}), "summarize".

--out keeps the newest state as a folder that `from_pretrained` reads. The same command goes on where it stopped.
"""
EVALUATE_HELP = """
Compare, on questions with documents: full attention, documents apart, apart with a share recomputed (blend), and apart
with links. --data is a file of kind `qa_memory`, one JSON object a line. Run it on the model before and after training.
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", help=HELP)

Model = Annotated[Path, typer.Option(help="Folder of the model and its tokenizer.")]
PerDocument = Annotated[int, typer.Option(min=0, help="Links behind each document.")]
Slots = Annotated[int, typer.Option(min=1, help="The most documents of a prompt.")]
Start = Annotated[int, typer.Option(min=-1, help="First id of the links; -1: behind all that the model has.")]
Tokens = Annotated[int, typer.Option(min=2, help="The most tokens of an example; longer documents are cut.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command("train", help=TRAIN_HELP)
def train_command(
    model: Model,
    data: Annotated[Path, typer.Option(help="The mixture, a JSON file.")],
    out: Annotated[Path, typer.Option(help="Folder for what is trained.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps in all.")] = 6000,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Examples in memory at a time.")] = 8,
    rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 5e-6,
    tokens: Tokens = 4096,
    per_document: PerDocument = 5,
    documents: Slots = 40,
    start: Start = -1,
    keep_every: Annotated[int, typer.Option(min=1, help="Steps between states that are kept.")] = 500,
    recompute: Annotated[bool, typer.Option(help="Recompute activations, which saves memory.")] = False,
    dtype: Annotated[str, typer.Option(help="Of products: bfloat16, or nothing for the model's own.")] = "",
    seed: Annotated[int, typer.Option(help="Of what is drawn from the mixture.")] = 0,
    device: Device = "auto",
) -> None:
    recipe = Recipe(
        steps=steps, batch=batch, rate=rate, at_once=at_once, keep_every=keep_every, recompute=recompute, dtype=dtype
    )
    trained, tokenizer = read(model, device)
    encode, end = spoken(tokenizer)
    vocabulary = int(trained.get_input_embeddings().weight.shape[0])
    links = LinkTokens(vocabulary if start < 0 else start, per_document, documents)
    mixture = Mixture.read(data, encode, links, end, tokens, seed)
    add_links(trained, links)
    with progress("{task.fields[loss]}") as bar:
        task = bar.add_task("training", total=steps, loss="")
        train(
            trained,
            links,
            mixture,
            recipe,
            out,
            lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}"),
        )
    folder = out / f"step-{steps}"
    tokenizer.save_pretrained(folder)
    Console().print(f"trained: {folder}")


@app.command("evaluate", help=EVALUATE_HELP)
def evaluate_command(
    model: Model,
    data: Annotated[Path, typer.Option(help="A file of kind qa_memory.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the documents' tokens that a blend computes.")] = (
        SHARE
    ),
    words: Annotated[Path | None, typer.Option(help="A mixture whose words to use, as in training.")] = None,
    tokens: Tokens = 4096,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
    device: Device = "auto",
) -> None:
    asked, tokenizer = read(model, device)
    encode, end = spoken(tokenizer)
    links = LinkTokens.load(model) if (model / FILE).is_file() else LinkTokens(0, 0)
    source = Source.open(data, "qa_memory")
    reader = Reader(encode, links, None if words is None else words_of(words), end)
    with progress() as bar:
        task = bar.add_task("examples", total=len(source))
        found = evaluate(
            asked,
            links,
            source.examples(reader, tokens),
            share,
            lambda done: bar.update(task, completed=done),
        )
    table = Table(title=f"{data.name}, {len(source)} questions", caption="exact: the greedy answer is the right one")
    for column in ("documents", "nats per token", "exact"):
        table.add_column(column)
    for one in found:
        table.add_row(one.way, f"{one.nats:.4f}", f"{one.exact:.1%}")
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", "utf-8")


def read(folder: Path, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}; give that of a model and its tokenizer")
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} holds no model with a tokenizer: {error}") from None
    return model.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device), tokenizer


def spoken(tokenizer: Any) -> tuple[Encode, list[int]]:
    """Its encoding without special tokens, and what ends a message."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return lambda text: tokenizer.encode(text, add_special_tokens=False), end


def progress(more: str = "") -> Progress:
    """A bar of steps or examples."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(more)
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def cli() -> None:
    """Runs the command; what the caller can mend is one sentence and exit code 2."""
    words = sys.argv[1:]
    if words and words[0].startswith("--") and words[0] != "--help":
        words.insert(0, "train")
    try:
        app(words)
    except KVStoreError as error:
        print(f"kvlink: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
