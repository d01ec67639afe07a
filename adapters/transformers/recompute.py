"""Computing the cached tokens again, in the middle of a forward pass, when a layer cannot be had from the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers import capture
from kvstore.adapters.transformers.batch import Plan

Pair = tuple[torch.Tensor, torch.Tensor]


class _WholeCache(DynamicCache):
    """Keeps all that each layer was given, also what a sliding window would drop."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.whole: list[Pair] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Pair:
        """Keep, then store as usual."""
        self.whole.append((key_states, value_states))
        result: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return result


def nested_prefill(decoder: Any, config: Any, plan: Plan) -> Callable[[], list[Pair]]:
    """A function that runs ``decoder`` over the cached columns of ``plan``: keys and values of every layer."""

    def run() -> list[Pair]:
        cache = _WholeCache(config)
        mask = plan.mask[:, : plan.columns]
        capture.listen(None)  # the forward pass around this one must not hear these calls
        try:
            with torch.no_grad():
                decoder(
                    input_ids=plan.ids[:, : plan.columns],
                    attention_mask=None if bool(mask.all()) else mask,
                    position_ids=plan.positions[:, : plan.columns],
                    past_key_values=cache,
                    use_cache=True,
                )
        finally:
            capture.leave()
        return cache.whole

    return run
