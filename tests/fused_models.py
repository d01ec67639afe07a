"""Small seeded models of the FusedKV family, and the plainest form of what they compute."""

from functools import partial
from typing import Any

import torch
from hf_models import SHAPE

from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM
from kvstore.adapters.fusedkv.attention import FusionWeights
from kvstore.adapters.fusedkv.rotary import turned
from kvstore.tensors.fusion import Fusion

LAYERS = 5  # odd: the middle one is stored
SIZES: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "fusion_init": "normal"}


def build(plan: Any, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **config: Any) -> Any:
    """A model of a plan, the same for the same seed; norms and weighted sums are not what they start as."""
    made = FusedKVConfig(kv_plan=plan, **{**SIZES, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FusedKVForCausalLM(made)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def plain_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all of ``ids`` [1, tokens]: every layer's keys and values made in full, one softmax, no cache."""
    decoder, config = model.model, model.config
    hidden = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, plan in zip(decoder.layers, config.layer_plan.layers, strict=True):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        if plan is None:
            keys = attention.k_norm(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
            values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            states.append((turned(keys, cos, sin, config.rope_interleaved), values))
        else:
            weights = attention.fusion() if plan.weighted else None
            keys = summed([states[source][0] for source in plan.keys], weights and weights.keys)
            values = summed([states[source][1] for source in plan.values], weights and weights.values)
            states.append((keys, values))
        queries = attention.q_norm(attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
        queries = turned(queries, cos, sin, config.rope_interleaved)
        keys, values = (state.repeat_interleave(attention.num_key_value_groups, dim=1) for state in states[-1])
        scores = queries @ keys.transpose(-1, -2) * attention.scaling
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        found = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        hidden = hidden + attention.o_proj(found)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits: torch.Tensor = model.lm_head(decoder.norm(hidden))
    return logits


def summed(states: list[torch.Tensor], weights: torch.Tensor | None) -> torch.Tensor:
    """The one state, or the weighted sum of several."""
    if weights is None:
        (state,) = states
        return state
    return sum((state * weight[:, None] for state, weight in zip(states, weights, strict=True)), torch.tensor(0.0))


def untie(model: Any) -> None:
    """Give both channels of each rotary pair weights of their own."""
    source = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, FusionWeights):
            tied = module()
            noise = torch.randn(tied.keys.shape, generator=source).to(tied.keys)
            module.forward = partial(_same, Fusion(tied.keys + noise, tied.values))  # type: ignore[method-assign]


def _same(fusion: Fusion) -> Fusion:
    return fusion
