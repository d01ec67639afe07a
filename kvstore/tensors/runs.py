"""What is brought where an engine reads, and where that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def runs_of(places: Sequence[Any], tokens: int, start: int, stop: int) -> np.ndarray:
    """Runs of tokens ``start`` (below 0: padding comes first) to ``stop``, of a row whose first ``tokens`` count.

    ``places``: where its blocks are in one layer (``kvstore.load.Place``), from the start of the chain.
    """
    rows, token = [], 0
    for place in places:
        size = min(place.tokens, tokens - token)
        low, high = max(0, start - token), min(size, stop - token)
        if low < high:
            position = token + low
            rows.append((place.keys, place.values, place.stride, low, high - low, position, position - start))
        token += size
    return np.array(rows, dtype=np.int64).reshape(-1, 7)
