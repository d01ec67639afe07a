"""Conversations that outgrow their context: what attention sees, against the models' own arithmetic and masks."""

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY, build, prompt
from transformers import DynamicCache

from kvstore import BadInput, Unsupported
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.window import WindowCache
from kvstore.local import LocalStore
from kvstore.policies.overflow import Window, truncation

Make = Callable[[], WindowCache]
FAMILIES = ("llama", "qwen3", "neox", "phi3", "deepseek_v2")
WINDOW = Window(24, sinks=4, step=2)
TOKENS = 66  # which drop something 21 times
TOLERANCE = 1e-4


def windowed(
    family: str, store: LocalStore, policy: Window = WINDOW, dtype: str = "float32"
) -> tuple[Any, Make, Reuse]:
    """A model, what makes caches for it, and what joins it to a store that sees nothing of them."""
    model = build(family, dtype)
    reuse = Reuse(model, store)
    return model, partial(reuse.window, policy), reuse


def read(model: Any, cache: Any, ids: torch.Tensor, sizes: Sequence[int] = ()) -> torch.Tensor:
    """Logits of ``ids``, read in calls of these sizes and one of the rest."""
    logits = []
    with torch.no_grad():
        for size in sizes:
            logits.append(model(input_ids=ids[:, :size], past_key_values=cache, use_cache=True).logits)
            ids = ids[:, size:]
        if ids.shape[1]:
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def seen(policy: Window, tokens: int) -> torch.Tensor:
    """Which tokens each token sees, [tokens, tokens]."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for token in range(tokens):
        for first, stop in policy.kept(token + 1):
            mask[token, first:stop] = True
    return mask


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


# -- what attention sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_keys_are_the_originals_rotated_once(family: str, dtype: str, store: LocalStore, seed: int) -> None:
    """After 21 drops: the originals are the bytes that they were, and keys are these at their index, as of one call."""
    model, make, _reuse = windowed(family, store, dtype=dtype)
    cache, ids = make(), prompt(TOKENS, seed)
    first: list[list[torch.Tensor]] = [[] for _ in cache.stored]
    for token in range(TOKENS):
        read(model, cache, ids[:, token : token + 1])
        for layer, originals in zip(cache.stored, first, strict=True):
            originals.append(layer.originals()[0][:, :, -1:].clone())
    kept = [token for start, stop in WINDOW.kept(TOKENS) for token in range(start, stop)]
    assert kept[:5] == [0, 1, 2, 3, 46] and cache.get_seq_length() == TOKENS
    for layer, originals in zip(cache.stored, first, strict=True):
        wanted = torch.cat([originals[token] for token in kept], 2)
        assert torch.equal(layer.originals()[0], wanted)
        keys = layer._spec.exchanged(layer.keys, layer.values)[0]
        assert torch.equal(keys, layer._rotation.rotate(wanted, 0))
        assert not torch.equal(keys, layer._rotation.rotate(wanted, 1))  # the index is told apart


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_are_the_models_own_function_of_what_its_projection_gave(
    family: str, dtype: str, store: LocalStore, seed: int
) -> None:
    """Without the adapter's rotation: hooks on the model's own modules, and its own function."""
    model, make, _reuse = windowed(family, store, dtype=dtype)
    made: list[torch.Tensor] = []
    attention = model.model.layers[1].self_attn
    source = attention.k_norm if family == "qwen3" else attention.k_proj
    source.register_forward_hook(lambda _, __, out: made.append(out.reshape(1, -1, 2, 16).transpose(1, 2)))
    cache = make()
    read(model, cache, prompt(TOKENS, seed), (7, 30, 1, 1, 11))
    kept = [token for start, stop in WINDOW.kept(TOKENS) for token in range(start, stop)]
    originals = torch.cat(made, 2)[:, :, kept]
    cos, sin = model.model.rotary_emb(originals, torch.arange(len(kept))[None])
    rotate = sys.modules[type(model).__module__].apply_rotary_pos_emb
    assert torch.equal(cache.layers[1].keys, rotate(originals, originals, cos, sin)[1])


@pytest.mark.parametrize("family", [*FAMILIES, "fusedkv"])
def test_without_sinks_it_is_a_mask(family: str, store: LocalStore, seed: int) -> None:
    """Rotation is relative, so a window that moves as a whole is what a mask over the whole history makes of it."""
    policy = truncation(24)
    model, make, _reuse = windowed(family, store, policy)
    ids = prompt(TOKENS, seed)
    got = read(model, make(), ids, (7, 30, 1, 11))
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=seen(policy, TOKENS)[None, None]).logits
        unmasked = model(input_ids=ids).logits
    assert difference(got, whole) < TOLERANCE
    assert difference(got, unmasked) > 100 * TOLERANCE


def moved_sinks(model: Any, ids: torch.Tensor, policy: Window, moves: bool = True) -> torch.Tensor:
    """The same in plain transformers, one token at a time: logits.

    Rotation is relative, so instead of moving the window back, the sinks come along: what the model makes of them at
    positions further on. Nothing is ever rotated again.
    """
    layers = range(model.config.num_hidden_layers)
    history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in layers]
    logits, sinks = [], policy.sinks
    with torch.no_grad():
        for token in range(ids.shape[1]):
            gone = policy.dropped(token + 1)
            cache = DynamicCache(config=model.config)
            if gone:
                places = torch.arange(gone if moves else 0, (gone if moves else 0) + sinks)[None]
                model(input_ids=ids[:, :sinks], position_ids=places, past_key_values=cache, use_cache=True)
            for layer in layers if token else ():
                kept = history[layer][sinks + gone if gone else 0 :]
                cache.update(*(torch.cat(states, 2) for states in zip(*kept, strict=True)), layer)
            inputs = {"input_ids": ids[:, token : token + 1], "position_ids": torch.tensor([[token]])}
            logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
            for layer in layers:
                held = cache.layers[layer]
                history[layer].append((held.keys[:, :, -1:], held.values[:, :, -1:]))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_sinks_it_is_the_sinks_that_come_along(family: str, store: LocalStore, seed: int) -> None:
    model, make, _reuse = windowed(family, store)
    ids = prompt(TOKENS, seed)
    got = read(model, make(), ids, (7, 30, 1, 11))
    assert difference(got, moved_sinks(model, ids, WINDOW)) < TOLERANCE
    assert difference(got, moved_sinks(model, ids, WINDOW, moves=False)) > 10 * TOLERANCE


# -- how it is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "deepseek_v2"])
def test_turns_and_pieces_do_not_matter(family: str, store: LocalStore, seed: int) -> None:
    model, make, _reuse = windowed(family, store)
    ids = prompt(TOKENS, seed)
    whole, wanted = make(), WINDOW.kept(TOKENS)
    logits = read(model, whole, ids)
    assert logits.shape == (1, TOKENS, VOCABULARY) and whole.kept == wanted
    for sizes in ([1] * TOKENS, [24, 2, 2], [23, 5, 30]):
        cache = make()
        assert difference(read(model, cache, ids, sizes), logits) < TOLERANCE
        assert cache.kept == wanted
        for layer, other in zip(cache.stored, whole.stored, strict=True):
            assert difference(layer.originals()[0], other.originals()[0]) < TOLERANCE


def test_nothing_is_dropped_before_the_context_is_full(store: LocalStore, seed: int) -> None:
    model, make, _reuse = windowed("llama", store)
    ids = prompt(WINDOW.context + 1, seed)
    cache, plain = make(), DynamicCache(config=model.config)
    for start in (0, 20):
        part = ids[:, start : min(start + 20, WINDOW.context)]
        assert torch.equal(read(model, cache, part), read(model, plain, part))  # the same bits
    assert cache.kept == [(0, 24)]
    read(model, cache, ids[:, -1:])
    assert cache.kept == [(0, 4), (6, 25)]
    cache.reset()
    assert cache.kept == [] and cache.get_seq_length() == 0 and cache.layers[0].keys.shape[2] == 0
    assert torch.equal(read(model, cache, ids[:, :20]), read(model, DynamicCache(config=model.config), ids[:, :20]))


def test_memory_stays_as_it_is(store: LocalStore, seed: int) -> None:
    model, make, _reuse = windowed("llama", store)
    cache, ids = make(), prompt(TOKENS, seed)
    assert cache.size == 3 * 24 * 3 * 2 * 16 * 4  # layers, columns, buffers, heads, dims, bytes
    places = set()
    for start in range(0, TOKENS, 9):
        read(model, cache, ids[:, start : start + 9])
        assert all(layer.keys.shape[2] <= WINDOW.context for layer in cache.layers)
        places.add(tuple(state.data_ptr() for layer in cache.layers for state in (layer.keys, layer.values)))
    assert len(places) == 1 and cache.size == 3 * 24 * 3 * 2 * 16 * 4


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_generate_equals_a_loop(family: str, store: LocalStore, seed: int) -> None:
    """Two turns, each with the whole history, as ``generate`` wants it."""
    model, make, _reuse = windowed(family, store)
    history, more = prompt(40, seed), prompt(9, seed + 1)
    cache, by_hand = make(), make()
    expected = history
    for _turn in range(2):
        history = model.generate(history, past_key_values=cache, max_new_tokens=30, do_sample=False)
        for _ in range(30):
            logits = read(model, by_hand, expected[:, by_hand.get_seq_length() :])
            expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(history, expected)
        assert cache.get_seq_length() == history.shape[1] - 1 and cache.kept == by_hand.kept
        history = expected = torch.cat((history, more), 1)
    assert not torch.equal(history, model.generate(prompt(40, seed), max_new_tokens=69, do_sample=False))


def test_new_tokens_alone_with_the_mask_of_all(store: LocalStore, seed: int) -> None:
    """The other way to go on that ``generate`` has."""
    model, make, _reuse = windowed("llama", store)
    ids, cache, other = prompt(TOKENS, seed), make(), make()
    whole = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    read(model, other, ids[:, :46])
    new, mask = ids[:, 46:], torch.ones_like(ids)
    out = model.generate(new, attention_mask=mask, past_key_values=other, max_new_tokens=8, do_sample=False)
    assert torch.equal(out[:, 20:], whole[:, TOKENS:]) and other.kept == cache.kept


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_pass_that_fails_is_forgotten(store: LocalStore, seed: int) -> None:
    model, make, _reuse = windowed("llama", store)
    ids, cache = prompt(TOKENS, seed), make()
    expected = read(model, make(), ids)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    for end in (40, 41, 50):
        read(model, cache, ids[:, cache.get_seq_length() : end])
        failing = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="luck"):
            read(model, cache, ids[:, end : end + 9])
        failing.remove()
        assert cache.get_seq_length() == end and sum(stop - first for first, stop in cache.kept) <= WINDOW.context
    assert difference(read(model, cache, ids[:, 50:]), expected[:, 50:]) < TOLERANCE


def test_what_cannot_be_served_is_refused(store: LocalStore, seed: int) -> None:
    with pytest.raises(Unsupported, match="sliding windows"):
        windowed("mistral", store)[1]()
    with pytest.raises(Unsupported, match="sliding windows"):
        windowed("gemma3", store)[1]()
    model, make, _reuse = windowed("llama", store)
    ids, cache = prompt(12, seed, rows=2), make()
    with pytest.raises(BadInput, match="one sequence, not 2"):
        read(model, cache, ids)
    with pytest.raises(BadInput, match="one sequence, not 2"):
        model.generate(ids[:1], past_key_values=cache, max_new_tokens=2, num_beams=2)
    with pytest.raises(BadInput, match="no padding"):
        model(input_ids=ids[:1], attention_mask=torch.tensor([[0] + [1] * 11]), past_key_values=cache)
    with pytest.raises(BadInput, match="token ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64), past_key_values=cache)
    with pytest.raises(BadInput, match="read them all"):
        model(input_ids=ids[:1, :0], past_key_values=cache)
    assert cache.get_seq_length() == 0
    calls: list[tuple[Any, Any]] = [(cache.crop, -1), (cache.reorder_cache, ids), (cache.batch_repeat_interleave, 2)]
    for call, argument in calls:
        with pytest.raises(Unsupported, match="windowed conversation"):
            call(argument)
    with pytest.raises(BadInput, match="not joined to this cache"):
        build("llama")(input_ids=ids[:1], past_key_values=cache)
    assert read(model, cache, ids[:1]).shape[1] == 12  # none of it did harm


def test_beside_caches_of_the_store(store: LocalStore, seed: int) -> None:
    """The same model serves both, and when nobody holds it any more it listens no longer."""
    model, make, reuse = windowed("llama", store)
    ids = prompt(TOKENS, seed)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    cache = make()
    read(model, cache, ids)
    assert torch.equal(reuse.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert reuse.load(ids).cached_tokens != 0
    del make, reuse
    gc.collect()
    read(model, cache, ids)  # what can be read through hooks only keeps them
    del cache
    gc.collect()
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
