"""What is brought where an engine reads, and where that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
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


class Blocks(NamedTuple):
    """Where the blocks of a load are in one layer, as ``kvstore.load.Place`` has it: arrays of int64, [blocks]."""

    keys: np.ndarray
    values: np.ndarray
    strides: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, places: Sequence[Any]) -> Blocks:
        """The same as a list of places."""
        return cls(*np.array([place[:4] for place in places], dtype=np.int64).reshape(-1, 4).T)

    def within(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which blocks have tokens ``first`` to ``stop`` of the load, and which of their own these are."""
        ends = self.tokens.cumsum()
        starts = ends - self.tokens
        low, high = np.maximum(starts, first) - starts, np.minimum(ends, stop) - starts
        used = np.flatnonzero(low < high)
        return used, low[used], high[used]


def runs_of(places: Blocks | Sequence[Any], first: int, stop: int, position: int, column: int) -> np.ndarray:
    """A run array for tokens ``first`` to ``stop``, of which the first goes to ``position`` and ``column``.

    ``places``: where the blocks that hold them are in one layer (or a list of ``kvstore.load.Place``), those before
    them included.
    """
    blocks = places if isinstance(places, Blocks) else Blocks.of(places)
    used, low, high = blocks.within(first, stop)
    done = (high - low).cumsum() - (high - low)
    runs = np.empty((len(used), 7), dtype=np.int64)
    runs[:, KEYS], runs[:, VALUES], runs[:, STRIDE] = blocks.keys[used], blocks.values[used], blocks.strides[used]
    runs[:, TOKEN], runs[:, TOKENS] = low, high - low
    runs[:, POSITION], runs[:, COLUMN] = position + done, column + done
    return runs
