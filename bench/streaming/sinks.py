"""Whether a model has attention sinks: how much of its attention goes to the first tokens."""

from __future__ import annotations

from typing import Any

import torch

FIRST = 4


def attention_to_first(model: Any, texts: torch.Tensor) -> list[list[float]]:
    """Of each layer, the share of attention that tokens in the second half of ``texts`` [rows, tokens] pay to each of
    the first ``FIRST`` tokens, mean over rows and heads. A token that looks at all alike pays about 1 / tokens.
    """
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others do not say
    try:
        seen = model(input_ids=texts, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(kind)
    half = texts.shape[1] // 2
    return [layer[:, :, half:, :FIRST].mean(dim=(0, 1, 2)).tolist() for layer in seen]
