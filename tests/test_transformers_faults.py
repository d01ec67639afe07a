"""What fails below while the model is in its forward pass costs time, never a wrong logit, never an exception."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY, build, prompt
from hf_runs import go_on, leases_left
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.local import LocalStore

BLOCK = 16
LAYERS = 3


class LateLoad:
    """A load of the store of which one layer and those behind it do not arrive in time."""

    def __init__(self, load: Any, layer: int) -> None:
        self._load, self._layer = load, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load, name)

    def wait(self, layer: int, timeout: float | None = None) -> bool:
        return layer < self._layer and self._load.wait(layer, timeout)


class LateStore:
    """A store whose loads are late from ``layer`` on."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.layer: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def load(self, match: Any, device: bool = False) -> Any:
        load = self._store.load(match)
        return load if self.layer is None else LateLoad(load, self.layer)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", ["llama", "gemma3", "neox", "deepseek_v3", "cla", "fusedkv"])
def test_a_layer_that_is_late_is_computed_again(store: LocalStore, family: str, layer: int, seed: int) -> None:
    model, late = build(family), LateStore(store)
    reuse = Reuse(model, late, block_tokens=BLOCK)  # type: ignore[arg-type]
    ids, more = prompt(45, seed), prompt(7, seed + 1)
    hit, memory = reuse.load(ids), DynamicCache(config=model.config)
    with torch.no_grad():
        model(**hit.forward_inputs)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory, use_cache=True)
    reuse.save(ids, hit.cache)
    late.layer = layer
    hit = reuse.load(torch.cat((ids, more), 1))
    assert hit.cached_tokens == 45
    logits, tokens = go_on(model, hit.cache, more, 8)
    expected = go_on(model, memory, more, 8)
    # The prompt was read in one piece then and now, so even the bits are the same.
    assert torch.equal(logits, expected[0])
    assert torch.equal(tokens, expected[1])
    assert hit.cache.loaded.recomputed == LAYERS - layer
    # Nothing is recorded on top of a mixture; what was stored stays.
    saved = reuse.save(torch.cat((ids, more, tokens), 1), hit.cache)
    assert (saved.tokens, saved.new_tokens) == (45, 0)
    assert "computed again" in str(hit.cache.recorder.rows[0].ended)


def test_a_batch_with_a_late_layer(store: LocalStore, seed: int) -> None:
    model, late = build("llama"), LateStore(store)
    reuse = Reuse(model, late, block_tokens=BLOCK)  # type: ignore[arg-type]
    rows = [prompt(length, seed + length)[0].tolist() for length in (40, 9, 25)]
    expected = reuse.generate(rows, max_new_tokens=8, do_sample=False)
    late.layer = 1
    hit = reuse.load(rows)
    assert hit.cached_tokens == [39, 8, 24]
    out = model.generate(**hit.inputs, max_new_tokens=8, do_sample=False)
    assert hit.cache.loaded.recomputed == LAYERS - 1
    assert torch.equal(out[:, -8:], expected[:, -8:])


def large_heads() -> Any:
    """A model whose layers take 2 MiB in a block, so that each is read from disk on its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=128,
            initializer_range=0.1,
            max_position_embeddings=1024,
        )
        return LlamaForCausalLM(config).eval()


def flip(folder: Path, pattern: bytes) -> int:
    """Flip one bit of each place in the slabs where these bytes are; how many places."""
    found = 0
    for path in sorted(folder.rglob("*.slab")):
        data = bytearray(path.read_bytes())
        place = data.find(pattern)
        while place >= 0:
            data[place + len(pattern) // 2] ^= 16
            found += 1
            place = data.find(pattern, place + 1)
        path.write_bytes(data)
    return found


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_flipped_bit_on_disk_at_each_layer(tmp_path: Path, layer: int, seed: int) -> None:
    model = large_heads()
    ids, more = prompt(300, seed), prompt(7, seed + 1)
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory, use_cache=True)
        expected = model(input_ids=more, past_key_values=memory, use_cache=True).logits
    with kvstore.open(tmp_path / "cache", host="64MiB", disk="64MiB") as store:
        reuse = Reuse(model, store)
        hit = reuse.load(ids)
        with torch.no_grad():
            model(**hit.forward_inputs)
        pattern = bytes(hit.cache.recorder.rows[0]._blocks[0].draft.layer(layer)[0][4096:6144])
        assert reuse.save(ids, hit.cache).wait().tokens == 300
    assert flip(tmp_path / "cache", pattern) == 1
    with kvstore.open(tmp_path / "cache", host="64MiB", disk="64MiB") as store:
        reuse = Reuse(model, store)
        hit = reuse.load(torch.cat((ids, more), 1))
        with torch.no_grad():
            logits = model(**hit.forward_inputs).logits[:, -7:]
        assert torch.allclose(logits, expected, atol=1e-3)
        counters = store.stats()["counters"]
        assert counters["corrupt_blocks"] == 1
        # Either the load was cut in time, or the layers were computed again.
        assert hit.cached_tokens == 0 or hit.cache.loaded.recomputed >= LAYERS - layer
        reuse.save(torch.cat((ids, more), 1), hit.cache)
        del hit
        healed = reuse.generate(torch.cat((ids, more), 1), max_new_tokens=4, do_sample=False)
        assert reuse.load(healed).cached_tokens == 310
    with kvstore.open(tmp_path / "cache", host="64MiB", disk="64MiB") as store:
        assert store.verify() == []


def test_no_memory_for_recording_ends_the_save_early(seed: int) -> None:
    model = large_heads()
    with kvstore.open(host="16MiB") as store:
        reuse = Reuse(model, store)
        ids = prompt(900, seed)
        out = reuse.generate(ids, max_new_tokens=4, do_sample=False)
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert torch.equal(out, plain)
        cached = reuse.load(out).cached_tokens
        assert cached in (256, 512)  # 6 MiB a block
        assert torch.equal(reuse.generate(ids, max_new_tokens=4, do_sample=False), plain)
        assert leases_left(store) == 0
        assert store.stats()["drafts"] == 0


def test_memory_that_ends_behind_the_tail_leaves_a_whole_tail(seed: int) -> None:
    """The block that continues what was loaded begins with the loaded originals, whatever happens behind it."""
    model = large_heads()
    ids = prompt(700, seed)
    with kvstore.open(host="16MiB") as store:
        reuse = Reuse(model, store)
        reuse.generate(ids[:, :100], max_new_tokens=1, do_sample=False)
        hit = reuse.load(ids)
        assert hit.cached_tokens == 100
        with torch.no_grad():
            model(**hit.forward_inputs)
        assert "memory" in str(hit.cache.recorder.rows[0].ended)
        assert reuse.save(ids, hit.cache).tokens == 256
        del hit
        again = reuse.load(ids[:, :270])
        assert again.cached_tokens == 256
        with torch.no_grad():
            got, expected = model(**again.forward_inputs).logits, model(ids[:, :270]).logits[:, 256:]
        assert torch.allclose(got, expected, atol=1e-3)


def test_an_interrupted_forward_pass_is_not_recorded(store: LocalStore, seed: int) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    ids = prompt(20, seed)
    hit = reuse.load(ids)

    def interrupt(*_: Any) -> None:
        raise InterruptedError("in layer 1")

    handle = model.get_decoder().layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(InterruptedError), torch.no_grad():
        model(**hit.forward_inputs)
    handle.remove()
    assert reuse.save(ids, hit.cache).tokens == 0
    # The next hit listens as ever.
    out = reuse.generate(ids, max_new_tokens=4, do_sample=False)
    assert reuse.load(out).cached_tokens == 23
