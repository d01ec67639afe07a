"""What ``generate`` may be asked for, and what its arguments must become when a cache is handed in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from kvstore.errors import Unsupported

REFUSED = {
    "inputs_embeds": "embeddings instead of token ids cannot be matched; give input_ids",
    "past_key_values": "the cache comes from the store; call model.generate to use one of your own",
    "cache_implementation": "static, quantised and offloaded caches cannot be served; leave cache_implementation out",
    "position_ids": "positions of your own cannot be served; leave position_ids out",
    "inputs": "give the prompt as input_ids",
}
# What looks at the token ids of the prompt must find them where the caller put them.
READERS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "guidance_scale",
    "watermarking_config",
    "generation_config",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "custom_generate",
    "streamer",
)


def refuse(kwargs: dict[str, Any]) -> None:
    """Raise ``Unsupported`` for what cannot be served exactly."""
    for name, reason in REFUSED.items():
        if kwargs.get(name) is not None:
            raise Unsupported(f"generate({name}=...): {reason}")
    if kwargs.get("use_cache") is False:
        raise Unsupported("generate(use_cache=False): reuse needs a cache; leave use_cache out")


def reads_ids(kwargs: dict[str, Any]) -> bool:
    """Whether something besides the model reads the prompt's ids."""
    return any(kwargs.get(name) is not None for name in READERS)


def adjust(model: Any, kwargs: dict[str, Any], wider: int) -> dict[str, Any]:
    """Arguments for a prompt laid out in ``wider`` more columns (or fewer), whose lengths count from the caller's."""
    kwargs = dict(kwargs)
    config = kwargs.get("generation_config")
    default = config or model.generation_config
    if getattr(default, "cache_implementation", None) is not None:
        if config is not None:
            raise Unsupported(f"generation_config: {REFUSED['cache_implementation']}")
        # The model's own default; a cache that is handed in takes its place.
        config = default = kwargs["generation_config"] = copy.deepcopy(default)
        config.cache_implementation = None
    if not wider:
        return kwargs
    for name, overruled_by in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = kwargs.get(name)
        if value is None and kwargs.get(overruled_by) is None and getattr(default, overruled_by, None) is None:
            value = getattr(default, name, None)
        if value:
            kwargs[name] = value + wider
    return kwargs


def padding(model: Any, config: Any) -> int | None:
    """The id that ``model`` pads with, if it says so."""
    value = getattr(_settings(model), "pad_token_id", None)
    value = getattr(config, "pad_token_id", None) if value is None else value
    return value if isinstance(value, int) else None


def ends(model: Any) -> Sequence[int]:
    """The ids behind which ``model`` says nothing more."""
    value = getattr(_settings(model), "eos_token_id", None)
    return [value] if isinstance(value, int) else list(value or ())


def _settings(model: Any) -> Any:
    return getattr(model, "generation_config", None)
