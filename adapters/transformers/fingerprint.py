"""What a model's keys and values depend on, by name: the components of its fingerprint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from kvstore.adapters.transformers import checkpoint
from kvstore.keys import Fingerprint
from kvstore.plan import LayerPlan

FORMAT = "1"
DIGEST_BYTES = 4 << 30  # of weights are digested at every attach; it takes about a tenth of a second per GB
# Of a config: what says how to run or store a model, not what its keys and values are.
VOLATILE = re.compile(
    r"^(_.*|transformers_version|dtype|torch_dtype|use_cache|architectures|output_.*|return_dict|id2label|label2id"
    r"|problem_type|chunk_size_feed_forward|is_encoder_decoder|.*_token_id|.*dropout.*|quantization_config"
    r"|rope_parameters|rope_scaling|rope_theta|sliding_window|layer_types|use_sliding_window|max_window_layers"
    r"|initializer_.*|fusion_init|tie_word_embeddings|pruned_heads|task_specific_params|tokenizer_class|prefix|finetuning_task"
    r"|pretraining_tp|attn_implementation|gradient_checkpointing|vocab_size|layer_plan|kv_plan|kv_sharing_modes)$"
)
ADAPTER_WEIGHT = re.compile(r"(^|\.)(lora_|ia3_|hada_|lokr_|oft_|vera_|boft_|adaption_|modules_to_save|base_layer)")


def fingerprint(model: Any, store: Any, plan: LayerPlan) -> Fingerprint:
    """The fingerprint of ``model`` (unwrapped from adapters and compilation or not), whose blocks hold what ``plan``
    says."""
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    weights, adapters = split_weights(base)
    return composed(
        config,
        weights=_weights(base, weights, store),
        dtype=" ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})),
        quantization=getattr(base.config, "quantization_config", None),
        frequencies=dict(base.named_buffers()),
        adapters=_adapters(model, adapters),
        plan=plan,
    )


def composed(
    config: Any,
    *,
    weights: str,
    dtype: str,
    quantization: Any,
    frequencies: Mapping[str, torch.Tensor],
    adapters: str,
    plan: LayerPlan,
) -> Fingerprint:
    """Of a model with this text config, whichever engine runs it: equal parts make equal fingerprints.

    ``weights``: the checkpoint's digest. ``dtype``: of the weights in memory. ``frequencies``: buffers by name, of
    which those of the rotation count. ``adapters``: what is switched on, "none" for nothing.
    """
    return Fingerprint(
        {
            "format": FORMAT,
            "architecture": str(config.model_type),
            # What differs from the defaults only, so that a new version with new fields is no other model.
            "config": _digest({k: v for k, v in config.to_diff_dict().items() if not VOLATILE.match(k)}),
            "weights": weights,
            "dtype": dtype,
            "quantization": _digest(_plain(quantization)),
            "rope": _rope(frequencies, config),
            "sliding_window": _windows(config),
            "adapters": adapters,
            "layer_plan": plan.text,
        }
    )


def base_model(model: Any) -> Any:
    """The transformers model inside wrappers (compiled, PEFT)."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def split_weights(base: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the checkpoint's tensors by canonical name, those of adapters). A tied tensor counts once."""
    weights: dict[str, torch.Tensor] = {}
    adapters: dict[str, torch.Tensor] = {}
    tied = set(getattr(base, "all_tied_weights_keys", None) or ())
    for name, tensor in base.state_dict().items():
        if ADAPTER_WEIGHT.search(name.replace(".base_layer", "")):
            adapters[name] = tensor
        elif name not in tied:
            weights[name.replace(".base_layer", "")] = tensor
    return weights, adapters


def _weights(base: Any, weights: dict[str, torch.Tensor], store: Any) -> str:
    """From memory, which is what runs, or from the files where that takes too long or the dtype was changed."""
    files = _files(base)
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    try:
        by_files = bool(files) and (size > DIGEST_BYTES or not checkpoint.same_dtypes(files, weights))
        if by_files and checkpoint.holds(files, weights):
            return checkpoint.files_digest(files, store)
    except (OSError, ValueError, KeyError):
        pass  # files that cannot be read say nothing
    return checkpoint.memory_digest(weights)


def _files(base: Any) -> list[checkpoint.SafetensorsFile]:
    folder = Path(str(getattr(base.config, "_name_or_path", "") or "")).expanduser()
    try:
        return checkpoint.checkpoint_files(folder) if folder.is_dir() else []
    except (OSError, ValueError, KeyError):
        return []


def _rope(buffers: Mapping[str, torch.Tensor], config: Any) -> str:
    """The parameters as written, and the frequencies that came out of them."""
    parameters = _digest(_plain(getattr(config, "rope_parameters", None)))
    frequencies = {
        name: tensor
        for name, tensor in buffers.items()
        if "inv_freq" in name.rpartition(".")[2] and not name.rpartition(".")[2].startswith("original")
    }
    return f"{parameters}/{checkpoint.memory_digest(frequencies)[:16]}"


def _windows(config: Any) -> str:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []
    return json.dumps([window, [kind for kind in types if kind != "full_attention"] and types])


def _adapters(model: Any, adapters: dict[str, torch.Tensor]) -> str:
    """Names and content of what is switched on now."""
    active: set[str] = set()
    for module in model.modules():
        state = module.__dict__
        if "_active_adapter" in state and not state.get("_disable_adapters"):
            names = state["_active_adapter"]
            active.update([names] if isinstance(names, str) else names)
    if not active:
        return "none"
    chosen = {name: tensor for name, tensor in adapters.items() if any(f".{one}." in f".{name}." for one in active)}
    scalings = [
        sorted((key, float(value)) for key, value in module.__dict__["scaling"].items() if key in active)
        for module in model.modules()
        if isinstance(module.__dict__.get("scaling"), dict)
    ]
    return f"{checkpoint.memory_digest(chosen)[:32]}/{_digest(scalings)}"


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _digest(value: Any) -> str:
    if value is None:
        return "none"
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
