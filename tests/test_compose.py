"""Prompts put together from segments: what is served equals one masked forward pass over the whole prompt."""

from collections.abc import Sequence
from typing import Any

import hf_models
import pytest
import torch
from transformers import DynamicCache

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.composition import Chain, Composition, Placement, Text

TOLERANCE = 2e-4


def run(start: int, tokens: int) -> list[int]:
    """Token ids that differ from those of other starts."""
    return hf_models.prompt(tokens, seed=start)[0].tolist()


def masked(
    model: Any, ids: Sequence[int], positions: Sequence[int], owners: Sequence[int], windows: Sequence[int | None]
) -> torch.Tensor:
    """Logits of one forward pass in which a token of owner n > 0 sees its own owner only, and owner 0 all before it."""
    size = len(ids)
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
            input_ids=torch.tensor([list(ids)]),
            position_ids=torch.tensor([list(positions)]),
            attention_mask=mask,
            past_key_values=DynamicCache(config=model.config),
        )
    logits: torch.Tensor = out.logits[0]
    return logits


@pytest.fixture(params=sorted(hf_models.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_modules_equal_one_masked_forward_pass(family: str) -> None:
    """Text, a module, text, two modules, a question: only the texts are computed, each behind all that is before it."""
    model = hf_models.build(family)
    first, second, third = run(1, 41), run(2, 30), run(3, 26)
    head, middle, question = run(4, 5), run(5, 7), run(6, 9)
    with kvstore.open(host="256MiB") as store:
        reuse = Reuse(model, store, block_tokens=16)
        windows = [spec.window for spec in reuse._joined.attached.specs]
        for ids in (first, second, third):
            hit = reuse.load(torch.tensor([ids]))
            model(**hit.forward_inputs)
            reuse.save([ids], hit.cache)
        chains = [Chain.of(ids) for ids in (first, second, third)]
        parts: list[Any] = []
        owners: list[int] = []
        for owner, ids in ((0, head), (1, first), (0, middle), (2, second), (3, third), (0, question)):
            position = len(owners)
            if owner:
                parts.append(Placement(chains[owner - 1], 0, len(ids), position))
            else:
                parts.append(Text(Chain.of(ids).token_ids, position))
            owners += [owner] * len(ids)
        prompt = Composition(tuple(parts))
        hit = reuse.load(prompt)
        assert hit.cached_tokens == len(first) + len(second) + len(third)
        assert not hit.exact
        with torch.no_grad():
            got = model(**hit.forward_inputs).logits[0]
        wanted = masked(model, prompt.token_ids, prompt.position_ids, owners, windows)
        computed = [place for place, owner in enumerate(owners) if owner == 0]
        assert got.shape[0] == len(computed)
        torch.testing.assert_close(got, wanted[computed], atol=TOLERANCE, rtol=1e-3)
        # What was computed is found again, behind the same composition only.
        reuse.save([prompt.token_ids], hit.cache)
        again = reuse.load(prompt)
        assert again.cached_tokens == len(prompt) - 1
        with torch.no_grad():
            last = model(**again.forward_inputs).logits[0, -1]
        torch.testing.assert_close(last, wanted[-1], atol=TOLERANCE, rtol=1e-3)
