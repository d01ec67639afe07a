"""What is brought where an engine reads, and where that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Columns of runs, which are an int64 array [n, 7]. One row is one run: tokens of one block that stay together.
KEYS, VALUES, STRIDE, TOKEN, TOKENS, POSITION, COLUMN = range(7)


@dataclass(frozen=True, eq=False)
class Target:
    """Where one layer of one sequence goes: keys and values as the engine holds them, every last dim contiguous.

    Head-major: ``keys`` [heads, columns, key dim], ``values`` [heads, columns, value dim], with any strides.
    Paged: ``keys`` [pages, page tokens, heads, key dim], ``values`` likewise, and ``pages`` [n] int64 says which page
    holds columns ``i * page tokens`` and after.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor | None = None


def runs_of(places: Sequence[Any], first: int, stop: int, position: int, column: int) -> list[tuple[int, ...]]:
    """Rows of a run array for tokens ``first`` to ``stop``, of which the first goes to ``position`` and ``column``.

    ``places``: where the blocks that hold them are in one layer (``kvstore.load.Place``), those before them included.
    """
    rows: list[tuple[int, ...]] = []
    token = 0
    for place in places:
        low, high = max(0, first - token), min(place.tokens, stop - token)
        if low < high:
            done = token + low - first
            run = (low, high - low, position + done, column + done)
            rows.append((place.keys, place.values, place.stride, *run))
        token += place.tokens
    return rows
