"""A model that is no longer the one that was attached misses and saves nothing; two models never meet."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_models import build, prompt
from hf_runs import go_on, leases_left
from transformers import DynamicCache

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.local import LocalStore

BLOCK = 16


def read(model: Any, reuse: Any, ids: torch.Tensor) -> Any:
    """A hit whose prompt has been read."""
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
    return hit


def optimizer_step(model: Any) -> None:
    parameter = model.get_decoder().layers[1].mlp.down_proj.weight
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def data_write(model: Any) -> None:
    model.get_decoder().layers[0].self_attn.v_proj.weight.data.mul_(1.01)  # bumps no version


def swapped_tensor(model: Any) -> None:
    weight = model.get_decoder().layers[2].self_attn.k_proj.weight
    weight.data = weight.data.clone()


def other_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def buffer_write(model: Any) -> None:
    model.get_decoder().rotary_emb.inv_freq[0] += 0.5


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "optimizer step": (optimizer_step, "weights changed"),
    "data write": (data_write, "weights changed"),
    "swapped tensor": (swapped_tensor, "weights changed"),
    "buffer": (buffer_write, "inv_freq"),
    "attention": (other_attention, "attention implementation changed from sdpa to eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_misses_and_is_not_saved(store: LocalStore, change: str, seed: int) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    ids = prompt(40, seed)
    reuse.save(ids, read(model, reuse, ids).cache)
    assert reuse.load(ids).cached_tokens == 39
    longer = torch.cat((ids, prompt(5, seed + 1)), 1)
    before = read(model, reuse, longer)
    apply, words = CHANGES[change]
    apply(model)
    saved = reuse.save(longer, before.cache)
    assert saved.tokens == 0
    assert words in str(saved.refused)
    assert saved.wait().tokens == 0
    hit = reuse.load(longer)
    assert hit.cached_tokens == 0
    assert hit.miss.kind == "changed"
    assert words in str(hit.miss)
    # It still generates, as the model is now.
    out = model.generate(**hit.inputs, max_new_tokens=8, do_sample=False)
    plain = model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=8, do_sample=False)
    assert torch.equal(out, plain)
    assert words in str(reuse.save(out, hit.cache).refused)
    reuse.refresh()
    hit = reuse.load(longer)
    if change in ("attention", "swapped tensor"):  # the same keys and values, so the same fingerprint
        assert hit.cached_tokens == 40
    else:
        assert hit.cached_tokens == 0
        assert hit.miss.field == ("rope" if change == "buffer" else "weights")


def test_a_hit_from_before_a_refresh_is_not_saved(store: LocalStore, seed: int) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    ids = prompt(40, seed)
    hit = read(model, reuse, ids)
    optimizer_step(model)
    reuse.refresh()
    assert "refreshed" in str(reuse.save(ids, hit.cache).refused)
    assert reuse.load(ids).cached_tokens == 0


def test_an_unchanged_model_is_not_called_changed(store: LocalStore, seed: int) -> None:
    """Negative control: training mode, gradients, hooks and a forward pass are no change."""
    model = build("gemma3")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    ids = prompt(40, seed)
    hit = read(model, reuse, ids)
    model.train()
    model(ids).logits.sum().backward()
    model.eval()
    model.zero_grad()
    assert reuse.save(ids, hit.cache).tokens == 40
    assert reuse.load(ids).cached_tokens == 39


def test_adapters_have_their_own_keys(store: LocalStore, seed: int) -> None:
    base = build("llama")
    plain_reuse = Reuse(base, store, block_tokens=BLOCK)
    ids = prompt(40, seed)
    plain_reuse.save(ids, read(base, plain_reuse, ids).cache)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    assert "adapters" in str(plain_reuse.load(ids).miss)
    reuse = Reuse(model, store, block_tokens=BLOCK)
    hit = read(model, reuse, ids)
    assert hit.cached_tokens == 0
    assert hit.miss.field == "adapters"
    reuse.save(ids, hit.cache)
    assert reuse.load(ids).cached_tokens == 39
    model.set_adapter("two")
    assert "adapters" in str(reuse.load(ids).miss)
    model.set_adapter("one")
    assert reuse.load(ids).cached_tokens == 39  # and back again it is the same model
    with model.disable_adapter():
        assert reuse.load(ids).cached_tokens == 0
    model.set_adapter("two")
    reuse.refresh()
    assert reuse.load(ids).miss.field == "adapters"
    model.merge_adapter()
    hit = reuse.load(ids)
    assert hit.cached_tokens == 0
    out = model.generate(**hit.inputs, max_new_tokens=4, do_sample=False)
    assert reuse.save(out, hit.cache).refused


def test_two_models_at_once_share_nothing(store: LocalStore, seed: int) -> None:
    """Same architecture, same module globals, other weights; used in turns and in two threads."""
    models = [build("llama", seed=1), build("llama", seed=2), build("gemma3", seed=3)]
    reuses = [Reuse(model, store, block_tokens=BLOCK) for model in models]
    ids = prompt(40, seed)
    failures: list[str] = []

    def talk(number: int) -> None:
        model, reuse = models[number], reuses[number]
        history, memory = ids, DynamicCache(config=model.config)
        for turn in range(4):
            with torch.no_grad():
                hit = reuse.load(history)
                if hit.cached_tokens != memory.get_seq_length():
                    failures.append(f"model {number} turn {turn}: {hit.cached_tokens} cached, {hit.miss}")
                rest = history[:, memory.get_seq_length() :]
                mine, theirs = go_on(model, hit.cache, rest, 5), go_on(model, memory, rest, 5)
            if not torch.equal(mine[0], theirs[0]):
                failures.append(f"model {number} turn {turn}: logits differ")
            read_ids = torch.cat((history, mine[1][:, :-1]), 1)
            reuse.save(read_ids, hit.cache)
            history = torch.cat((read_ids, mine[1][:, -1:], prompt(7, seed + turn)), 1)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    crossed = reuses[1].load(torch.cat((ids, ids), 1))
    with torch.no_grad():
        models[0](**crossed.forward_inputs)  # a cache of one model in another
    assert reuses[1].save(ids, crossed.cache).new_tokens == 0


def test_a_thousand_abandoned_hits_leave_nothing(store: LocalStore, seed: int) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    ids = prompt(40, seed)
    reuse.save(ids, read(model, reuse, ids).cache)
    longer = torch.cat((ids, prompt(3, seed + 1)), 1)
    gc.disable()  # they must go without the collector's help
    try:
        for number in range(1000):
            hit = reuse.load(longer)
            if number % 20 == 0:
                with torch.no_grad():
                    model(**hit.forward_inputs)
            assert leases_left(store) == (0 if number % 20 == 0 else 3)
        del hit
        assert leases_left(store) == 0
        assert store.stats()["drafts"] == 0
    finally:
        gc.enable()


def test_a_dropped_reuse_leaves_the_model_as_it_was(store: LocalStore, seed: int) -> None:
    model = build("llama").train()
    module = type(model.get_decoder().layers[0].self_attn).forward.__globals__
    original = module["apply_rotary_pos_emb"]
    state = torch.get_rng_state()
    reuse = Reuse(model, store, block_tokens=BLOCK)
    assert model.training
    assert all(child.training for child in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert module["apply_rotary_pos_emb"] is not original
    decoder = model.get_decoder()
    assert decoder._forward_pre_hooks
    del reuse
    gc.collect()
    assert module["apply_rotary_pos_emb"] is original
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks
    assert not model.get_decoder().rotary_emb._forward_hooks


def test_a_checkpoint_is_known_again_however_it_is_split(tmp_path: Path, seed: int) -> None:
    model = build("qwen3", seed=5)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "split", max_shard_size="40KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 3
    kind = type(model)
    prints = {}
    with kvstore.open(host="16MiB") as store:
        memory = Reuse(model, store, block_tokens=BLOCK)
        for name in ("whole", "split"):
            loaded = kind.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
            prints[name] = Reuse(loaded, store, block_tokens=BLOCK).fingerprint
            again = Reuse(kind.from_pretrained(tmp_path / name, dtype=torch.float32).eval(), store)
            assert again.fingerprint.digest == prints[name].digest
        assert memory.fingerprint.differs(prints["whole"]) == []
        assert prints["whole"].differs(prints["split"]) == []
        half = kind.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16).eval()
        assert Reuse(half, store).fingerprint.differs(prints["whole"]) == ["dtype"]
        changed = kind.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
        with torch.no_grad():
            changed.get_decoder().layers[0].mlp.up_proj.weight[0, 0] += 1
        assert Reuse(changed, store).fingerprint.differs(prints["whole"]) == ["weights"]
        given = Reuse(model, store, fingerprint="my model, version 3")
        assert given.fingerprint.components == {"given": "my model, version 3"}
