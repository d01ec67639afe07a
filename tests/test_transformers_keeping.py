"""What is stored of a model's prompt can be pinned and forgotten by its token ids."""

from __future__ import annotations

import pytest
import torch
from composed import read
from hf_models import build, prompt

import kvstore
from kvstore import BadInput, Unsupported
from kvstore.adapters.transformers import Reuse


def test_a_prompt_is_pinned_and_forgotten_by_its_ids() -> None:
    model = build("llama")
    with kvstore.open(host="2MiB") as store:
        reuse = Reuse(model, store, block_tokens=16)

        def told(ids: torch.Tensor) -> None:
            hit = reuse.load(ids, tenant="t")
            read(model, hit)
            reuse.save(ids, hit.cache, tenant="t")

        mine, others = prompt(40, 1), [prompt(160, seed) for seed in range(2, 40)]
        told(mine)
        told(others[0])
        match = reuse.match(mine, tenant="t")
        assert match.tokens == 40  # the last token, too
        assert store.pin(match, seconds=60).tokens == 40
        match.release()
        for ids in others[1:]:
            told(ids)
        assert reuse.match(mine[0].tolist(), tenant="t").tokens == 40
        assert reuse.match(others[0], tenant="t").tokens < 16
        assert reuse.match(mine).tokens == 0  # another tenant's
        assert store.forget(match=reuse.match(mine, tenant="t")).blocks == 3
        assert reuse.match(mine, tenant="t").tokens < 16
        with pytest.raises(BadInput, match="one prompt"):
            reuse.match(torch.cat([mine, mine]))
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(Unsupported, match="refresh"):
            reuse.match(mine)
