"""The attach test serves what it can prove and refuses the rest with the reason."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hf_models import FAMILIES, GROUPED, SHAPE, build, prompt
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

import kvstore
from kvstore import Unsupported
from kvstore.adapters.transformers import Reuse
from kvstore.local import LocalStore

BLOCK = 16
ROPE = {"rope_theta": 10000.0}
LONG = {"rope_type": "longrope", **ROPE, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG |= {"original_max_position_embeddings": 64}


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="64MiB") as store:
        yield store


def made(kind: str, **config: Any) -> Any:
    """A model of a class of transformers, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config)).eval()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "learned positions": ("OPT", {**SHAPE, "ffn_dim": 96, "word_embed_proj_dim": 64}, "no rotary embedding"),
    "alibi": ("Bloom", {"vocab_size": 211, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "no rotary embedding"),
    "gptj": ("GPTJ", {"vocab_size": 211, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "gptj"),
    "recurrent": (
        "Mamba2",
        {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "n_groups": 1},
        "LinearAttentionLayer",
    ),
    "hybrid": (
        "Jamba",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
        "LinearAttentionLayer",
    ),
    "norm after rotation": ("HunYuanDenseV1", {**GROUPED, "head_dim": 16}, "before rotation"),
    "dynamic": ("Llama", {**GROUPED, "rope_parameters": {"rope_type": "dynamic", **ROPE, "factor": 2.0}}, "dynamic"),
    "longrope": ("Llama", {**GROUPED, "rope_parameters": LONG}, "longrope"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(store: LocalStore, case: str) -> None:
    kind, config, words = REFUSED[case]
    model = made(kind, **config)
    with pytest.raises(Unsupported, match=words):
        Reuse(model, store)


def test_chunked_attention_and_llama4_are_refused(store: LocalStore) -> None:
    config = transformers.Llama4TextConfig(
        **{**GROUPED, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16}
    )
    with pytest.raises(Unsupported, match="llama4"):
        Reuse(transformers.Llama4ForCausalLM(config).eval(), store)


def test_an_encoder_decoder_is_refused(store: LocalStore) -> None:
    config = transformers.T5Config(vocab_size=211, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    with pytest.raises(Unsupported, match="encoder-decoder"):
        Reuse(transformers.T5ForConditionalGeneration(config).eval(), store)


def test_a_model_that_looks_ahead_is_refused(store: LocalStore) -> None:
    model = build("llama")
    model.config.is_causal = model.get_decoder().config.is_causal = False
    with pytest.raises(Unsupported, match="not causal"):
        Reuse(model, store)


def test_a_rotation_that_cannot_be_repeated_is_refused(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the bit-for-bit check: a rotary function that gives other bits each time."""
    original, calls = modeling_llama.apply_rotary_pos_emb, [0]

    def drifting(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        calls[0] += 1
        turned_q, turned_k = original(q, k, cos, sin)
        return turned_q, turned_k * (1 + 1e-3 * calls[0])

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", drifting)
    with pytest.raises(Unsupported, match="same bits"):
        Reuse(build("llama"), store)


@pytest.mark.parametrize("option", ["inputs_embeds", "past_key_values", "cache_implementation", "position_ids"])
def test_generate_refuses_what_it_cannot_serve(store: LocalStore, option: str, seed: int) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    values = {
        "inputs_embeds": torch.rand(1, 4, 64),
        "past_key_values": DynamicCache(config=model.config),
        "cache_implementation": "static",
        "position_ids": torch.arange(4)[None],
    }
    with pytest.raises(Unsupported, match=option):
        reuse.generate(prompt(4, seed), max_new_tokens=2, **{option: values[option]})


def test_what_the_families_support(store: LocalStore) -> None:
    for family in FAMILIES:
        supports = Reuse(build(family), store, block_tokens=BLOCK).supports
        assert supports == {"exact", "shifted", "modular"}, family


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Phi", GROUPED),  # rotates a part that is joined to the rest outside of the function
        ("SmolLM3", {**GROUPED, "num_hidden_layers": 4}),  # the fourth layer does not rotate
        ("Glm", {**GROUPED, "head_dim": 16}),  # interleaved pairs
        ("Cohere2", {**GROUPED, "sliding_window": 24}),
        ("Gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 24}),
    ],
)
def test_other_kinds_of_rotation_are_found(store: LocalStore, kind: str, config: dict[str, Any], seed: int) -> None:
    model = made(kind, **config)
    reuse = Reuse(model, store, block_tokens=BLOCK)
    ids, more = prompt(41, seed), prompt(9, seed + 1)
    hit, memory = reuse.load(ids), DynamicCache(config=model.config)
    with torch.no_grad():
        model(**hit.forward_inputs)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory, use_cache=True)
        assert reuse.save(ids, hit.cache).tokens == 41
        hit = reuse.load(torch.cat((ids, more), 1))
        got = model(**hit.forward_inputs).logits
        expected = model(input_ids=more, past_key_values=memory, use_cache=True).logits
    assert hit.cached_tokens == 41
    assert torch.equal(got, expected)
