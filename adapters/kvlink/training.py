"""Training of a whole model on the mask that documents encoded alone make, so that it reads across their links."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from kvstore.adapters.kvlink import checkpoints
from kvstore.adapters.kvlink.layout import PADDING, UNSCORED, Laid
from kvstore.adapters.kvlink.links import LinkTokens
from kvstore.adapters.kvlink.mask import additive, block_mask
from kvstore.adapters.kvlink.mixture import Mixture
from kvstore.errors import BadInput

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Recipe:
    """How to train. All numbers but ``at_once``, ``keep_every`` and ``recompute`` change what is learned."""

    steps: int = 6000
    batch: int = 64
    rate: float = 5e-6  # the peak
    warm_up: float = 0.1  # of all steps; a cosine to 0 follows
    decay: float = 0.0
    clip: float = 1.0
    at_once: int = 8  # rows in memory
    keep_every: int = 500  # steps
    recompute: bool = False  # activations, in the backward pass, to save memory
    dtype: str = ""  # of products ("bfloat16"); weights and their updates keep the model's

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.at_once, self.keep_every) < 1:
            raise BadInput("steps, batch, at_once and keep_every are counts from 1")
        if self.dtype not in ("", "bfloat16"):
            raise BadInput(f"dtype={self.dtype!r} is not one to train in; use bfloat16, or nothing for the model's own")

    def rate_at(self, step: int) -> float:
        """Of the step, from 0: up in a line, down in a cosine."""
        warm = int(self.warm_up * self.steps)
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True, eq=False)
class Padded:
    """Rows side by side, padded behind; int64 [rows, tokens]. A row's label is the token itself, not the next one."""

    ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor


def padded(rows: Sequence[Laid], device: torch.device | str = "cpu") -> Padded:
    """Of laid out examples."""
    columns = (
        ([row.token_ids for row in rows], 0),
        ([row.segments for row in rows], PADDING),
        ([row.labels for row in rows], UNSCORED),
    )
    made = (
        pad_sequence([torch.tensor(one) for one in column], batch_first=True, padding_value=fill).to(device)
        for column, fill in columns
    )
    return Padded(*made)


def train(
    model: Any,
    links: LinkTokens,
    mixture: Mixture,
    recipe: Recipe,
    out: Path,
    told: Callable[[int, float], None] | None = None,
) -> None:
    """Trains all weights of ``model`` in place, where it is, and keeps them in ``out`` with the state of training.

    Where ``out`` holds a part of the same training, it goes on from there; on a CPU it comes to the same bits. ``told``
    is called with the step, from 1, and its loss in nats per answered token. Raises ``BadInput`` for a model without
    room for the links, for another training in ``out``, and, with file and line, for examples that cannot be used.
    """
    if links.stop > model.get_input_embeddings().weight.shape[0]:
        raise BadInput(f"the model has no embeddings for links up to {links.stop}; call add_links first")
    if mixture.reader.links != links:
        raise BadInput("the mixture is laid out with other links; read it with those that are trained")
    device = model.get_input_embeddings().weight.device
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=BETAS, weight_decay=recipe.decay)
    training = checkpoints.Training(out, recipe, links, mixture.digest())
    done = training.resume(model, optimizer)
    if recipe.recompute:
        model.gradient_checkpointing_enable()
    model.train()
    for step in range(done, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        rows = mixture.batch(step, recipe.batch)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(step)  # dropout is the same when a training goes on from here
            loss = _gradients(model, rows, recipe, device)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % recipe.keep_every == 0 or step + 1 == recipe.steps:
            training.keep(step + 1, model, optimizer)
        if told is not None:
            told(step + 1, loss)
    model.eval()


def _gradients(model: Any, rows: list[Laid], recipe: Recipe, device: torch.device) -> float:
    """Adds the gradients of the mean over all answered tokens of the batch; that mean."""
    answered = max(1, sum(label != UNSCORED for row in rows for label in row.labels[1:]))
    total = 0.0
    for start in range(0, len(rows), recipe.at_once):
        some = padded(rows[start : start + recipe.at_once], device)
        columns = scored_columns(some)
        if not len(columns):
            continue
        with torch.autocast(device.type, getattr(torch, recipe.dtype)) if recipe.dtype else nullcontext():
            logits = masked_logits(model, some, columns)
        loss = losses(logits, some.labels[:, columns + 1]).sum() / answered
        loss.backward()
        total += float(loss.detach())
    return total


def scored_columns(some: Padded) -> torch.Tensor:
    """Columns behind which any row has an answered token, int64."""
    return (some.labels[:, 1:] != UNSCORED).any(0).nonzero().flatten()


def masked_logits(model: Any, some: Padded, columns: torch.Tensor | None = None) -> torch.Tensor:
    """One pass in which documents see only themselves; [rows, columns, vocabulary], all columns if none are named.

    Logits of long prompts with large vocabularies take more memory than all else.
    """
    taken = model(
        input_ids=some.ids,
        attention_mask=additive(block_mask(some.segments), model.dtype),
        position_ids=torch.arange(some.ids.shape[1], device=some.ids.device).expand_as(some.ids),
        use_cache=False,
        logits_to_keep=0 if columns is None else columns,
    )
    logits: torch.Tensor = taken.logits
    return logits


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of every answered token [rows, columns]; 0 where a label is -100."""
    return cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=UNSCORED, reduction="none")
