"""How a model's keys are turned, as its transformers config says, checked against the tables that vLLM made.

Blocks that another engine wrote hold keys as they were before; they are turned here as that engine would have.
"""

from __future__ import annotations

from typing import Any

import torch

from kvstore.errors import Unsupported
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn

VARYING = ("dynamic", "longrope")
NEAR = 2e-2  # tables of bfloat16 beside those of float32


def buffers(config: Any) -> dict[str, torch.Tensor]:
    """The frequencies of a model with this text config, by the names that transformers gives them."""
    found = {}
    for name, module in _rotaries(config).items():
        for buffer, tensor in module.named_buffers(recurse=False):
            found[f"{name}.{buffer}"] = tensor
    return found


def _rotaries(config: Any) -> dict[str, Any]:
    """The modules that make tables, on the CPU; of all others, nothing is allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: type(module)(config=config)
        for name, module in model.named_modules()
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False))
    }


class Rotation:
    """Tables of one model, for positions up to some length."""

    def __init__(self, config: Any, dtype: torch.dtype, head_dim: int, positions: int) -> None:
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in VARYING:
            raise Unsupported(f"frequencies that depend on a prompt's length ({kind})")
        rotaries = list(_rotaries(config).values())
        if len(rotaries) != 1:
            raise Unsupported(f"a model with {len(rotaries)} rotations of keys")
        like = torch.empty(1, 1, 1, dtype=dtype)
        cos, sin = rotaries[0](like, torch.arange(positions)[None])
        pairs = cos.shape[-1] // 2
        if cos.shape[-1] > head_dim or not torch.equal(cos[..., :pairs], cos[..., pairs:]):
            raise Unsupported("tables that are no cosines and sines of pairs")
        self.pairing = _engine_has(cos[0, :, :pairs], sin[0, :, :pairs])
        self.rounded = cos.dtype == dtype
        self._cos, self._sin = (table[0, :, :pairs].contiguous() for table in (cos, sin))
        self._frequencies = rotaries[0].inv_freq.double()

    def placed(self) -> Turn:
        """For keys as they were before, each at its position."""
        return Turn(self._cos, self._sin, self.pairing, self.rounded)

    def moved(self, by: int, tokens: int) -> Turn:
        """For up to ``tokens`` keys that are turned already and go ``by`` positions further; every row is the same."""
        angles = (self._frequencies * by).expand(tokens, -1)
        return Turn(angles.cos().float().contiguous(), angles.sin().float().contiguous(), self.pairing, False)


def _engine_has(cos: torch.Tensor, sin: torch.Tensor) -> str:
    """Which dims the engine pairs, after its tables proved to be these."""
    from vllm.model_executor.layers import rotary_embedding

    made = list(rotary_embedding._ROPE_DICT.values())
    if not made:
        raise Unsupported("an engine that made no tables")
    pairings = set()
    for rope in made:
        table = rope.cos_sin_cache.float().cpu()
        rows = min(len(table), len(cos))
        if table.shape[1] != 2 * cos.shape[1]:
            raise Unsupported(f"tables of {table.shape[1] // 2} pairs, where the config has {cos.shape[1]}")
        for mine, theirs in ((cos, table[:, : cos.shape[1]]), (sin, table[:, cos.shape[1] :])):
            if (mine[:rows].float() - theirs[:rows]).abs().max() > NEAR:
                raise Unsupported("other tables than the config's")
        pairings.add(HALF if rope.is_neox_style else INTERLEAVED)
    if len(pairings) > 1:
        raise Unsupported("layers that pair dims in different ways")
    return pairings.pop()
