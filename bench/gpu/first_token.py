"""Time to the first token of a long prompt on a model of 8B shape: recomputed, and from the host tier."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers import Reuse
from kvstore.bench.gpu.setting import Figure, Setting


@torch.inference_mode()
def measure(setting: Setting) -> Iterator[Figure]:
    """Seconds of each way, of the plain copy of the same bytes, and of one token's pass behind as many: the floor."""
    model, ids = setting.model, setting.ids(setting.prompt, 6, setting.model)
    with setting.store() as store:
        reuse = Reuse(model, store, fingerprint="bench", block_tokens=setting.block_tokens)
        hit = reuse.load(ids)
        first_token(model, hit.forward_inputs)
        reuse.save(ids, hit.cache).wait()
        setting.pin(store)
        del hit

        def host() -> None:
            hit = reuse.load(ids)
            assert hit.cached_tokens == setting.prompt - 1, f"only {hit.cached_tokens} tokens came back: {hit.miss}"
            first_token(model, hit.forward_inputs)

        for _ in range(3):
            host()
        measured = median(setting, host)
        copied = reuse.layout.token_payload * (setting.prompt - 1) / setting.pinned_copy
    cache = DynamicCache(config=model.config)

    def recompute() -> None:
        first_token(model, {"input_ids": ids, "past_key_values": DynamicCache(config=model.config)})

    first_token(model, {"input_ids": ids[:, :-1], "past_key_values": cache})

    def floor() -> None:
        first_token(model, {"input_ids": ids[:, -1:], "past_key_values": cache})
        cache.crop(-1)

    floor()
    floors, recomputed = median(setting, floor), median(setting, recompute)
    limit = max(copied, floors)
    yield Figure("first_token_recompute", recomputed * 1e3, "ms")
    yield Figure("first_token_host", measured * 1e3, "ms")
    yield Figure("copy_of_the_prompt", copied * 1e3, "ms")
    yield Figure("first_token_floor", floors * 1e3, "ms")
    yield Figure("first_token_ratio", measured / limit, "of max(copy, floor)", setting.goal(1.15), at_most=True)


def first_token(model: Any, inputs: dict[str, Any]) -> int:
    """Runs the prompt's rest and waits for the token."""
    logits = model(**(inputs | {"use_cache": True}), logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def median(setting: Setting, work: Callable[[], object]) -> float:
    """Median seconds on the clock."""
    return statistics.median(setting.clocked(work) for _ in range(setting.first_tokens))
