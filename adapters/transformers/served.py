"""Which models can be served, as far as their configuration tells; the attach test tells the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache

from kvstore.errors import Unsupported
from kvstore.plan import LayerPlan, named

REFUSED_MODELS = {
    "llama4": "its keys are normalised after rotation",
    "llama4_text": "its keys are normalised after rotation",
    "gptj": "it rotates keys without a rotary module",
}
REFUSED_ROPE = ("dynamic", "longrope")
SERVED_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Served:
    """What a configuration says of a model that may be served."""

    plan: LayerPlan
    windows: tuple[int | None, ...]  # of each stored layer


def check_config(config: Any) -> Served:
    """Refuse by configuration what can be known so."""
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported("encoder-decoder models cannot be served: their keys depend on two inputs")
    text = config.get_text_config(decoder=True)
    reason = REFUSED_MODELS.get(text.model_type)
    if reason:
        raise Unsupported(f"{text.model_type} cannot be served: {reason}")
    for parameters in _rope_parameters(text):
        if parameters.get("rope_type") in REFUSED_ROPE:
            raise Unsupported(
                f"rope type {parameters['rope_type']} cannot be served: its frequencies change with the length of "
                "the sequence"
            )
    if not getattr(text, "is_causal", True):
        raise Unsupported("the model is not causal: keys of a prefix depend on what follows")
    plan = _plan_of(text)
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=text).layers):
        kind = type(layer).__name__
        if kind == "DynamicLayer":
            windows.append(None)
        elif kind == "DynamicSlidingWindowLayer":
            windows.append(int(layer.sliding_window))
        elif kind != "DummyLayer" or plan is None or plan.layers[index] is None:
            raise Unsupported(f"layer {index} keeps its state in a {kind}; only full and sliding attention are served")
    types = getattr(text, "layer_types", None) or []
    for index, name in enumerate(types):
        if name not in SERVED_LAYERS:
            raise Unsupported(f"layer {index} is of type {name}; only {' and '.join(SERVED_LAYERS)} are served")
    if getattr(text, "attention_chunk_size", None) and "chunked_attention" in types:
        raise Unsupported("chunked attention cannot be served")
    if plan is not None and not plan.is_standard and (any(windows) or "sliding_attention" in types):
        raise Unsupported("layers that share keys and values are served with full attention only")
    return Served(plan or named("standard", len(windows)), tuple(windows))


def _plan_of(config: Any) -> LayerPlan | None:
    """Which layers are rebuilt from others; None where the configuration says nothing of it."""
    modes = getattr(config, "kv_sharing_modes", None)
    plan = getattr(config, "layer_plan", None)
    if not isinstance(plan, LayerPlan):
        if modes:
            raise Unsupported("layers that share keys and values cannot be served yet")
        return None
    rebuilt = [number for number, layer in enumerate(plan.layers) if layer is not None]
    dummies = [number for number, mode in enumerate(modes or ()) if mode == "reuse"]
    if rebuilt != dummies or len(plan.layers) != config.num_hidden_layers:
        raise Unsupported(
            f"the layer plan {plan.name!r} is for {len(plan.layers)} layers and rebuilds {rebuilt}; the model has "
            f"{config.num_hidden_layers}, and its kv_sharing_modes say {dummies}: they must be the same"
        )
    return plan


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]
