"""Loading a checkpoint only into a model of its own plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore import plan
from kvstore.adapters.fusedkv.config import FusedKVConfig
from kvstore.errors import BadInput

LAYERS = "layers."  # in the names of weights that a plan decides on
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")  # a checkpoint is found


def load(from_pretrained: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
    """``from_pretrained(name, …)``. ``BadInput``: the checkpoint is of another plan, or its weights do not fit.

    transformers would fill what is missing with random numbers, and go on. Weights outside the layers are its business.
    """
    wanted = kwargs.pop("output_loading_info", False)
    model, info = from_pretrained(name, *args, output_loading_info=True, **{"ignore_mismatched_sizes": True, **kwargs})
    if name is not None:
        _check_plan(name, model.config, {key: kwargs[key] for key in WHERE if key in kwargs})
    for problem in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        keys = sorted((key for key in info[problem] if LAYERS in str(key)), key=str)
        if keys:
            raise BadInput(_sentence(name, model.config, problem, keys))
    return (model, info) if wanted else model


def _check_plan(name: Any, config: Any, where: dict[str, Any]) -> None:
    written = FusedKVConfig.get_config_dict(name, **where)[0]
    layers = written.get("num_hidden_layers", config.num_hidden_layers)
    trained = plan.read(written.get("kv_plan", FusedKVConfig.kv_plan), layers)
    if trained.text != config.layer_plan.text:
        raise BadInput(
            f"{name} was trained with the layer plan {trained.name!r} and cannot run with {config.layer_plan.name!r}: "
            "its weights are others; load it without kv_plan"
        )


def _sentence(name: Any, config: Any, problem: str, keys: list[Any]) -> str:
    first = keys[0]
    if problem == "mismatched_keys":
        weight, found, expected = first
        reason = f"{weight} has shape {tuple(found)} where {tuple(expected)} is needed"
        if weight.endswith("fusion.keys"):
            reason += "; key weights hold one number for each rotary pair, so that both channels share it"
        return f"{name} does not fit the layer plan {config.layer_plan.name!r}: {reason}"
    what = "lacks" if problem == "missing_keys" else "has, with no place for it,"
    return (
        f"{name} does not fit the layer plan {config.layer_plan.name!r}: it {what} {first} ({len(keys)} weights in all)"
    )
