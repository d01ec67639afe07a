"""Loads by way of the device tier, in plain memory: the code that CUDA runs, but for the streams' own nature."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_models import build, prompt
from hf_runs import BLOCK, FIRST, SECOND, first_turn, go_on, leases_left, second_turn, stored_prompt
from staged import staging_of
from transformers import DynamicCache

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.staging import StagedBlock
from kvstore.local import LocalStore
from kvstore.tensors import carrier
from kvstore.tensors.carrier import Carrier, groups

CASES = [(family, dtype) for family in ("llama", "gemma3", "phi3", "neox") for dtype in ("float32", "bfloat16")]
CASES += [("deepseek_v2", "bfloat16"), ("fusedkv", "float32")]


@pytest.fixture(params=["64MiB", None], ids=["with a tier", "without"])
def store(request: pytest.FixtureRequest) -> Iterator[LocalStore]:
    with kvstore.open(host="64MiB", device=request.param, device_name="cpu") as store:
        yield store
        assert leases_left(store) == 0


@pytest.fixture
def streams() -> Iterator[Carrier]:
    streams = Carrier(torch.device("cpu"))
    yield streams
    streams.close()


def by_way_of(streams: Carrier, model: Any, store: LocalStore) -> Reuse:
    """A model whose loads go by way of the device."""
    reuse = Reuse(model, store, block_tokens=BLOCK)
    reuse._joined.carrier = streams
    return reuse


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_going_on_gives_the_bits_of_going_on_in_memory(
    store: LocalStore, streams: Carrier, family: str, dtype: str, seed: int
) -> None:
    model = build(family, dtype)
    reuse = by_way_of(streams, model, store)
    ids, hit, memory = first_turn(model, reuse, seed)
    reuse.save(ids, hit.cache)
    expected = go_on(model, memory, prompt(SECOND, seed + 1))
    for _ in range(3):  # from memory, then from the device as far as it has room
        cached, logits, tokens = second_turn(model, reuse, ids, seed)
        assert cached == FIRST
        assert torch.equal(logits, expected[0]) and torch.equal(tokens, expected[1])


def test_what_was_loaded_stays_on_the_device(streams: Carrier, seed: int) -> None:
    with kvstore.open(host="64MiB", device="64MiB", device_name="cpu") as store:
        model = build("llama")
        reuse = by_way_of(streams, model, store)
        ids = stored_prompt(model, reuse, 100, seed)
        tiers = []
        for _ in range(3):
            hit = reuse.load(torch.cat((ids, ids[:, :5]), 1))
            tiers.append(hit.cached_by_tier)
            model(**hit.forward_inputs)
        assert tiers[0] == {"device": 0, "host": 100, "disk": 0, "remote": 0}
        assert tiers[1:] == [{"device": 100, "host": 0, "disk": 0, "remote": 0}] * 2
        held = store.stats()["tiers"]["device"]
        assert held["blocks"] == 7 and held["bytes"] > 0
        store.forget(tenant="")
        assert store.stats()["tiers"]["device"]["blocks"] == 0
        assert reuse.load(ids).cached_tokens == 0


def test_rows_of_a_batch(store: LocalStore, streams: Carrier, seed: int) -> None:
    model = build("llama")
    reuse, plain = by_way_of(streams, model, store), Reuse(model, store, block_tokens=BLOCK)
    rows = [prompt(length, seed + length)[0].tolist() for length in (40, 9, 25)]
    reuse.generate(rows, max_new_tokens=4, do_sample=False)
    expected = plain.generate(rows, max_new_tokens=12, do_sample=False, tenant="")
    assert torch.equal(reuse.generate(rows, max_new_tokens=12, do_sample=False), expected)
    beams: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(reuse.generate(rows[0], **beams), plain.generate(rows[0], **beams))


def test_a_hit_that_is_dropped_half_way_leaves_nothing_behind(store: LocalStore, streams: Carrier, seed: int) -> None:
    model = build("llama")
    reuse = by_way_of(streams, model, store)
    ids = stored_prompt(model, reuse, 100, seed)
    for _ in range(20):
        hit = reuse.load(torch.cat((ids, ids[:, :5]), 1))
        hit.cache.layers[0].fetch(torch.empty(0))
        del hit
    streams.turns.record().wait()
    streams.copies.record().wait()
    hit = reuse.load(torch.cat((ids, ids[:, :5]), 1))
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=memory, use_cache=True)
        expected = model(input_ids=ids[:, :5], past_key_values=memory, use_cache=True).logits
        assert torch.equal(model(**hit.forward_inputs).logits, expected)


def test_small_layers_are_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = kvstore.Layout.uniform(layers=7, heads=2, dim=64, dtype="bfloat16", block_tokens=256)  # 128 KiB a layer
    monkeypatch.setattr(carrier, "COPY_BYTES", 256 << 10)
    monkeypatch.setattr(carrier, "FIRST_BYTES", 1)
    assert groups(layout) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    monkeypatch.setattr(carrier, "COPY_BYTES", 1)
    assert groups(layout) == [(layer, layer + 1) for layer in range(7)]
    monkeypatch.setattr(carrier, "FIRST_BYTES", 1 << 20)  # of eight blocks: one layer, two layers, no more
    monkeypatch.setattr(carrier, "MOST_BYTES", 2 << 20)
    assert groups(layout, 8) == [(0, 1), (1, 3), (3, 5), (5, 7)]
    assert groups(layout, 1) == [(0, 7)]


@pytest.mark.parametrize("new", [1, 3], ids=["a token", "some tokens"])
def test_a_full_block_in_which_a_prompt_goes_on_is_brought_at_once(
    store: LocalStore, streams: Carrier, seed: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    reuse = by_way_of(streams, model, store)
    staging = reuse._joined.staging = staging_of(reuse.layout, torch.float32, "cpu")
    tokens = 3 * BLOCK
    for _ in range(2):  # from memory, then from the device where there is a tier
        ids = stored_prompt(model, reuse, tokens, seed)
        other = torch.cat((ids[:, :-1], prompt(new, seed + 1)), 1)
        memory = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=memory, use_cache=True)
            memory.crop(-1)
            model(input_ids=other[:, tokens - 1 :], past_key_values=memory, use_cache=True)
            expected = model(input_ids=ids[:, :5], past_key_values=memory, use_cache=True).logits
            monkeypatch.setattr(StagedBlock, "seed", None)  # nothing comes layer by layer
            hit = reuse.load(other)
            assert hit.cached_tokens == tokens - 1
            model(**hit.forward_inputs)
            reuse.save(other, hit.cache).wait()
            monkeypatch.undo()
            hit = reuse.load(torch.cat((other, ids[:, :5]), 1))
            assert hit.cached_tokens == other.shape[1]
            assert torch.equal(model(**hit.forward_inputs).logits, expected)
        seed += 2
    staging.close()
