"""What is brought where an engine reads, and where that is."""

from __future__ import annotations

from dataclasses import dataclass

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
