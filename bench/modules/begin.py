"""``python -m kvstore.bench.modules.begin``: what a beginning-of-sequence token before each module changes.

A model that was trained with one token at the start of every text leans on it. A module that is encoded alone has no
such token, unless it is encoded behind one (``context=[bos]``), which is then not placed: the prompt has its own.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import cross_entropy

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.bench.command import run_command
from kvstore.bench.environment import environment
from kvstore.bench.streaming.model import BEGIN, SIZES, Begun, trained
from kvstore.bench.train_plans import corpus
from kvstore.composition import Chain, Composition, Part, Placement, Text

HELP = """
Score the last of four segments of held-out texts, with the others reused: as they are, behind the token, or not at all.

`python -m kvstore.bench.modules.begin` takes the model that `python -m kvstore.bench.streaming --size small` has
trained, or trains it.
"""

SEGMENTS = 4  # of which the last is scored
ARMS = ("full", "modular", "modular behind the token", "last segment alone")


def composed(ids: list[int], arm: str) -> Composition:
    """The token, the segments but the last as modules (or not), and the last."""
    size = len(ids) // SEGMENTS
    cuts = [1, *(size * number for number in range(1, SEGMENTS)), len(ids)]
    parts: list[Part] = [Text(Chain.of(ids[:1]).token_ids, 0)]
    for number, (first, stop) in enumerate(pairwise(cuts)):
        last = number == SEGMENTS - 1
        if arm.startswith("modular") and not last:
            before = [BEGIN] if arm.endswith("token") else []
            chain = Chain.of([*before, *ids[first:stop]])
            parts.append(Placement(chain, len(before), len(chain), first))
        elif last or arm == "full":
            parts.append(Text(Chain.of(ids[first:stop]).token_ids, first))
    return Composition(tuple(parts))


@torch.inference_mode()
def loss(reuse: Reuse, ids: list[int], arm: str) -> float:
    """Nats a byte of the last segment, but its first byte, as the store serves the prompt."""
    prompt = composed(ids, arm)
    placed = [part for part in prompt.parts if isinstance(part, Placement)]
    reuse.encode([Composition((Text(part.chain.token_ids, 0),)) for part in placed])
    hit = reuse.load(prompt)
    cached = hit.cached_tokens
    assert isinstance(cached, int) and cached >= sum(map(len, placed)), hit.miss
    size = len(ids) // SEGMENTS
    logits = reuse.model(**hit.forward_inputs).logits[0, -size:-1]
    return float(cross_entropy(logits.float(), torch.tensor(ids[-size + 1 :])))


def main(
    size: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SIZES)}.")] = "small",
    texts: Annotated[int, typer.Option(min=1, help="Held-out texts.")] = 8,
    model: Annotated[Path, typer.Option(help="Folder of the model; it is trained if it is not there.")] = Path(
        "out/streaming/small-0"
    ),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    torch.set_num_threads(1)
    sized = SIZES[size]
    words = Begun.of(corpus.read(None, 64 << 20, sized.context))
    model.mkdir(parents=True, exist_ok=True)
    subject: Any = None
    for step in track(trained(model, words, sized, 0), "training", total=sized.steps, transient=True):
        subject = step
    rows = words.held_out(texts, sized.context).tolist()
    found: dict[str, float] = {}
    with kvstore.open(host="2GiB") as store:
        reuse = Reuse(subject, store)
        for arm in ARMS:
            found[arm] = sum(loss(reuse, ids, arm) for ids in track(rows, arm, transient=True)) / len(rows)
    shown = Table("the other segments", "nats a byte", title=f"The last of {SEGMENTS} segments, {texts} texts")
    for arm, nats in found.items():
        shown.add_row(arm, f"{nats:.4f}")
    Console().print(shown)
    if json_path is not None:
        result = {"size": size, "texts": texts, "nats": found, "environment": environment()}
        json_path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    run_command(main, HELP, "begin")
