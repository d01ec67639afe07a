"""Models whose cache holds only some layers: blocks hold those, and the model's own layer numbers stay its own."""

import copy
from typing import Any

import pytest
import torch
from hf_models import GROUPED, build, prompt
from hf_runs import BLOCK, in_memory, stored_prompt
from transformers import DynamicCache

from kvstore import Unsupported
from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM
from kvstore.adapters.fusedkv import attention as fused_attention
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.capture import NEAREST
from kvstore.adapters.transformers.recompute import nested_prefill
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.local import LocalStore
from kvstore.plan import PLANS, read

LAYERS = 5
CUSTOM = [
    None,
    {"keys": [0], "values": [0], "weighted": False},
    {"keys": [0], "values": [0], "weighted": False},
    None,
    {"keys": [0, 3], "values": [3], "weighted": True},
]
STORED, MORE = 45, 7


def model_of(plan: Any, **config: Any) -> Any:
    """A seeded model of a plan."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = FusedKVConfig(**{**GROUPED, "num_hidden_layers": LAYERS, **config}, kv_plan=plan)
        return FusedKVForCausalLM(made).eval()


def attached(plan: Any, store: LocalStore, **config: Any) -> tuple[Any, Reuse]:
    model = model_of(plan, **config)
    return model, Reuse(model, store, block_tokens=BLOCK)


def named(layers: Any) -> list[str]:
    return [type(layer).__name__.replace("LazyLayer", "DynamicLayer") for layer in layers]


@pytest.mark.parametrize("plan", [*PLANS, CUSTOM], ids=lambda plan: plan if isinstance(plan, str) else "custom")
def test_every_plan_goes_on_bit_for_bit(store: LocalStore, plan: Any, seed: int) -> None:
    model, reuse = attached(plan, store)
    assert reuse.plan == read(plan, LAYERS)
    assert len(reuse.layout.layers) == len(reuse.plan.stored)
    assert isinstance(reuse.fingerprint.components["layer_plan"], str)
    assert (reuse.fingerprint.components["layer_plan"] == "standard") == (plan == "standard")
    assert reuse.supports == {"exact", "shifted", "modular"}
    ids, more = stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)
    hit = reuse.load(torch.cat((ids, more), 1))
    assert hit.cached_tokens == STORED
    assert named(hit.cache.layers) == named(DynamicCache(config=model.config).layers)
    with torch.no_grad():
        assert torch.equal(model(**hit.forward_inputs).logits, in_memory(model, ids, more))
    assert reuse.save(torch.cat((ids, more), 1), hit.cache).tokens == STORED + MORE


def test_a_copy_of_the_cache_has_the_same_layers(store: LocalStore, seed: int) -> None:
    model, reuse = attached("cla", store)
    ids, more = stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)
    hit = reuse.load(torch.cat((ids, more), 1))
    twin = copy.deepcopy(hit.cache)
    assert [keys is None for keys, _, _ in hit.cache] == hit.cache.is_dummy == [False, True, False, True, False]
    assert twin.is_dummy == hit.cache.is_dummy and twin.get_seq_length() == STORED
    hit.cache.batch_repeat_interleave(2)  # what is copied is not touched
    with torch.no_grad():
        logits = model(input_ids=more, past_key_values=twin, use_cache=True).logits
    assert torch.equal(logits, in_memory(model, ids, more))


@pytest.mark.parametrize("plan", ["yoco", "cla"])
def test_computing_again_leaves_early(store: LocalStore, plan: str, seed: int) -> None:
    model, reuse = attached(plan, store)
    ids = stored_prompt(model, reuse, STORED, seed)
    hit = reuse.load(torch.cat((ids, ids[:, :1]), 1))
    memory, tokens = DynamicCache(config=model.config), [0] * LAYERS
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, number=number: tokens.__setitem__(number, args[0].shape[1]))
        for number, layer in enumerate(model.model.layers)
    ]
    pairs = nested_prefill(reuse._decoder, reuse._config, hit.plan, hit.plan.columns, reuse._joined.attached.specs)()
    for hook in hooks:
        hook.remove()
    last = reuse.plan.stored[-1]
    assert tokens == [STORED] * last + [1] * (LAYERS - last)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=memory, use_cache=True)
    assert len(pairs) == len(reuse.plan.stored)
    for number, (keys, values) in zip(reuse.plan.stored, pairs, strict=True):
        layer = memory.layers[number]
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values), number


@pytest.mark.parametrize("plan", ["cla", "yoco", CUSTOM], ids=["cla", "yoco", "custom"])
def test_queries_that_are_heard_are_not_kept(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, plan: Any, seed: int
) -> None:
    """A model that rotates the queries of rebuilt layers by the function that rotates keys."""
    rotary = "apply_rotary_pos_emb"  # looked up at each call, because it is wrapped later
    monkeypatch.setattr(fused_attention, "turned", lambda *args: getattr(fused_attention, rotary)(*args))
    model, reuse = attached(plan, store, num_hidden_layers=5)
    kept: list[int] = []
    finish = Recorder.finish

    def counted(self: Recorder) -> None:
        kept.append(len(self.calls))
        finish(self)

    monkeypatch.setattr(Recorder, "finish", counted)
    ids, more = stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)
    hit = reuse.load(torch.cat((ids, more), 1))
    assert hit.cached_tokens == STORED and hit.cache.recorder.calls.maxlen == NEAREST
    with torch.no_grad():
        assert torch.equal(model(**hit.forward_inputs).logits, in_memory(model, ids, more))
    assert set(kept) == {0}  # nothing above the last stored layer


def test_plans_that_are_the_same_share_and_others_do_not(store: LocalStore) -> None:
    listed = [read("cla", LAYERS).to_list(), read("yoco", LAYERS).to_list()]
    prints = [attached(plan, store)[1].fingerprint for plan in ("cla", listed[0], "yoco", listed[1])]
    assert prints[0].digest == prints[1].digest and prints[2].digest == prints[3].digest
    assert "layer_plan" in prints[0].differs(prints[2])


def test_a_configuration_that_contradicts_itself_is_refused(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("cla")
    given: list[Any] = [None, [None] * LAYERS, [None, None, None, "reuse", "reuse"]]
    for modes in given:
        monkeypatch.setattr(FusedKVConfig, "kv_sharing_modes", modes)
        with pytest.raises(Unsupported, match=r"rebuilds \[1, 3\].*they must be the same"):
            Reuse(model, store)


def test_layers_that_share_without_a_plan_are_refused(store: LocalStore) -> None:
    model = build("llama")
    model.config.kv_sharing_modes = [None, "store", "reuse"]
    with pytest.raises(Unsupported, match="share keys and values cannot be served yet"):
        Reuse(model, store)


def test_windows_with_a_plan_are_refused(store: LocalStore) -> None:
    model = model_of("cla")
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    model.config.sliding_window = 24
    with pytest.raises(Unsupported, match="full attention only"):
        Reuse(model, store)


def test_a_layer_that_uses_the_cache_against_the_plan_is_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the attach test: the plan says that a layer is stored, and the model gives it nowhere."""
    model = model_of("cla")
    monkeypatch.setattr(type(model.model.layers[2]), "number", property(lambda _: 0), raising=False)
    with pytest.raises(Unsupported, match=r"use the cache; those of the layer plan, \[0, 2, 4\], must"):
        Reuse(model, store)
