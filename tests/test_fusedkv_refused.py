"""Configurations and checkpoints that a plan does not suit are refused with one clear sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import SIZES, build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvstore import BadInput
from kvstore.adapters.fusedkv import FusedKVConfig
from kvstore.plan import PLANS

ABOVE = [None, {"keys": [2], "values": [0]}, None, None, None]
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a source above its layer": ({"kv_plan": ABOVE}, "keys of layer 1 come from layer 2"),
    "no such plan": ({"kv_plan": "fused"}, "no layer plan 'fused'"),
    "a plan for other layers": ({"kv_plan": [None] * 4}, "lists 4 layers; the model has 5"),
    "too few layers": ({"num_hidden_layers": 2}, "at least 3 layers, not 2"),
    "unequal heads": (
        {"per_layer_config": {2: {"num_key_value_heads": 4}}},
        "layer 3 has 2 key-value heads of 16 dims, and its keys come from layer 2, which has 4",
    ),
    "heads that do not divide": ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
    "an odd head": ({"head_dim": 15}, "head_dim must be even"),
    "partial rotation": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial",
    ),
    "no such start": ({"fusion_init": "zero"}, "fusion_init='zero' is not one of lite, normal"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str) -> None:
    changes, words = CONFIGS[case]
    with pytest.raises(BadInput, match=words):
        FusedKVConfig(**{**SIZES, "kv_plan": "fusedkv", **changes})


def test_heads_may_differ_where_nobody_is_rebuilt_from(seed: int) -> None:
    model = build("fusedkv", seed, per_layer_config={1: {"num_key_value_heads": 4}})
    assert [shape.heads for shape in model.config.shapes] == [2, 4, 2, 2, 2]
    assert torch.isfinite(model(torch.arange(1, 20)[None]).logits).all()


@pytest.mark.parametrize("wanted", PLANS)
@pytest.mark.parametrize("trained", PLANS)
def test_a_checkpoint_of_another_plan(tmp_path: Path, trained: str, wanted: str) -> None:
    """Also where the weights have the same names, and nothing but the plan tells them apart."""
    build(trained, num_hidden_layers=4).save_pretrained(tmp_path)
    if wanted == trained:
        AutoModelForCausalLM.from_pretrained(tmp_path, kv_plan=wanted)
        return
    with pytest.raises(BadInput, match=f"trained with the layer plan '{trained}' and cannot run with '{wanted}'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, kv_plan=wanted)


def changed(folder: Path, change: Any) -> None:
    """Rewrites the weights of a checkpoint."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


KEYS = "model.layers.3.self_attn.fusion.keys"


def test_untied_pairs(tmp_path: Path) -> None:
    build("fusedkv").save_pretrained(tmp_path)
    changed(tmp_path, lambda weights: weights.update({KEYS: weights[KEYS].repeat(1, 1, 2)}))
    with pytest.raises(BadInput, match=r"fusion.keys has shape \(2, 2, 16\) where \(2, 2, 8\).*each rotary pair"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_that_are_missing_or_too_many(tmp_path: Path) -> None:
    build("fusedkv").save_pretrained(tmp_path)
    changed(tmp_path, lambda weights: weights.pop(KEYS))
    with pytest.raises(BadInput, match=r"it lacks model\.layers\.3\.self_attn\.fusion\.keys"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    build("yoco").save_pretrained(tmp_path)
    own = "model.layers.4.self_attn.k_proj.weight"
    changed(tmp_path, lambda weights: weights.update({own: torch.zeros(32, 64)}))
    with pytest.raises(BadInput, match=r"no place for it, model\.layers\.4\.self_attn\.k_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
