"""Conversations that outgrow their context, out of the store: every turn goes on where the one before ended."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import build, prompt
from hf_runs import BLOCK, attach, stored_prompt
from test_transformers_faults import LateStore

import kvstore
from kvstore import BadInput, Unsupported
from kvstore.adapters.transformers import Reuse
from kvstore.local import LocalStore
from kvstore.policies.overflow import Window, truncation

WINDOW = Window(40, sinks=4, step=6)
NEW, MORE = 26, 9  # tokens of an answer, and of what is said then


def conversation(model: Any, reuse: Any, policy: Window, seed: int, turns: int = 3) -> tuple[torch.Tensor, list[Any]]:
    """A conversation with one cache that is never stored: all token ids, and how long each turn's history was."""
    cache, history, lengths = reuse.window(policy), prompt(20, seed), []
    for turn in range(turns):
        if turn:
            history = torch.cat((history, prompt(MORE, seed + turn)), 1)
        lengths.append(history.shape[1])
        options = {"attention_mask": torch.ones_like(history), "max_new_tokens": NEW, "do_sample": False}
        history = model.generate(history, past_key_values=cache, **options)
    return history, lengths


def states(cache: Any) -> list[torch.Tensor]:
    return [state for layer in cache.stored for state in (*layer.originals(), layer.keys, layer.values)]


def read(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of what a cache has not read of ``ids``."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[:, cache.get_seq_length() :], past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "fusedkv"])
@pytest.mark.parametrize("policy", [WINDOW, truncation(40)], ids=["streaming", "truncation"])
def test_every_turn_goes_on_where_the_last_one_ended(family: str, policy: Window, store: LocalStore, seed: int) -> None:
    model, reuse = attach(family, store)
    expected, lengths = conversation(model, reuse, policy, seed)
    passes: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for turn, length in enumerate(lengths):
        history = expected[:, :length]
        assert reuse.load(history, overflow=policy).cached_tokens == (lengths[turn - 1] + NEW - 1 if turn else 0)
        passes.clear()
        out = reuse.generate(history, overflow=policy, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, expected[:, : length + NEW])
        assert sum(passes) == (MORE + 1 if turn else length) + NEW - 1  # nothing is computed twice
    plain = model.generate(history, attention_mask=torch.ones_like(history), max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        (1, "float32"),
        (39, "float32"),
        (40, "float32"),
        (41, "bfloat16"),
        (47, "float32"),
        (96, "float32"),
        (131, "bfloat16"),
    ],
)
def test_what_comes_back_is_what_was_there(tokens: int, dtype: str, quick: Path, seed: int) -> None:
    """The bytes of keys before and after rotation and of values, out of a disk that was opened again."""
    model, ids = build("llama", dtype), prompt(tokens + 1, seed)
    with kvstore.open(quick, host="32MiB", disk="64MiB") as store:
        reuse = Reuse(model, store, block_tokens=BLOCK)
        memory = reuse.load(ids[:, :tokens], overflow=WINDOW)
        read(model, memory.cache, ids[:, :tokens])
        assert reuse.save(ids[:, :tokens], memory.cache).wait().tokens == tokens - 40 * (tokens > 40)
    with kvstore.open(quick, host="32MiB", disk="64MiB") as store:
        again = Reuse(model, store, block_tokens=BLOCK)
        hit = again.load(ids, overflow=WINDOW)
        assert hit.cached_tokens == tokens and hit.cache.kept == memory.cache.kept and len(hit.timeline) == 3
        assert sum(hit.cached_by_tier.values()) >= sum(stop - first for first, stop in hit.cache.kept)
        wanted = states(memory.cache)
        assert all(torch.equal(*pair) for pair in zip(states(hit.cache), wanted, strict=True))
        assert torch.equal(read(model, hit.cache, ids), read(model, memory.cache, ids))  # bit for bit from here on


def test_the_first_tokens_are_a_chain_like_any_other(store: LocalStore, seed: int) -> None:
    """They serve, and are served by, prompts that know nothing of windows; what is behind them is the policy's own."""
    model, reuse = attach("llama", store)
    ids = prompt(70, seed)
    reuse.save(ids[:, :25], _read_plain(model, reuse, ids[:, :25]))
    hit = reuse.load(ids, overflow=WINDOW)
    assert hit.cached_tokens == 25
    read(model, hit.cache, ids)
    reuse.save(ids, hit.cache)
    assert reuse.load(ids).cached_tokens == 40
    found = {policy: reuse.load(ids, overflow=policy) for policy in (WINDOW, Window(40, 4, 5), Window(40, 3, 6))}
    assert [hit.cached_tokens for hit in found.values()] == [69, 40, 40]
    assert [hit.miss.kind for hit in found.values()] == ["complete", "parts", "parts"]
    assert "at token 40" in str(found[Window(40, 4, 5)].miss)
    assert reuse.load(ids, overflow=Window(60, 4, 6)).cached_tokens == 40  # its first chain is longer
    assert reuse.load(ids, overflow=Window(30, 4, 6)).cached_tokens == 30
    assert reuse.load(ids, overflow=WINDOW, tenant="other").cached_tokens == 0
    other = ids.clone()
    other[0, 7] += 1  # long dropped, but it was seen
    assert reuse.load(other, overflow=WINDOW).cached_tokens == 7


def _read_plain(model: Any, reuse: Any, ids: torch.Tensor) -> Any:
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
    return hit.cache


@pytest.mark.parametrize("stored", [38, 40, 52, 75])
def test_a_long_new_part_goes_on_from_all_that_is_stored(stored: int, store: LocalStore, seed: int) -> None:
    """Also when what would be kept in the end begins behind all that is stored."""
    model, reuse = attach("llama", store)
    ids = prompt(150, seed)
    expected = read(model, reuse.window(WINDOW), ids)
    hit = reuse.load(ids[:, :stored], overflow=WINDOW)
    read(model, hit.cache, ids[:, :stored])
    reuse.save(ids[:, :stored], hit.cache)
    hit = reuse.load(ids, overflow=WINDOW)
    assert hit.cached_tokens == stored
    assert float((read(model, hit.cache, ids) - expected[:, stored:]).abs().max()) < 1e-4


def test_a_conversation_in_use_stays(seed: int) -> None:
    """Also what it dropped long ago, as long as there is no other way to what it kept."""
    with kvstore.open(host="1MiB") as store:
        model, reuse = attach("llama", store)
        ids = prompt(400, seed)
        hit = reuse.load(ids, overflow=WINDOW)
        read(model, hit.cache, ids)
        reuse.save(ids, hit.cache)
        for number in range(1, 13):
            stored_prompt(model, reuse, 160, seed + number)
            assert reuse.load(ids, overflow=WINDOW).cached_tokens == 399
        assert reuse.load(prompt(160, seed + 1)).cached_tokens < 159  # what was used less had to go


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_that_does_not_come_costs_time_only(layer: int, store: LocalStore, seed: int) -> None:
    late = LateStore(store)
    model, reuse = attach("llama", late)
    ids = prompt(90, seed)
    expected = reuse.generate(ids, overflow=WINDOW, max_new_tokens=8, do_sample=False)
    assert reuse.load(ids, overflow=WINDOW).cached_tokens == 89
    late.layer = layer
    hit = reuse.load(ids, overflow=WINDOW)
    assert (hit.cached_tokens, hit.cached_by_tier) == (0, {})
    assert torch.equal(model.generate(**hit.inputs, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(reuse.generate(ids, overflow=WINDOW, max_new_tokens=8, do_sample=False), expected)
    late.layer = None
    assert reuse.load(expected, overflow=WINDOW).cached_tokens == 97


def test_a_cache_goes_on_after_it_was_saved(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(120, seed)
    hit = reuse.load(ids[:, :30], overflow=WINDOW)
    for end in (30, 39, 58, 58, 59, 111):
        if end > hit.cache.get_seq_length():
            read(model, hit.cache, ids[:, :end])
        reuse.save(ids[:, :end], hit.cache)
        assert reuse.load(ids[:, : end + 1], overflow=WINDOW).cached_tokens == end


def test_what_was_not_read_is_not_saved(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(70, seed)
    hit = reuse.load(ids, overflow=WINDOW)
    read(model, hit.cache, ids)
    other = ids.clone()
    other[0, 60] += 1
    with pytest.raises(BadInput, match="differs at token 60"):
        reuse.save(other, hit.cache)
    with pytest.raises(BadInput, match="tenant"):
        reuse.save(ids, hit.cache, tenant="other")
    with pytest.raises(BadInput, match="hit of this Reuse"):
        reuse.save(ids, reuse.window(WINDOW))
    assert reuse.load(ids, overflow=WINDOW).cached_tokens == 0
    assert reuse.save(ids[:, :50], hit.cache).tokens == 10  # of the chain behind the first 40
    assert reuse.load(ids, overflow=WINDOW).cached_tokens == 50


def test_a_pass_that_fails_ends_the_recording(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(70, seed)
    hit = reuse.load(ids, overflow=WINDOW)
    read(model, hit.cache, ids[:, :45])

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    failing = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="luck"):
        read(model, hit.cache, ids)
    failing.remove()
    read(model, hit.cache, ids)
    reuse.save(ids, hit.cache)
    assert reuse.load(ids, overflow=WINDOW).cached_tokens == 45


def test_a_changed_model_neither_reuses_nor_records(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(60, seed)
    reuse.generate(ids, overflow=WINDOW, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(0.01)
    hit = reuse.load(ids, overflow=WINDOW)
    assert hit.cached_tokens == 0 and hit.miss.kind == "changed"
    read(model, hit.cache, ids)
    assert "refresh" in reuse.save(ids, hit.cache).refused
    assert store.stats()["drafts"] == 0


def test_what_cannot_be_served_is_refused(store: LocalStore, seed: int) -> None:
    _, reuse = attach("llama", store)
    ids = prompt(60, seed, rows=2)
    with pytest.raises(Unsupported, match="one sequence, not 2"):
        reuse.load(ids, overflow=WINDOW)
    for extra in ({"discover": 32}, {"mode": "modular"}, {"segments": [[1], [2]]}):
        given = () if "segments" in extra else (ids[:1],)
        with pytest.raises(BadInput, match="plain token ids"):
            reuse.load(*given, overflow=WINDOW, **extra)
    with pytest.raises(BadInput, match="one sequence, not 2"):
        reuse.generate(ids[:1], overflow=WINDOW, max_new_tokens=2, num_beams=2)
    with pytest.raises(Unsupported, match="sliding windows"):
        attach("mistral", store)[1].load(ids[:1], overflow=WINDOW)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids[:1]), 1)
    out = reuse.generate(padded, (padded > 0).long(), overflow=WINDOW, max_new_tokens=3, do_sample=False)
    alone = reuse.generate(ids[:1], overflow=WINDOW, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == 66 and torch.equal(out[:, 3:], alone)  # padding at an end is left out
