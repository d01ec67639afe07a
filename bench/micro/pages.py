"""Blocks into the paged cache of an engine and back, one thread, beside plain memcpy of the same bytes.

The cache has the size and the orders of a small model's in engines that were looked at. What comes back is compared
bit for bit with what was put, and the comparison is shown pages that changed places, which it must refuse.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table

from kvstore.bench.micro.limits import compare, copy, memory
from kvstore.bench.micro.rotated import COMPILING, model_tables
from kvstore.tensors.grids import Grid, Pages
from kvstore.tensors.pages import TAKE_KERNEL, put, put_kernel, take
from kvstore.tensors.rope import HALF, Turn

LAYERS, HEADS, DIM, TOKENS, BLOCK = 12, 8, 64, 6144, 256
ITEM = 2  # bytes of bfloat16
ROOM = 1.25  # pages of a cache, for each that is used
ORDERS = {  # of keys, of values, tokens of a page
    "keys transposed, values in rows": ("columns", "rows", 128),
    "the same, pages of 16 tokens": ("columns", "rows", 16),
    "both packed for matrix units": ("packed keys", "packed values", 128),
    "both in rows": ("rows", "rows", 128),
}


def order(name: str, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of tokens and dims in bytes."""
    t, d = np.arange(page, dtype=np.int64), np.arange(DIM, dtype=np.int64)
    offsets = {
        "rows": (t * DIM, d),
        "columns": (t, d * page),
        "packed keys": (t // 16 * 16 * DIM + t % 16 * 2, d // 2 * 32 + d % 2),
        "packed values": (t // 2 * 32 + t % 2, d // 16 * 16 * page + d % 16 * 2),
    }[name]
    return offsets[0] * ITEM, offsets[1] * ITEM


class Case:
    """Blocks of all layers, a cache for each, and where the blocks' tokens go in it."""

    def __init__(self, keys: str, values: str, page: int) -> None:
        size, used = HEADS * DIM * ITEM, TOKENS // page  # bytes of one token's keys
        self.source = memory(LAYERS * TOKENS * 2 * size)
        source = torch.frombuffer(self.source, dtype=torch.bfloat16)
        source.copy_(torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).repeat(source.numel() >> 20))
        self.layers = source.view(LAYERS, TOKENS // BLOCK, 2, HEADS, BLOCK, DIM)
        self.back = memory(len(self.source))
        self.table = np.random.default_rng(1).permutation(int(used * ROOM))[:used].astype(np.int64)
        self.caches = [self._cache((keys, values), page) for _ in range(LAYERS)]

    def _cache(self, names: tuple[str, str], page: int) -> Pages:
        side, count = page * DIM * ITEM, int(TOKENS // page * ROOM)
        whole = torch.frombuffer(memory(count * HEADS * 2 * side), dtype=torch.bfloat16)
        grids = []
        for i, name in enumerate(names):
            grids.append(Grid(whole.data_ptr() + i * side, HEADS * 2 * side, 2 * side, *order(name, page)))
        return Pages(grids[0], grids[1], HEADS, count, torch.bfloat16, whole.device, (whole, whole))

    def runs(self, layer: torch.Tensor) -> np.ndarray:
        """Every block of a layer whole."""
        rows = [[b[0].data_ptr(), b[1].data_ptr(), BLOCK, 0, BLOCK, i * BLOCK, i * BLOCK] for i, b in enumerate(layer)]
        return np.array(rows, dtype=np.int64)

    def put(self, turn: Turn | None = None) -> None:
        """All layers into their caches."""
        for layer, cache in zip(self.layers, self.caches, strict=True):
            put(self.runs(layer), turn, cache, self.table)

    def take(self) -> None:
        """All layers out of their caches, into memory beside the first."""
        target = torch.frombuffer(self.back, dtype=torch.bfloat16).view(self.layers.shape)
        for layer, cache in zip(target, self.caches, strict=True):
            take(self.runs(layer), cache, self.table)

    def bit_equal(self) -> bool:
        """Whether what came back is what was there."""
        self.put()
        self.take()
        return self.back == self.source


def measure(repeats: int) -> dict[str, dict[str, Any]]:
    """Of each order, ways in and out, and in with keys that turn; ``ratio`` is to memcpy: 1.0 is as fast."""
    torch.set_num_threads(1)
    cos, sin = (table[0, :, : DIM // 2].float().contiguous() for table in model_tables(DIM, TOKENS))
    turn = Turn(cos, sin, HALF, rounded=False)
    kernels = put_kernel(turn, torch.bfloat16), put_kernel(None, torch.bfloat16), TAKE_KERNEL
    compiled = all(kernel is not None and kernel.wait(COMPILING) is not None for kernel in kernels)
    results: dict[str, dict[str, Any]] = {}
    for name, (keys, values, page) in ORDERS.items():
        case = Case(keys, values, page)
        moved, block = len(case.source) / 1e9, 2 * HEADS * BLOCK * DIM * ITEM
        equal, case.table = case.bit_equal(), case.table[::-1].copy()
        case.take()
        assert case.back != case.source, "pages that changed places were taken for the same"
        for way, work in (("put", case.put), ("put, keys turned", partial(case.put, turn)), ("take", case.take)):
            timing = compare(partial(copy, case.back, case.source, block), work, repeats)
            results[f"{name}: {way}"] = {
                "ratio": timing.ratio,
                "spread": timing.spread,
                "gb_per_second": moved / timing.seconds,
                "limit_gb_per_second": moved / timing.limit,
                "bit_equal": equal,
                "compiled": compiled,
            }
    return results


def table(results: dict[str, dict[str, Any]]) -> Table:
    """For the terminal."""
    shown = Table("pages and way", "ratio to memcpy", "± spread", "GB/s", "memcpy GB/s", "bits")
    shown.title = "Between blocks and an engine's pages, one thread"
    for name, row in results.items():
        numbers = (f"{row[key]:.2f}" for key in ("ratio", "spread", "gb_per_second", "limit_gb_per_second"))
        shown.add_row(name, *numbers, "equal" if row["bit_equal"] else "differ")
        if not row["compiled"]:
            shown.caption = "not compiled: numba is missing, plain torch was measured"
    return shown
