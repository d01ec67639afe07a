"""Small moves between blocks and pages of every order that is known, on which a kernel is tried before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.tensors import geometry
from kvstore.tensors.geometry import NO_TURN, ROUNDED
from kvstore.tensors.grids import Grid, Pages
from kvstore.tensors.paging import TAKE, WORD, ZIP
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn
from kvstore.tensors.transfer import DTYPES

PAGES = (64, 16)  # tokens
COLUMNS, DIM, HEADS, STRIDE = 128, 48, 2, 90
COPIED = (torch.uint8, torch.bfloat16, torch.float32)  # elements of every size, for kernels that turn nothing


@dataclass(frozen=True, eq=False)
class Trial:
    """Two runs of one block, which begin and end inside of pages and tiles."""

    pages: Pages
    blocks: torch.Tensor  # [keys and values, heads, stride, dim]
    runs: np.ndarray
    table: np.ndarray
    turn: Turn | None


def trials(form: int) -> Iterator[Trial]:
    """For a form of kernel: each order for keys beside each for values, at whole lines of the caches and off them."""
    generator = torch.Generator().manual_seed(form)
    turns = not form & (NO_TURN | TAKE)
    for dtype in [dtype for dtype, number in DTYPES.items() if number == form & 3] if turns else COPIED:
        rounded = bool(form & ROUNDED) or dtype == torch.float32
        cos, sin = torch.randn(2, 2 * STRIDE, 20, generator=generator).to(dtype if rounded else torch.float32)
        turn = Turn(cos, sin, INTERLEAVED if form & geometry.INTERLEAVED else HALF, rounded, first=3)
        blocks = (64 * torch.randn(2, HEADS, STRIDE, DIM, generator=generator)).to(dtype)
        first = [*(part.data_ptr() for part in blocks), STRIDE, 7, 81, 2, 9]
        runs = np.array([first, [*first[:3], 1, 3, 80, 100]], dtype=np.int64)
        for page in PAGES:
            known, count = orders(page, DIM, dtype.itemsize), COLUMNS // page + 1
            table = np.arange(count - 1, 0, -1, dtype=np.int64)
            for i in range(2 * len(known)):
                two = known[i // 2], known[(i // 2 + i) % len(known)]
                yield Trial(draw(generator, *two, dtype, i % 2, count), blocks, runs, table, turn if turns else None)


def orders(page: int, dim: int, item: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Offsets of tokens and of dims in bytes: rows, columns, both ways of packing words for matrix units, and none."""
    group = max(WORD // item, 1)  # elements of a word
    places = np.arange(page * dim, dtype=np.int64) * item
    every = [places.reshape(page, dim), places.reshape(dim, page).T]
    words = places.reshape(page // ZIP, dim // group, ZIP, group)
    every.append(words.transpose(0, 2, 1, 3).reshape(page, dim))
    words = places.reshape(dim // ZIP, page // group, ZIP, group)
    every.append(words.transpose(1, 3, 0, 2).reshape(page, dim))
    every.append(np.roll(places.reshape(page, dim), 5, axis=(0, 1))[::-1])
    return [(order[:, 0] - order[0, 0], order[0] - order[0, 0]) for order in every]


def draw(
    generator: torch.Generator,
    keys: tuple[np.ndarray, np.ndarray],
    values: tuple[np.ndarray, np.ndarray],
    dtype: torch.dtype,
    shift: int,
    count: int,
) -> Pages:
    """``count`` pages of random bytes, keys and values of a head beside each other, ``shift`` elements off a line."""
    item, sizes = dtype.itemsize, [tokens.size * dims.size * dtype.itemsize for tokens, dims in (keys, values)]
    head = sum(sizes)
    memory = torch.randint(0, 256, (count * HEADS * head + 64,), generator=generator, dtype=torch.uint8)
    grids, address = [], memory.data_ptr() + shift * item
    for (tokens, dims), size in zip((keys, values), sizes, strict=True):
        lowest = int(tokens.min() + dims.min())  # of what lies before the first token's first dim
        grids.append(Grid(address - lowest, HEADS * head, head, tokens, dims))
        address += size
    return Pages(grids[0], grids[1], HEADS, count, dtype, memory.device, (memory, memory))
