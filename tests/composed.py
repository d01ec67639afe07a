"""Prompts in parts, and the one masked forward pass over all of a prompt that they must equal."""

from collections.abc import Sequence
from typing import Any

import hf_models
import torch
from transformers import DynamicCache

from kvstore.adapters.transformers import Reuse
from kvstore.composition import Chain, Composition, Part, Placement, Text
from kvstore.local import LocalStore

TOLERANCE = 2e-4  # of float32 logits: the rounding noise of computing a prompt in other pieces


def tokens(start: int, count: int) -> list[int]:
    """Token ids that differ from those of other starts."""
    found: list[int] = hf_models.prompt(count, seed=start)[0].tolist()
    return found


FIRST, SECOND, THIRD = tokens(1, 41), tokens(2, 30), tokens(3, 26)
HEAD, MIDDLE, QUESTION = tokens(4, 5), tokens(5, 7), tokens(6, 9)
PARTS = [(0, HEAD), (1, FIRST), (0, MIDDLE), (2, SECOND), (3, THIRD), (0, QUESTION)]
MODULES = [FIRST, SECOND, THIRD]


def composition(parts: Sequence[tuple[int, list[int]]], gaps: Sequence[int] = ()) -> tuple[Composition, list[int]]:
    """A prompt of (owner, token ids), and the owner of each token; owner 0 is text, every other one a module.

    ``gaps``: positions left out before each part.
    """
    made: list[Part] = []
    owners: list[int] = []
    position = 0
    for number, (owner, ids) in enumerate(parts):
        position += gaps[number] if gaps else 0
        chain = Chain.of(ids)
        made.append(Placement(chain, 0, len(ids), position) if owner else Text(chain.token_ids, position))
        owners += [owner] * len(ids)
        position += len(ids)
    return Composition(tuple(made)), owners


def masked(model: Any, prompt: Composition, owners: Sequence[int], windows: Sequence[int | None]) -> torch.Tensor:
    """Logits of one forward pass in which a token of owner n > 0 sees its own owner only, and owner 0 all before it."""
    size = len(prompt)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for row in range(size):
        for column in range(row + 1):
            seen[row, column] = owners[row] == 0 or owners[row] == owners[column]
    made = {}
    for window in set(windows):
        near = seen.clone()
        if window is not None:
            for row in range(size):
                near[row, : max(0, row - window + 1)] = False
        made["full_attention" if window is None else "sliding_attention"] = near[None, None]
    mask: Any = made if len(made) > 1 else made.popitem()[1]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([prompt.token_ids]),
            position_ids=torch.tensor([prompt.position_ids]),
            attention_mask=mask,
            past_key_values=DynamicCache(config=model.config),
        )
    logits: torch.Tensor = out.logits[0]
    return logits


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=1e-3)


def joined(model: Any, store: LocalStore) -> tuple[Reuse, list[int | None]]:
    """The model with all modules encoded, and the windows of its layers."""
    reuse = Reuse(model, store, block_tokens=16)
    encoded = reuse.encode(segments=MODULES)
    assert encoded.new_tokens == encoded.tokens == sum(map(len, MODULES))
    return reuse, [spec.window for spec in reuse._joined.attached.specs]


def read(model: Any, hit: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**hit.forward_inputs).logits[0]
    return logits
