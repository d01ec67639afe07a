"""Moves between blocks and pages in plain torch: where no kernel is to be had. Slow, and right on any device."""

from __future__ import annotations

import numpy as np
import torch

from kvstore.tensors import plain
from kvstore.tensors.grids import Grid, Pages
from kvstore.tensors.rope import Turn, turned

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def put(runs: np.ndarray, turn: Turn | None, pages: Pages, table: np.ndarray) -> None:
    """``pages.put``."""
    for row in runs.tolist():
        keys, values = rows_of(row, pages)
        if turn is not None:
            keys = turned(keys, turn, torch.arange(row[5], row[5] + row[4], device=pages.device))
        for grid, given in ((pages.keys, keys), (pages.values, values)):
            memory, places = _places(grid, pages, table, row)
            memory[places] = given.contiguous().view(memory.dtype)


def take(runs: np.ndarray, pages: Pages, table: np.ndarray) -> None:
    """``pages.take``."""
    for row in runs.tolist():
        for grid, into in zip((pages.keys, pages.values), rows_of(row, pages), strict=True):
            memory, places = _places(grid, pages, table, row)
            into.copy_(memory[places].view(into.dtype))


def rows_of(row: list[int], pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a run in its block, [heads, tokens, dim]."""
    keys_at, values_at, stride, token, tokens = row[:5]
    made = []
    for address, grid in ((keys_at, pages.keys), (values_at, pages.values)):
        shape = (pages.heads, stride if tokens else 0, grid.dims.size)
        made.append(plain.at(address, shape, pages.dtype, pages.device)[:, token : token + tokens])
    return made[0], made[1]


def _places(grid: Grid, pages: Pages, table: np.ndarray, row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory of a grid in words of the size of an element, and which are a run's, [heads, tokens, dim]."""
    low, high = grid.span(pages.count, pages.heads)
    item, size = pages.dtype.itemsize, pages.page_tokens
    memory = plain.at(low, ((high - low) // item + 1,), WORDS[item], pages.device)
    columns = np.arange(row[6], row[6] + row[4])
    tokens = table[columns // size] * grid.page_step + grid.tokens[columns % size]
    heads = grid.address - low + np.arange(pages.heads) * grid.head_step
    places = (heads[:, None, None] + tokens[None, :, None] + grid.dims) // item
    return memory, torch.from_numpy(places).to(pages.device)
