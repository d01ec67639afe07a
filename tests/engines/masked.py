"""One forward pass in which documents see only themselves, and what follows them sees everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers


def log_probabilities(model: Path, segments: Sequence[tuple[int, int]], ids: Sequence[int]) -> torch.Tensor:
    """Of the token behind ``ids``, of which ``segments`` see only themselves. Positions go on from one to the next."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    length = len(ids)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for start, stop in segments:
        seen[start:stop, :start] = False
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = loaded(
            torch.tensor([list(ids)]), attention_mask=mask, position_ids=torch.arange(length)[None], use_cache=False
        ).logits[0, -1]
    return torch.log_softmax(logits.double(), -1)
