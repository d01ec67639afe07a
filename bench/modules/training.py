"""Training of the task's models: first with ordinary attention, then with documents that see only themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from kvstore.adapters.kvlink import LinkTokens, additive, block_mask
from kvstore.adapters.kvlink.layout import SHARED, UNSCORED
from kvstore.adapters.kvlink.mask import causal_mask
from kvstore.bench.modules.retrieval import Batch, Size, batch, build, prompts
from kvstore.bench.train_plans.training import CLIP, rate_at

BETAS = (0.9, 0.98)
DECAY = 0.01
HINT = 0.5  # weight of what aliases hold, beside the answers


def base(size: Size, seed: int, stepped: Callable[[], None]) -> Any:
    """A model of ordinary attention. ``stepped`` is called after every step.

    In training it is also told what each alias holds. Without that it takes many times as long to find out that
    aliases can be followed where they are written.
    """
    model = build(size, seed)
    return _train(model, size, f"base {seed}", size.plain, size.steps, size.rate, False, stepped)


def tuned(model: Any, size: Size, seed: int, links: LinkTokens, stepped: Callable[[], None]) -> Any:
    """A copy of ``model`` trained on as documents are served, encoded alone; the same prompts with and without links.

    It is told the answers only: an alias that stands alone cannot know what it holds.
    """
    model = copy.deepcopy(model)
    return _train(model, size, f"tuned {seed}", links, size.tuning_steps, size.tuning_rate, True, stepped)


def _train(
    model: Any,
    size: Size,
    seed: str,
    links: LinkTokens,
    steps: int,
    rate: float,
    blocked: bool,
    stepped: Callable[[], None],
) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    model.train()
    for step in range(steps):
        made = batch(prompts(size, size.batch, f"{seed} {step}"), links, aliases=not blocked)
        loss = _loss(model, made, blocked)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        stepped()
    return model.eval()


def _loss(model: Any, made: Batch, blocked: bool) -> torch.Tensor:
    """Nats per answer, and per alias as much as a hint weighs. Only what is scored goes through the output layer."""
    mask = (block_mask if blocked else causal_mask)(made.segments)
    hidden = model.model(made.ids, attention_mask=additive(mask, model.dtype), use_cache=False).last_hidden_state
    scored = made.labels != UNSCORED
    losses = cross_entropy(model.lm_head(hidden[scored]), made.labels[scored], reduction="none")
    answers = made.segments[scored] == SHARED
    return (losses * torch.where(answers, 1.0, HINT)).sum() / answers.sum()
