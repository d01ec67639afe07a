"""Models that store some layers, served from a store: the bits of going on in memory, and half the bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import LAYERS, build
from hf_models import DTYPES, VOCABULARY, prompt
from hf_runs import BLOCK, leases_left
from transformers import DynamicCache

import kvstore
from kvstore.adapters.fusedkv import FusedKVForCausalLM
from kvstore.adapters.transformers import Reuse
from kvstore.local import LocalStore
from kvstore.plan import PLANS
from kvstore.tensors.carrier import Carrier

PROMPT, MORE, NEW = 53, 11, 12
HITS = (1, 15, 16, 17, 40, 52, 53)  # around the ends of blocks, and in the middle of them
KEEP: tuple[dict[str, int], ...] = ({}, {"logits_to_keep": 1}, {"logits_to_keep": 3})


def attached(
    plan: str, store: LocalStore, dtype: str = "float32", attention: str = "sdpa", seed: int = 0
) -> tuple[Any, Any]:
    model = build(plan, seed, DTYPES[dtype], attention)
    return model, Reuse(model, store, block_tokens=BLOCK)


def read(model: Any, ids: torch.Tensor, cache: Any, **keep: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **keep).logits
    return logits


def stored(model: Any, reuse: Any, ids: torch.Tensor, **keep: Any) -> Any:
    """The prompt read with early exit or without, and saved; the same in memory."""
    hit, memory = reuse.load(ids), DynamicCache(config=model.config)
    assert hit.cached_tokens == 0
    with torch.no_grad():
        model(**hit.forward_inputs, **keep)
    read(model, ids, memory, **keep)
    assert reuse.save(ids, hit.cache).tokens == ids.shape[1]
    return memory


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_hits_of_any_length_go_on_bit_for_bit(
    store: LocalStore, plan: str, dtype: str, attention: str, seed: int
) -> None:
    """With early exit where the prompt is read, where it goes on, or both; and what was recorded then, a turn later."""
    model, reuse = attached(plan, store, dtype, attention, seed)
    for number, length in enumerate(HITS):
        first, then = KEEP[number % 3], KEEP[number // 3 % 3]
        ids, more = prompt(PROMPT, seed + number), prompt(MORE, seed + 90)
        if length < PROMPT:
            more[0, 0] = ids[0, length] % (VOCABULARY - 1) + 1  # another token, so that the hit ends here
        memory = stored(model, reuse, ids, **first)
        memory.crop(length - PROMPT)
        turn = torch.cat((ids[:, :length], more), 1)
        hit = reuse.load(turn)
        assert hit.cached_tokens == length
        with torch.no_grad():
            logits = model(**hit.forward_inputs, **then).logits
        assert torch.equal(logits, read(model, more, memory, **then)), length
        assert reuse.save(turn, hit.cache).tokens == length + MORE
        again = reuse.load(torch.cat((turn, more), 1))
        assert again.cached_tokens == length + MORE
        with torch.no_grad():
            logits = model(**again.forward_inputs, **first).logits
        assert torch.equal(logits, read(model, more, memory, **first)), length


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_stored_does_not_depend_on_who_left_early(store: LocalStore, plan: str, seed: int) -> None:
    model, reuse = attached(plan, store, seed=seed)
    ids = prompt(PROMPT, seed)
    whole, left = (read_recorded(model, reuse, ids, keep) for keep in ({}, {"logits_to_keep": 1}))
    assert len(whole) == 2 * len(reuse.plan.stored)
    assert all(torch.equal(one, other) for one, other in zip(whole, left, strict=True))


def read_recorded(model: Any, reuse: Any, ids: torch.Tensor, keep: dict[str, int]) -> list[torch.Tensor]:
    """Keys before rotation and values of a full block as they were recorded."""
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs, **keep)
    block = hit.cache.recorder.rows[0]._blocks[1]
    recorded = [tensor.clone() for tensor in (*block.keys, *block.values)]
    hit.cache.recorder.discard()
    return recorded


@pytest.mark.parametrize("plan", PLANS)
def test_greedy_tokens_are_those_of_the_model_alone(store: LocalStore, plan: str, seed: int) -> None:
    """Over three turns, and with every way to leave early: generate() does, a plain loop over all logits does not."""
    model, reuse = attached(plan, store, seed=seed)
    ids = prompt(PROMPT, seed)
    for turn in range(3):
        out = reuse.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, model.generate(ids, max_new_tokens=NEW, do_sample=False))
        slow = ids
        with torch.no_grad():
            for _ in range(NEW):
                slow = torch.cat((slow, model(slow).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(out, slow)
        ids = torch.cat((out, prompt(MORE, seed + turn)), 1)
    assert reuse.load(ids).cached_tokens >= PROMPT + 2 * (NEW + MORE)


def test_a_plan_is_part_of_the_fingerprint(store: LocalStore, seed: int) -> None:
    """Models whose weights are the same, and whose keys and values are not: only the plan tells them apart."""
    lite = build("fusedkv-lite", seed)
    yoco = build("yoco", seed)
    yoco.load_state_dict(lite.state_dict())
    one, other = (Reuse(model, store, block_tokens=BLOCK) for model in (lite, yoco))
    assert one.fingerprint.differs(other.fingerprint) == ["layer_plan"]
    ids = prompt(PROMPT, seed)
    stored(lite, one, ids)
    assert other.load(ids).cached_tokens == 0
    assert one.load(ids).cached_tokens == PROMPT - 1


def test_weights_of_sums_are_watched(store: LocalStore, seed: int) -> None:
    """They change what the model says, so hits are refused once training went on; as a control, not before."""
    model, reuse = attached("fusedkv", store, seed=seed)
    ids = prompt(PROMPT, seed)
    stored(model, reuse, ids)
    assert reuse.load(ids).cached_tokens == PROMPT - 1
    with torch.no_grad():
        model.model.layers[LAYERS - 1].self_attn.fusion.keys.mul_(1.5)
    hit = reuse.load(ids)
    assert hit.cached_tokens == 0
    assert "weights changed" in str(hit.miss)


# -- bytes ------------------------------------------------------------------------------------------------------------

TOKENS = 1024  # four full blocks
WIDE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "head_dim": 64,
}


def bytes_held(plan: str, folder: Path) -> dict[str, int]:
    """Bytes of the prompt in every tier, headers and padding included, and in the files."""
    model: FusedKVForCausalLM = build(plan, **WIDE)
    ids = prompt(TOKENS, 1) % 64
    streams = Carrier(torch.device("cpu"))
    with kvstore.open(folder, host="64MiB", disk="64MiB", device="64MiB", device_name="cpu") as store:
        reuse = Reuse(model, store)
        reuse._joined.carrier = streams  # loads go by way of the device tier
        hit = reuse.load(ids)
        with torch.no_grad():
            model(**hit.forward_inputs, logits_to_keep=1)
        durable = reuse.save(ids, hit.cache).wait()
        assert durable.tokens == TOKENS
        hit = reuse.load(torch.cat((ids, ids[:, :1]), 1))
        with torch.no_grad():
            model(**hit.forward_inputs, logits_to_keep=1)
        hit.cache.reset()
        assert leases_left(store) == 0
        tiers = {name: int(tier["bytes"]) for name, tier in store.stats()["tiers"].items()}
    streams.close()
    files = sum(file.stat().st_blocks * 512 for file in (folder / "v1").glob("extent-*"))
    return {**tiers, "files": files, "payload": reuse.layout.token_payload * TOKENS, "durable": durable.bytes}


@pytest.mark.parametrize("plan", sorted(set(PLANS) - {"standard"}))
def test_every_tier_holds_stored_layers_only(tmp_path: Path, plan: str) -> None:
    whole, half = bytes_held("standard", tmp_path / "whole"), bytes_held(plan, tmp_path / "half")
    assert {"device", "host", "disk"} <= half.keys()
    assert 2 * half["payload"] == whole["payload"]  # n/L, exactly
    for place in half.keys() - {"payload"}:
        assert half["payload"] <= half[place] <= 1.02 * half["payload"], place
        assert half[place] == pytest.approx(whole[place] / 2, rel=0.02), place
