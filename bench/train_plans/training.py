"""One run: AdamW with a cosine, as the paper trains, and the validation loss along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from kvstore.bench.train_plans.arms import Size
from kvstore.bench.train_plans.corpus import Corpus

BETAS = (0.9, 0.95)
DECAY = 0.1
WARM_UP = 0.05  # of all steps
FLOOR = 0.1  # of the peak rate, at the end
CLIP = 1.0


@dataclass(frozen=True)
class Point:
    """A place on a run's curve. Losses are nats per token, ``train`` the mean since the point before."""

    step: int
    tokens: int
    train: float
    validation: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """As a file of results holds it."""
        return asdict(self)


def train(model: Any, corpus: Corpus, size: Size, seed: int, device: torch.device) -> Iterator[Point | int]:
    """Trains ``model`` in place; yields each step's number, and a ``Point`` now and then and at the end.

    The order of the text depends on ``seed`` only: every plan reads the same.
    """
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(groups(model), lr=size.rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, size.steps))
    source = torch.Generator().manual_seed(seed)
    held_out = corpus.held_out(size.held_out, size.context)
    every = max(1, size.steps // size.evaluations)
    begin, losses = time.perf_counter(), []
    for step in range(1, size.steps + 1):
        ids = corpus.batch(size.batch, size.context, source).to(device)
        with precision(device):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        yield step
        if step % every == 0 or step == size.steps:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            tokens = step * size.batch * size.context
            yield Point(step, tokens, mean, validation(model, held_out, size, device), time.perf_counter() - begin)


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; norms and the vectors of weighted sums do not."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def rate_at(step: int, steps: int) -> float:
    """The share of the peak rate: up in a line, down in a cosine to the floor."""
    warm = max(1, int(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Nats per token of ``ids`` [rows, tokens], each predicted from those before it."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def validation(model: Any, held_out: torch.Tensor, size: Size, device: torch.device) -> float:
    """The mean loss over the held-out sequences."""
    model.eval()
    with precision(device):
        losses = [loss_of(model, rows.to(device)) for rows in held_out.split(size.batch)]
    model.train()
    weights = torch.tensor([len(rows) for rows in held_out.split(size.batch)], dtype=torch.float32, device=device)
    return float((torch.stack(losses) * weights).sum() / weights.sum())


def precision(device: torch.device) -> Any:
    """bfloat16 products on a GPU, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
