"""Blocks in memory, targets between canaries, and what a transfer must make of them, one token at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.tensors.rope import HALF, INTERLEAVED, Turn, turned
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import compiled_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Every kind of turn: keys' dtype, pairing, whether each product and sum is rounded. float32 always is.
KINDS = [(dtype, pairing, True) for dtype in DTYPES for pairing in (HALF, INTERLEAVED)]
KINDS += [(dtype, pairing, False) for dtype in DTYPES[:2] for pairing in (HALF, INTERLEAVED)]
Kind = tuple[torch.dtype, str, bool]
PATIENCE = 120.0  # seconds for a kernel to be compiled


def compile_now(turn: Turn | None, dtype: torch.dtype) -> None:
    """From here on, transfers of this kind are done by the kernel."""
    compiled = compiled_for(turn, dtype)
    assert compiled is not None
    assert compiled.wait(PATIENCE) is not None


def any_bits(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Bit patterns of all kinds: NaN, infinities, denormals and zeros of both signs among them."""
    size = 1 << 8 * dtype.itemsize - 1
    bits = torch.randint(-size, size, tuple(shape), generator=generator)
    small = torch.randint(-3, 4, tuple(shape), generator=generator)  # the smallest denormals, zeros and NaN
    bits = torch.where(torch.rand(tuple(shape), generator=generator) < 0.2, small, bits)
    return bits.to(torch.int32 if dtype.itemsize == 4 else torch.int16).view(dtype)


def tables(
    generator: torch.Generator, kind: Kind, positions: int, pairs: int, wild: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of random angles; ``wild``: of any bits."""
    dtype = kind[0] if kind[2] else torch.float32
    if wild:
        return any_bits(generator, (positions, pairs), dtype), any_bits(generator, (positions, pairs), dtype)
    angles = torch.rand(positions, pairs, generator=generator) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def same(made: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit; but one NaN is as good as another."""
    kind = torch.int32 if made.dtype.itemsize == 4 else torch.int16
    equal = made.contiguous().view(kind) == right.contiguous().view(kind)
    return made.dtype == right.dtype and bool((equal | (made.isnan() & right.isnan())).all())


@dataclass(frozen=True, eq=False)
class Block:
    """Keys and values of one layer, ``[head][stride][dim]``."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def draw(
        cls,
        generator: torch.Generator,
        heads: int,
        stride: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        shift: int = 0,
    ) -> Block:
        """``shift``: items by which its memory is off from where the allocator put it."""
        made = []
        for dim in dims:
            memory = any_bits(generator, (shift + heads * stride * dim,), dtype)
            made.append(memory[shift:].view(heads, stride, dim))
        return cls(*made)

    def run(self, token: int, tokens: int, position: int, column: int) -> list[int]:
        """A row of runs."""
        stride = self.keys.shape[1]
        return [self.keys.data_ptr(), self.values.data_ptr(), stride, token, tokens, position, column]


def array(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Runs."""
    return np.array(rows, dtype=np.int64).reshape(-1, 7)


@dataclass(frozen=True, eq=False)
class Space:
    """A target inside larger memory, all of which was filled with canaries."""

    target: Target
    memory: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def head_major(
        cls, heads: int, columns: int, dims: tuple[int, int], dtype: torch.dtype, rest: tuple[int, int, int] = (1, 2, 3)
    ) -> Space:
        """``rest``: what the memory has beyond the target in heads, columns, dims."""
        memory = tuple(canaries((heads + rest[0], columns + rest[1], dim + rest[2]), dtype) for dim in dims)
        keys, values = (m[rest[0] :, rest[1] :, rest[2] :] for m in memory)
        return cls(Target(keys, values), (memory[0], memory[1]))

    @classmethod
    def paged(
        cls, heads: int, pages: Sequence[int], page: int, dims: tuple[int, int], dtype: torch.dtype, rest: int = 1
    ) -> Space:
        """``rest``: heads that the memory has and the target does not."""
        memory = tuple(canaries((max(pages, default=0) + 2, page, heads + rest, dim), dtype) for dim in dims)
        keys, values = (m[:, :, rest:] for m in memory)
        return cls(Target(keys, values, torch.tensor(pages, dtype=torch.int64)), (memory[0], memory[1]))

    def equals(self, other: Space) -> bool:
        """Target and canaries."""
        return all(same(mine, its) for mine, its in zip(self.memory, other.memory, strict=True))


def canaries(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Numbers that no transfer makes by chance in all places."""
    return torch.arange(torch.Size(shape).numel()).remainder(97).to(dtype).view(tuple(shape))


def put(target: Target, blocks: Sequence[Block], runs: np.ndarray, turn: Turn | None) -> None:
    """What ``transfer`` must do, token by token."""
    for row in runs.tolist():
        block = next(block for block in blocks if block.keys.data_ptr() == row[0])
        for i in range(row[4]):
            token, position, column = row[3] + i, row[5] + i, row[6] + i
            keys = block.keys[:, token : token + 1]
            if turn is not None:
                keys = turned(keys, turn, torch.tensor([position]))
            for into, given in ((target.keys, keys), (target.values, block.values[:, token : token + 1])):
                if target.pages is None:
                    into[:, column] = given[:, 0]
                else:
                    page = int(target.pages[column // into.shape[1]])
                    into[page, column % into.shape[1]] = given[:, 0]


def draw_runs(chance: random.Random, blocks: Sequence[Block], count: int, positions: int) -> tuple[np.ndarray, int]:
    """Runs of any part of the blocks, with gaps between their columns; and the columns that they need."""
    rows, column = [], 0
    for _ in range(count):
        block = chance.choice(blocks)
        stride = block.keys.shape[1]
        token = chance.randint(0, stride - 1)
        tokens = min(chance.randint(0, stride - token), positions)
        column += chance.choice((0, 0, 1, 7))
        rows.append(block.run(token, tokens, chance.randint(0, positions - tokens), column))
        column += tokens
    order = chance.sample(range(count), count)
    return array([rows[i] for i in order]), column
