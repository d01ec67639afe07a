"""What is compared: each layer plan, and grouped queries with a cache of the same size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM
from kvstore.bench.train_plans.corpus import VOCABULARY


@dataclass(frozen=True)
class Size:
    """How large the models are, and how long they train. Rates are peaks of a cosine; tokens are bytes."""

    hidden: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    rate: float = 1e-3
    held_out: int = 64  # sequences of a validation
    evaluations: int = 20  # of each run


SIZES = {
    "smoke": Size(hidden=64, layers=4, heads=4, context=64, batch=8, steps=40, held_out=16, evaluations=4),
    "small": Size(hidden=128, layers=8, heads=4, context=256, batch=8, steps=400, evaluations=10),
    "large": Size(hidden=768, layers=16, heads=12, context=1024, batch=32, steps=12_000, rate=6e-4, held_out=256),
}

# Name, layer plan, key-value heads as a share of the heads.
ARMS: dict[str, tuple[str, int]] = {
    "standard": ("standard", 1),
    "gqa": ("standard", 2),
    "cla": ("cla", 1),
    "yoco": ("yoco", 1),
    "fusedkv-lite": ("fusedkv-lite", 1),
    "fusedkv-lite-reversed": ("fusedkv-lite-reversed", 1),
    "fusedkv": ("fusedkv", 1),
}


def configured(arm: str, size: Size, fusion_init: str = "lite") -> FusedKVConfig:
    """The configuration of an arm."""
    plan, share = ARMS[arm]
    return FusedKVConfig(
        kv_plan=plan,
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // share,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        fusion_init=fusion_init,
    )


def build(config: FusedKVConfig, seed: int) -> FusedKVForCausalLM:
    """The model as it starts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FusedKVForCausalLM(config)


def cached_numbers(config: FusedKVConfig) -> int:
    """Numbers that one token takes in the cache."""
    return sum(config.shapes[layer].heads * 2 * config.shapes[layer].key_dim for layer in config.layer_plan.stored)
