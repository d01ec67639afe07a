"""Module reuse by masks, in one pass and without a store: what a store must come to, and what evaluations measure.

Nothing here saves time. Whole batches go through the model; what a cache would hold is put in the place of what was
just computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.kvlink.layout import SHARED
from kvstore.adapters.kvlink.mask import additive, block_mask, causal_mask

MEASURED = 1  # the layer whose keys and values are compared

Layers = list[tuple[torch.Tensor, torch.Tensor]]


class _Mixed(DynamicCache):
    """Gives attention the keys and values that were cached, but for the tokens that are computed anew.

    With a ``share`` it chooses those itself, at the first layer whose keys and values depend on other tokens: the
    given share of every row's documents, those that deviate most. Until then all are new.
    """

    def __init__(self, config: Any, cached: Layers, documents: torch.Tensor, share: float) -> None:
        super().__init__(config=config)
        self.cached = cached
        self.documents = documents  # bool [rows, tokens]
        self.share = share
        self.chosen: torch.Tensor | None = None  # bool [rows, tokens]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer attends to."""
        if layer_idx < MEASURED:
            return key_states, value_states
        cached = self.cached[layer_idx]
        fresh = key_states, value_states
        if self.chosen is None:
            score = sum(deviation(new, old, self.documents) for new, old in zip(fresh, cached, strict=True))
            assert isinstance(score, torch.Tensor)
            self.chosen = largest(score, self.documents, self.share)
        kept = (self.documents & ~self.chosen)[:, None, :, None]
        return torch.where(kept, cached[0], key_states), torch.where(kept, cached[1], value_states)


def deviation(fresh: torch.Tensor, cached: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """How far each token [rows, tokens] is from what was cached; of [rows, heads, tokens, dim] each.

    Squared distance over all heads, in units of the mean square of what documents had cached in that row.
    """
    distance = (fresh - cached).float().square().sum(dim=(1, 3))
    square = cached.float().square().mean(dim=(1, 3)) * documents
    return distance / (square.sum(1, keepdim=True) / documents.sum(1, keepdim=True).clamp_min(1)).clamp_min(1e-12)


def largest(score: torch.Tensor, documents: torch.Tensor, share: float) -> torch.Tensor:
    """Of every row, the ``share`` of its documents' tokens (rounded up) with the largest scores; bool."""
    order = score.masked_fill(~documents, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    # In double precision as Python has it: 0.15 of 20 is 3.
    count = torch.tensor([math.ceil(share * int(number)) for number in documents.sum(1)], device=order.device)
    return (rank < count[:, None]) & documents


@torch.no_grad()
def modular(
    model: Any, ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, Layers]:
    """Logits [rows, tokens, vocabulary] when documents see only themselves, and every layer's keys and values.

    ``positions`` other than the contiguous ones show what is lost without re-encoding.
    """
    cache = DynamicCache(config=model.config)
    logits = _forward(model, ids, block_mask(segments), positions, cache)
    return logits, [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def full(model: Any, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Logits of ordinary attention."""
    return _forward(model, ids, causal_mask(segments), None, None)


@torch.no_grad()
def blend(
    model: Any, ids: torch.Tensor, segments: torch.Tensor, share: float, source: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits when a ``share`` of the documents' tokens is computed anew, and which those are (bool [rows, tokens]).

    They attend to everything before them; logits of the tokens that are not chosen mean nothing. A document that
    begins the prompt is as it was alone, and not counted. ``source`` chooses at random instead of by deviation, for
    comparison.
    """
    _, cached = modular(model, ids, segments)
    documents = (segments > SHARED) & (segments != segments[:, :1])
    cache = _Mixed(model.config, cached, documents, share)
    if source is not None:
        cache.chosen = largest(torch.rand(ids.shape, generator=source).to(ids.device), documents, share)
    logits = _forward(model, ids, causal_mask(segments), None, cache)
    assert cache.chosen is not None
    return logits, cache.chosen


def _forward(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None, cache: Any
) -> torch.Tensor:
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    taken = model(
        input_ids=ids,
        attention_mask=additive(mask, model.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    logits: torch.Tensor = taken.logits
    return logits
