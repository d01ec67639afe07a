"""Computing the cached tokens again, in the middle of a forward pass, when a layer cannot be had from the store."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers import capture
from kvstore.adapters.transformers.batch import Plan
from kvstore.adapters.transformers.buffers import LayerSpec, Pair


class _WholeCache(DynamicCache):
    """Keeps all that each stored layer was given, also what a sliding window would drop."""

    def __init__(self, config: Any, specs: Sequence[LayerSpec]) -> None:
        super().__init__(config=config)
        self.whole: list[Pair] = []
        self._specs = specs

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Pair:
        """Keep, then store as usual."""
        self.whole.append(self._specs[len(self.whole)].exchanged(key_states, value_states))
        result: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return result


def nested_prefill(
    decoder: Any, config: Any, plan: Plan, columns: int, specs: Sequence[LayerSpec]
) -> Callable[[], list[Pair]]:
    """A function that runs ``decoder`` over ``columns`` of ``plan``: keys and values of every slot, turned."""

    def run() -> list[Pair]:
        cache = _WholeCache(config, specs)
        mask = plan.mask[:, :columns]
        # Above the last stored layer, a decoder that can leave early has nothing to compute that is wanted.
        leaving = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(decoder.forward).parameters else {}
        capture.listen(None)  # the forward pass around this one must not hear these calls
        try:
            with torch.no_grad():
                decoder(
                    input_ids=plan.ids[:, :columns],
                    attention_mask=None if bool(mask.all()) else mask,
                    position_ids=plan.positions[:, :columns],
                    past_key_values=cache,
                    use_cache=True,
                    **leaving,
                )
        finally:
            capture.leave()
        return cache.whole

    return run
