"""Turns of a conversation on the small models, in this process or, run as a script, in another one."""

import sys
from pathlib import Path
from typing import Any

import torch
from hf_models import DTYPES, FAMILIES, build, prompt
from safetensors.torch import save_file
from transformers import DynamicCache

import kvstore
from kvstore.adapters.transformers import Reuse

BLOCK = 16
FIRST, SECOND, NEW = 41, 13, 64
CASES = [(f, d, a) for f in FAMILIES for d in DTYPES for a in ("sdpa", "eager")]


def go_on(model: Any, cache: Any, ids: torch.Tensor, new: int = NEW) -> tuple[torch.Tensor, torch.Tensor]:
    """Read ``ids`` on top of ``cache``, then ``new`` greedy tokens: (logits of all that was read, the tokens)."""
    logits, tokens, current = [], [], ids
    with torch.no_grad():
        for _ in range(new):
            out = model(input_ids=current, past_key_values=cache, use_cache=True).logits
            current = out[:, -1:].argmax(-1)
            logits.append(out)
            tokens.append(current)
    return torch.cat(logits, 1), torch.cat(tokens, 1)


def first_turn(model: Any, reuse: Any, seed: int, tokens: int = FIRST) -> tuple[torch.Tensor, Any, Any]:
    """A prompt read with a hit's cache, and with transformers' own: (ids, the hit, the cache in memory)."""
    ids = prompt(tokens, seed)
    hit = reuse.load(ids)
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**hit.forward_inputs)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory, use_cache=True)
    return ids, hit, memory


def second_turn(model: Any, reuse: Any, ids: torch.Tensor, seed: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """What a loaded prompt goes on with: (cached tokens, logits, greedy tokens)."""
    more = prompt(SECOND, seed + 1)
    hit = reuse.load(torch.cat((ids, more), 1))
    logits, tokens = go_on(model, hit.cache, hit.forward_inputs["input_ids"])
    return hit.cached_tokens, logits, tokens


def in_memory(model: Any, ids: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Logits of ``more`` behind ``ids``, with the model's own cache."""
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory, use_cache=True)
        logits: torch.Tensor = model(input_ids=more, past_key_values=memory, use_cache=True).logits
    return logits


def leases_left(store: kvstore.Store) -> int:
    """Leases that are held when nothing is being brought ahead of a model any more."""
    store.worker().record().wait()
    left: int = store.stats()["leases"]
    return left


def attach(family: str, store: Any, **options: Any) -> tuple[Any, Any]:
    """A model of a family, joined to a store in small blocks."""
    model = build(family)
    return model, Reuse(model, store, block_tokens=BLOCK, **options)


def stored_prompt(model: Any, reuse: Any, tokens: int, seed: int) -> torch.Tensor:
    """A prompt whose keys and values are in the store."""
    ids = prompt(tokens, seed)
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
    reuse.save(ids, hit.cache)
    return ids


def main(folder: str, results: str) -> None:
    """All cases from what another process has stored in ``folder``."""
    torch.set_num_threads(1)
    found: dict[str, torch.Tensor] = {}
    with kvstore.open(folder, host="64MiB", disk="256MiB") as store:
        for number, (family, dtype, attention) in enumerate(CASES):
            model = build(family, dtype, attention, seed=number)
            reuse = Reuse(model, store, block_tokens=BLOCK)
            cached, logits, tokens = second_turn(model, reuse, prompt(FIRST, number), number)
            name = f"{family}-{dtype}-{attention}"
            found |= {f"{name}.cached": torch.tensor([cached]), f"{name}.logits": logits, f"{name}.tokens": tokens}
    save_file(found, Path(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
