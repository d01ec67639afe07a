"""Where the elements of an engine's paged cache lie: in all engines known, a sum of steps and of two tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kvstore.errors import BadInput, Unsupported
from kvstore.tensors.paging import UNITS, Side, ordered


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the elements of keys, or of values, lie in memory; all in bytes. The tables are int64 and begin with 0."""

    address: int  # of page 0, head 0, token 0, dim 0
    page_step: int
    head_step: int
    tokens: np.ndarray  # [page tokens]
    dims: np.ndarray  # [dim]

    def span(self, count: int, heads: int) -> tuple[int, int]:
        """The lowest and the highest address of an element in ``count`` pages."""
        low = high = self.address
        for steps in (self.tokens, self.dims, (count - 1) * self.page_step, (heads - 1) * self.head_step):
            low, high = low + int(np.min(steps, initial=0)), high + int(np.max(steps, initial=0))
        return low, high


@dataclass(frozen=True, eq=False)
class Pages:
    """The cache of one layer: ``count`` pages of as many tokens as its grids have, with ``heads`` heads.

    ``memory``: the tensors that keys and values lie in, which this keeps. ``BadInput``: the grids do not fit each other
    or leave the memory.
    """

    keys: Grid
    values: Grid
    heads: int
    count: int
    dtype: torch.dtype  # that blocks must have too
    device: torch.device
    memory: tuple[torch.Tensor, torch.Tensor]

    def __post_init__(self) -> None:
        if self.dtype.itemsize not in UNITS:
            raise Unsupported(f"a paged cache of {self.dtype} cannot be served: nothing here moves such elements")
        if self.keys.tokens.size != self.values.tokens.size or not self.keys.tokens.size:
            raise BadInput("keys and values of a paged cache must have as many tokens in a page, at least one")
        for grid, tensor in zip((self.keys, self.values), self.memory, strict=True):
            if any(table.dtype != np.int64 or table.ndim != 1 or table[:1].any() for table in (grid.tokens, grid.dims)):
                raise BadInput("the tables of a grid must be rows of int64 that begin with 0")
            storage, item = tensor.untyped_storage(), self.dtype.itemsize
            if any(np.any(steps % item) for steps in (grid.page_step, grid.head_step, grid.tokens, grid.dims)):
                raise BadInput(f"the steps of a grid must be whole elements of {self.dtype}")
            low, high = (address - storage.data_ptr() for address in grid.span(self.count, self.heads))
            if self.count and self.heads and grid.dims.size and not 0 <= low <= high <= storage.nbytes() - item:
                raise BadInput(f"{self.count} pages of {self.heads} heads do not lie inside the memory of the cache")

    @classmethod
    def plain(cls, keys: torch.Tensor, values: torch.Tensor) -> Pages:
        """Of tensors [pages, page tokens, heads, dim] with any strides; they may be views of one tensor."""
        if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype or keys.device != values.device:
            raise BadInput(f"keys of shape {list(keys.shape)} do not go with values of shape {list(values.shape)}")
        count, tokens, heads = keys.shape[:3]
        grids = []
        for tensor in (keys, values):
            page, token, head, dim = (step * tensor.itemsize for step in tensor.stride())
            dims = np.arange(tensor.shape[3], dtype=np.int64) * dim
            grids.append(Grid(tensor.data_ptr(), page, head, np.arange(tokens, dtype=np.int64) * token, dims))
        return cls(grids[0], grids[1], heads, count, keys.dtype, keys.device, (keys, values))

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return int(self.keys.tokens.size)

    @cached_property
    def sides(self) -> tuple[Side, np.ndarray, np.ndarray, Side, np.ndarray, np.ndarray]:
        """What a kernel has to know of keys, then of values: numbers, and where tokens and units lie in a page."""
        return *self._side(self.keys), *self._side(self.values)

    def _side(self, grid: Grid) -> tuple[Side, np.ndarray, np.ndarray]:
        order = ordered(grid.tokens, grid.dims, self.dtype.itemsize)
        row = grid.dims.size * self.dtype.itemsize
        side = Side(grid.address, grid.page_step, grid.head_step, row, *order)
        units = grid.dims[:: side.unit // self.dtype.itemsize]
        return side, np.ascontiguousarray(grid.tokens), np.ascontiguousarray(units)

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [pages, page tokens, heads, dim], every last dim contiguous.

        ``Unsupported``: the pages keep an order that such a tensor cannot have.
        """
        return self._tensor(self.keys, self.memory[0]), self._tensor(self.values, self.memory[1])

    def _tensor(self, grid: Grid, memory: torch.Tensor) -> torch.Tensor:
        item, storage = self.dtype.itemsize, memory.untyped_storage()
        token = int(grid.tokens[1]) if grid.tokens.size > 1 else item
        numbers = (grid.page_step, token, grid.head_step, grid.address - storage.data_ptr())
        even = (np.diff(grid.tokens) == token).all() and (np.diff(grid.dims) == item).all()
        if not even or min(numbers) < 0 or any(number % item for number in numbers):
            raise Unsupported(f"the pages of this cache keep an order that is not served on {self.device}")
        page, token, head, start = (number // item for number in numbers)
        flat = torch.empty(0, dtype=self.dtype, device=self.device).set_(storage)
        shape = (self.count, self.page_tokens, self.heads, grid.dims.size)
        return flat.as_strided(shape, (page, token, head, 1), start)
