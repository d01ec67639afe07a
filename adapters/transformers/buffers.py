"""Torch views of the store's memory, in one place: how bytes become tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The store's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def view(memory: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over ``memory``, which must be writable, though it need not be written."""
    with torch.inference_mode(False):  # later writes come from either mode
        return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Shape and place of one layer's cache."""

    heads: int
    key_dim: int
    value_dim: int
    device: torch.device
    window: int | None = None
