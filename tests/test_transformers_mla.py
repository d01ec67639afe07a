"""Caches that hold a latent and a rotated part (MLA): blocks have the rotated part as keys, before rotation."""

import copy
from typing import Any

import pytest
import torch
from hf_models import build, prompt
from hf_runs import attach, in_memory, stored_prompt
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from kvstore import Unsupported
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.form import find_form, is_steady
from kvstore.adapters.transformers.rotation import Rotation
from kvstore.layout import LayerShape
from kvstore.local import LocalStore

FAMILIES = {"deepseek_v2": 16, "deepseek_v3": 8}  # with the dims that turn
STORED, MORE = 45, 7


def memory_of(model: Any, ids: torch.Tensor) -> DynamicCache:
    """The model's own cache after reading ``ids``."""
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory, use_cache=True)
    return memory


@pytest.mark.parametrize("family", FAMILIES)
def test_the_part_that_turns_is_stored_as_keys(store: LocalStore, family: str) -> None:
    _, reuse = attach(family, store)
    assert reuse.layout.layers == (LayerShape(heads=1, key_dim=FAMILIES[family], value_dim=32),) * 3
    assert all(spec.swapped for spec in reuse._joined.attached.specs)
    assert not any(spec.swapped for spec in attach("llama", store)[1]._joined.attached.specs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_what_the_models_own_would(store: LocalStore, family: str, seed: int) -> None:
    """Latents as keys, turned parts as values; whole, cropped, repeated, reordered, copied."""
    model, reuse = attach(family, store)
    ids = stored_prompt(model, reuse, STORED, seed)
    rest = torch.cat((ids, prompt(MORE, seed + 1)), 1)
    memory = memory_of(model, ids)
    hits = [reuse.load(rest) for _ in range(3)]
    hits[1].cache.crop(-9)
    hits[2].cache.batch_repeat_interleave(3)
    hits[2].cache.reorder_cache(torch.tensor([2, 0]))
    for hit, tokens, rows in zip(hits, (STORED, STORED - 9, STORED), (1, 1, 2), strict=True):
        twin = copy.deepcopy(hit.cache)
        for layer, theirs in zip(twin.layers, memory.layers, strict=True):
            assert torch.equal(layer.keys, theirs.keys[:, :, :tokens].expand(rows, -1, -1, -1))
            assert torch.equal(layer.values, theirs.values[:, :, :tokens].expand(rows, -1, -1, -1))
    more = rest[:, STORED:]
    with torch.no_grad():
        logits = model(input_ids=more, past_key_values=copy.deepcopy(hits[0].cache), use_cache=True).logits
    assert torch.equal(logits, in_memory(model, ids, more))


@pytest.mark.parametrize("family", FAMILIES)
def test_holes_in_front_of_shorter_rows(store: LocalStore, family: str, seed: int) -> None:
    """Rows are turned from their own position 0 on, wherever their columns begin."""
    model, reuse = attach(family, store)
    rows = [stored_prompt(model, reuse, length, seed + length)[0].tolist() for length in (40, 9)]
    hit = reuse.load([[*row, 5] for row in rows])
    assert hit.cached_tokens == [40, 9]
    hit.cache.fetch()
    for number, row in enumerate(rows):
        memory = memory_of(model, torch.tensor([row]))
        for layer, theirs in zip(hit.cache.layers, memory.layers, strict=True):
            assert torch.equal(layer.keys[number, :, 40 - len(row) :], theirs.keys[0])
            assert torch.equal(layer.values[number, :, 40 - len(row) :], theirs.values[0])


def test_a_rotation_that_depends_on_what_else_is_turned_is_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = modeling_llama.apply_rotary_pos_emb

    def careless(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """The last bit of the last key differs, as where the rest of a loop is not what its vectors are."""
        turned_q, turned_k = original(q, k, cos, sin)
        if turned_k.shape[2] % 8:
            turned_k.view(torch.int32)[:, :, -1, 0] ^= 1
        return turned_q, turned_k

    rotation = attach("llama", store)[1]._joined.attached.rotations[0]
    assert is_steady(rotation, 2, 16, torch.float32)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", careless)
    with pytest.raises(Unsupported, match="other bits when other keys are rotated with it"):
        Reuse(build("llama"), store)


def test_a_complex_product_of_another_arithmetic_has_no_form(store: LocalStore) -> None:
    """In bfloat16 a product that is fused looks like one that is not, nearly always; its float32 bits tell."""
    rotation = Reuse(build("deepseek_v2", "bfloat16"), store, block_tokens=16)._joined.attached.rotations[0]

    def fused(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> Any:
        pairs = torch.view_as_complex(xk.double().reshape(*xk.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * freqs_cis.unsqueeze(1).to(torch.complex128)).flatten(3)
        return xq, turned.float().to(xk.dtype)

    other = Rotation(
        fused,
        rotation.args,
        rotation.kwargs,
        rotation.key_slot,
        rotation.key_result,
        rotation.query_slots,
        rotation.angle_slots,
        rotation.table,
    )
    keys = torch.randn(1, 1, 24, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(other.rotate(keys, 7), rotation.rotate(keys, 7))
    assert find_form(rotation, 1, 16, torch.bfloat16) is not None
    assert find_form(other, 1, 16, torch.bfloat16) is None
