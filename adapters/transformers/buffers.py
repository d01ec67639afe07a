"""Torch views of the store's memory, in one place: how bytes become tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvstore.layout import Layout

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values

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
    """Shape and place of one stored layer's cache, as blocks have it.

    Between the store and a cache, layers are slots: those that are stored, in order, keys first. The model's own
    numbers (``LayerPlan.stored``) and what it calls keys (``exchanged``) end where its caches end.
    """

    heads: int
    key_dim: int
    value_dim: int
    device: torch.device
    window: int | None = None
    swapped: bool = False  # caches have as values what turns with position, which blocks have as keys (MLA)

    def exchanged(self, first: torch.Tensor, second: torch.Tensor) -> Pair:
        """What a cache was given as (keys, values), as a block has it; what a block has, as a cache is given it."""
        return (second, first) if self.swapped else (first, second)


class Payload:
    """Where the layers of a full block lie in its payload, counted in elements of ``dtype``."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.dtype, self.tokens, self.shapes = dtype, layout.block_tokens, layout.layers
        offsets = [offset // dtype.itemsize for offset in layout.layer_offsets(layout.block_tokens)]
        self.starts, self.elements = offsets[:-1], offsets[-1]
        first = self.shapes[0]
        self.alike = first.key_dim == first.value_dim and all(shape == first for shape in self.shapes)

    def size(self, layer: int) -> int:
        """Elements of a layer's keys and values, without what pads them."""
        shape = self.shapes[layer]
        return shape.heads * self.tokens * (shape.key_dim + shape.value_dim)

    def layer(self, flat: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [heads, block tokens, dim], of a layer of the payload ``flat``."""
        keys, values = self.pieces(flat, layer, self.starts[layer], 1)
        return keys[0], values[0]

    def pieces(self, flat: torch.Tensor, layer: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same layer of ``count`` blocks, one behind the other from ``start`` on: [count, heads, tokens, dim]."""
        shape, size = self.shapes[layer], self.size(layer)
        views = []
        for dim, offset in ((shape.key_dim, 0), (shape.value_dim, shape.heads * self.tokens * shape.key_dim)):
            strides = (size, self.tokens * dim, dim, 1)
            views.append(flat.as_strided((count, shape.heads, self.tokens, dim), strides, start + offset))
        return views[0], views[1]

    def whole(self, flat: torch.Tensor) -> torch.Tensor | None:
        """All layers at once, [layers, K and V, heads, block tokens, dim]; None when they are not alike."""
        if not self.alike:
            return None
        layers, heads, dim = len(self.shapes), self.shapes[0].heads, self.shapes[0].key_dim
        step = self.starts[1] if layers > 1 else self.elements
        per_head = self.tokens * dim
        strides = (step, heads * per_head, per_head, dim, 1)
        return flat.as_strided((layers, 2, heads, self.tokens, dim), strides)


@lru_cache(maxsize=64)
def payload_of(layout: Layout, dtype: torch.dtype) -> Payload:
    """The one ``Payload`` of a layout."""
    return Payload(layout, dtype)
