"""Paged caches in every order that engines keep, between canaries, and what moves to and from them must make."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transfers import KINDS, Block, Kind, any_bits, draw_runs, tables

from kvstore.tensors.grids import Grid, Pages
from kvstore.tensors.paging import COLUMNS, ROWS, SCATTERED, ZIPPED
from kvstore.tensors.rope import Turn, turned

POSITIONS = 300
# Each order, as it is to be known where pages and dims are large and even enough.
ORDERS = {"rows": ROWS, "columns": COLUMNS, "packed keys": COLUMNS, "packed values": ZIPPED, "none": SCATTERED}
Tables = tuple[np.ndarray, np.ndarray]


def order(name: str, page: int, dim: int, item: int, chance: random.Random) -> Tables:
    """Offsets of tokens and dims, from the first of each, in bytes."""
    t, d = np.arange(page, dtype=np.int64), np.arange(dim, dtype=np.int64)
    word = max(4 // item, 1)
    if name == "rows":
        tokens, dims = t * dim, d
    elif name == "columns":
        tokens, dims = t, d * page
    elif name == "packed keys":  # [16 tokens of a tile][words of dims][16][a word's dims]
        tokens, dims = t // 16 * 16 * (dim + word) + t % 16 * word, d // word * 16 * word + d % word
    elif name == "packed values":  # [16 dims of a tile][words of tokens][16][a word's tokens]
        tokens, dims = t // word * 16 * word + t % word, d // 16 * 16 * (page + word) + d % 16 * word
    else:
        tokens, dims = (np.array(chance.sample(range(n), n), dtype=np.int64) for n in (page, dim))
        tokens, dims = (tokens - tokens[:1]) * dim, dims - dims[:1]
    return tokens * item, dims * item


@dataclass(frozen=True, eq=False)
class Cache:
    """Pages of a random order in a memory of canaries."""

    pages: Pages
    memory: torch.Tensor  # bytes

    @classmethod
    def draw(
        cls,
        names: tuple[str, str],
        count: int,
        heads: int,
        page: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        seed: int,
    ) -> Cache:
        """Keys and values beside each other in each head or in each page, or apart, with or without gaps."""
        chance, item = random.Random(seed), dtype.itemsize
        grids: list[tuple[int, int, int, Tables]] = []
        two = [order(name, page, dim, item, chance) for name, dim in zip(names, dims, strict=True)]
        sizes = [max(int(np.ptp(t) + np.ptp(d)) + item if d.size else item, item) for t, d in two]
        sizes = [size + item * chance.choice((0, 0, 5)) for size in sizes]
        if chance.random() < 0.5:
            sizes = [-(-size // 64) * 64 for size in sizes]
        start = chance.choice((0, 0, item, 64))
        way = chance.choice(("head", "page", "apart"))
        for i, (tokens, offsets) in enumerate(two):
            before = sizes[0] * i
            if way == "head":
                where = start + before, sum(sizes) * heads, sum(sizes)
            elif way == "page":
                where = start + before * heads, sum(sizes) * heads, sizes[i]
            else:
                where = start + before * heads * count, sizes[i] * heads, sizes[i]
            low = int(tokens.min() + offsets.min(initial=0))
            grids.append((where[0] - low, where[1], where[2], (tokens, offsets)))
        memory = torch.arange(start + sum(sizes) * heads * count + 64).remainder(251).to(torch.uint8)
        made = [Grid(memory.data_ptr() + at, step, head, *two) for at, step, head, two in grids]
        return cls(Pages(made[0], made[1], heads, count, dtype, memory.device, (memory, memory)), memory)

    def places(self, column: int, tokens: int, table: Sequence[int], keys: bool) -> np.ndarray:
        """Bytes of the memory that hold columns of all heads, [heads, tokens, dim, item]."""
        pages, grid = self.pages, self.pages.keys if keys else self.pages.values
        made = np.zeros((pages.heads, tokens, grid.dims.size, pages.dtype.itemsize), dtype=np.int64)
        for head in range(pages.heads):
            for i in range(tokens):
                page, inside = table[(column + i) // pages.page_tokens], (column + i) % pages.page_tokens
                at = grid.address - self.memory.data_ptr() + page * grid.page_step + head * grid.head_step
                made[head, i] = at + int(grid.tokens[inside]) + grid.dims[:, None] + np.arange(pages.dtype.itemsize)
        return made


class Trial:
    """A random move: kind of turn, shapes, orders, blocks, runs."""

    def __init__(self, seed: int, kinds: Sequence[Kind] = KINDS) -> None:
        self.seed, chance, generator = seed, random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind = chance.choice(kinds)
        self.dtype, pairing, rounded = self.kind
        self.turn: Turn | None = None
        key_dim, value_dim = chance.choice((1, 16, 24, 41, 64, 80)), chance.choice((0, 8, 16, 64, 70))
        if chance.random() < 0.5:
            pairs, first = chance.choice((4, 8, 16, 32)), chance.choice((0, 0, 8))
            key_dim = first + 2 * pairs + chance.choice((0, 0, 16))
            self.turn = Turn(*tables(generator, self.kind, POSITIONS, pairs), pairing, rounded, first)
        elif chance.random() < 0.4:
            self.dtype = torch.uint8
        self.heads, self.page = chance.randint(1, 3), chance.choice((1, 3, 8, 16, 32, 48, 128))
        self.dims = (key_dim, chance.choice((key_dim, value_dim)))
        self.names = (chance.choice(list(ORDERS)), chance.choice(list(ORDERS)))
        self.blocks = [self._block(generator, chance.randint(1, 150), chance.randint(0, 33)) for _ in range(2)]
        self.runs, columns = draw_runs(chance, self.blocks, chance.randint(0, 5), POSITIONS)
        self.count = -(-columns // self.page) + 2
        self.table = chance.sample(range(self.count), self.count - chance.randint(1, 2))

    def _block(self, generator: torch.Generator, stride: int, shift: int) -> Block:
        made = []
        for dim in self.dims:
            if self.dtype == torch.uint8:
                memory = torch.randint(0, 256, (shift + self.heads * stride * dim,), generator=generator).to(
                    torch.uint8
                )
            else:
                memory = any_bits(generator, (shift + self.heads * stride * dim,), self.dtype)
            made.append(memory[shift:].view(self.heads, stride, dim))
        if self.turn is not None:  # no NaN, which may come out as another
            made[0].copy_(torch.randn(made[0].shape, generator=generator))
        return Block(*made)

    def cache(self) -> Cache:
        """Filled with canaries."""
        return Cache.draw(self.names, self.count, self.heads, self.page, self.dims, self.dtype, self.seed)

    def right(self) -> Cache:
        """What the cache must be once the blocks' runs are in it."""
        cache = self.cache()
        for row in self.runs.tolist():
            block = next(block for block in self.blocks if block.keys.data_ptr() == row[0])
            part = slice(row[3], row[3] + row[4])
            keys, values = block.keys[:, part], block.values[:, part]
            if self.turn is not None:
                keys = turned(keys, self.turn, torch.arange(row[5], row[5] + row[4]))
            for given, is_keys in ((keys, True), (values, False)):
                places = cache.places(row[6], row[4], self.table, is_keys)
                cache.memory[torch.from_numpy(places)] = as_bytes(given).view(places.shape)
        return cache

    def taken(self, cache: Cache) -> list[Block]:
        """What the blocks must be once the runs are taken into them, from a cache that holds anything."""
        made = [Block(block.keys.clone(), block.values.clone()) for block in self.blocks]
        for row in self.runs.tolist():
            number = next(i for i, block in enumerate(self.blocks) if block.keys.data_ptr() == row[0])
            part = slice(row[3], row[3] + row[4])
            for into, is_keys in ((made[number].keys, True), (made[number].values, False)):
                found = cache.memory[torch.from_numpy(cache.places(row[6], row[4], self.table, is_keys))]
                into[:, part] = found.flatten().view(self.dtype).view(into[:, part].shape)
        return made


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """In a row."""
    return tensor.contiguous().flatten().view(torch.uint8)


def same_blocks(made: Sequence[Block], right: Sequence[Block]) -> bool:
    """Bit for bit."""
    pairs = [
        pair for one, two in zip(made, right, strict=True) for pair in ((one.keys, two.keys), (one.values, two.values))
    ]
    return all(torch.equal(as_bytes(one), as_bytes(two)) for one, two in pairs)
