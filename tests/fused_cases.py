"""Problems for attention over weighted sums of layers, small and irregular."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.tensors.fusion import Fusion, reference

MASKS = ("causal", "bool", "bias", "lowest")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Problem:
    queries: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    fusion: Fusion
    scaling: float
    mask: Tensor | None

    def arguments(self) -> tuple[Tensor, list[Tensor], list[Tensor], Fusion, float, Tensor | None]:
        return self.queries, self.keys, self.values, self.fusion, self.scaling, self.mask

    def right(self, made: Tensor) -> bool:
        """Whether ``made`` is the reference, but for rounding."""
        wanted, (batch, heads, tokens, _) = reference(*self.arguments()), self.queries.shape
        assert made.dtype == self.queries.dtype and made.is_contiguous()
        assert list(made.shape) == [batch, tokens, heads, self.values[0].shape[3]]
        error = (made.double() - wanted.double()).abs().max()
        return bool(error <= TOLERANCE[made.dtype] * wanted.double().abs().max())  # False for NaN


def problem(
    seed: int,
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 2),
    tokens: int = 1,
    context: int = 70,
    sources: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    mask: str = "causal",
    batch: int = 2,
    device: str = "cpu",
) -> Problem:
    """``heads`` of queries and of keys; ``sources`` and ``dims`` of keys and of values; ``mask``: of ``MASKS``.

    With a mask, sequences are padded on the left by 5 tokens for each before them, so that some rows may see nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, of)

    of = torch.promote_types(dtype, torch.float32)
    fusion = Fusion(*(noise(count, heads[1], dim, of=of) for count, dim in zip(sources, dims, strict=True)))
    keys = [noise(batch, heads[1], context, dims[0]) for _ in range(sources[0])]
    values = [noise(batch, heads[1], context, dims[1]) for _ in range(sources[1])]
    shown = torch.ones(batch, 1, tokens, context, dtype=torch.bool).tril(context - tokens)
    for number in range(batch):
        shown[number, ..., : 5 * number] = False
    masks: dict[str, Callable[[], Tensor | None]] = {
        "causal": lambda: None,
        "bool": lambda: shown.to(device),
        "bias": lambda: noise(*shown.shape, of=torch.float32).masked_fill(~shown.to(device), -torch.inf),
        "lowest": lambda: noise(*shown.shape).masked_fill(~shown.to(device), torch.finfo(dtype).min),
    }
    queries = noise(batch, heads[0], tokens, dims[0])
    return Problem(queries, keys, values, fusion, dims[0] ** -0.5, masks[mask]())


def moved(tensor: Tensor, how: int) -> Tensor:
    """The same numbers in a larger tensor, at an odd place or with other strides."""
    batch, heads, tokens, dim = tensor.shape
    if how == 0:
        room = tensor.new_full((batch, heads + 1, tokens + 3, dim), torch.nan)[:, 1:, 2:-1]
    elif how == 1:
        room = tensor.new_full((batch, tokens, heads, dim), torch.nan).transpose(1, 2)
    else:
        room = tensor.new_full((batch, heads, tokens, dim + 3), torch.nan)[..., 1 : 1 + dim]
    return room.copy_(tensor)
