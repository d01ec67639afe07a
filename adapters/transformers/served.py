"""Which models can be served, as far as their configuration tells; the attach test tells the rest."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from kvstore.errors import Unsupported

REFUSED_MODELS = {
    "llama4": "its keys are normalised after rotation",
    "llama4_text": "its keys are normalised after rotation",
    "gptj": "it rotates keys without a rotary module",
}
REFUSED_ROPE = ("dynamic", "longrope")
SERVED_LAYERS = ("full_attention", "sliding_attention")


def check_config(config: Any) -> list[int | None]:
    """Refuse by configuration what can be known so; the window of each layer otherwise."""
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
    if getattr(text, "kv_sharing_modes", None):
        raise Unsupported("layers that share keys and values cannot be served yet")
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=text).layers):
        kind = type(layer).__name__
        if kind == "DynamicLayer":
            windows.append(None)
        elif kind == "DynamicSlidingWindowLayer":
            windows.append(int(layer.sliding_window))
        else:
            raise Unsupported(f"layer {index} keeps its state in a {kind}; only full and sliding attention are served")
    types = getattr(text, "layer_types", None) or []
    for index, name in enumerate(types):
        if name not in SERVED_LAYERS:
            raise Unsupported(f"layer {index} is of type {name}; only {' and '.join(SERVED_LAYERS)} are served")
    if getattr(text, "attention_chunk_size", None) and "chunked_attention" in types:
        raise Unsupported("chunked attention cannot be served")
    return windows


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]
