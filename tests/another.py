"""Another engine on the same store: it runs the same model, and stores keys as its cache holds them."""

from __future__ import annotations

from typing import Any

import torch
from hf_models import FAMILIES
from hf_runs import BLOCK
from transformers import DynamicCache

from kvstore import Namespace
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.buffers import view
from kvstore.save import Saved

ENGINE = "another/1"
UNKNOWN = "deepseek_v3"  # no kernel turns its keys
KNOWN = [family for family in FAMILIES if family != UNKNOWN]
WHOLE, TAIL = 3 * BLOCK, 7  # tokens of prompts: blocks, and part of one
NEW = 20  # tokens that are said
Pair = tuple[torch.Tensor, torch.Tensor]


class Seen(DynamicCache):  # type: ignore[misc]
    """Keeps all that each stored layer was given, also what a sliding window would drop."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: list[Pair] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **more: Any) -> Pair:
        self.seen.append((keys, values))
        made: Pair = super().update(keys, values, layer, *args, **more)
        return made


def seen(model: Any, ids: torch.Tensor) -> list[Pair]:
    """What each stored layer of a cache holds of a prompt that is read in one pass, [1, heads, tokens, dim]."""
    cache = Seen(model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    return cache.seen


def stores(reuse: Reuse, ids: torch.Tensor, form: str = "rotated") -> Saved:
    """The other engine reads a prompt, and stores all of it that is not there yet. ``form``: what it says of its keys,
    which are always turned."""
    layout, attached, size = reuse.layout, reuse._joined.attached, ids.shape[1]
    states = seen(reuse.model, ids)
    drafts = reuse.store.drafts(layout, -(-size // BLOCK))
    for block, draft in enumerate(drafts):
        first, stop = block * BLOCK, min(size, block * BLOCK + BLOCK)
        for slot, (spec, pair) in enumerate(zip(attached.specs, states, strict=True)):
            for memory, state in zip(draft.layer(slot), spec.exchanged(*pair), strict=True):
                shape = spec.heads, BLOCK, state.shape[-1]
                view(memory, attached.dtype, shape)[:, : stop - first] = state[0, :, first:stop]
    given = dict(enumerate(drafts))
    return reuse.store.save(Namespace(reuse.fingerprint), layout, ids[0].tolist(), given, writer=ENGINE, form=form)


def forms(reuse: Reuse, ids: torch.Tensor) -> list[str]:
    """Of the blocks that are stored of a prompt."""
    match = reuse.match(ids)
    match.release()
    return [origin.form for origin in match.origins]


def memory_of(model: Any, ids: torch.Tensor) -> DynamicCache:
    """The model's own cache, after it has read a prompt."""
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory, use_cache=True)
    return memory


def held(hit: Any, slot: int) -> Pair:
    """Keys and values of a hit that was not read yet, as its block has them."""
    layer = hit.cache.layers[hit.cache.owner().plan.stored[slot]]
    return layer.keys, layer.values


def same_as(hit: Any, states: list[Pair]) -> None:
    """A hit's cache holds these bits."""
    hit.cache.fetch()
    for slot, pair in enumerate(states):
        for mine, wanted in zip(held(hit, slot), pair, strict=True):
            assert torch.equal(mine, wanted[:, :, : mine.shape[2]]), slot
