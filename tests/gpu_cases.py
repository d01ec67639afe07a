"""Blocks, runs and targets on a GPU, or on the CPU for Triton's interpreter, and what a transfer must make of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore.tensors import rope_gpu
from kvstore.tensors.rope import Turn, turned
from kvstore.tensors.runs import Target

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = 2
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Case:
    """Blocks, runs of them in any order that fill some columns of a target, and what the target must hold then."""

    dtype: torch.dtype
    dims: tuple[int, int]
    generator: np.random.Generator
    page_tokens: int = 0
    columns: int = 50
    heads: int = HEADS
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)  # block, stride, token, tokens, position, column

    def noise(self, *shape: int) -> torch.Tensor:
        numbers = torch.from_numpy(self.generator.standard_normal(shape).astype(np.float32))
        return numbers.to(self.dtype).to(DEVICE)

    def add(self, stride: int, token: int, tokens: int, position: int, column: int) -> None:
        self.blocks.append((self.noise(self.heads, stride, self.dims[0]), self.noise(self.heads, stride, self.dims[1])))
        self.rows.append((len(self.blocks) - 1, stride, token, tokens, position, column))

    def fill(self, positions: int) -> None:
        """Runs of random lengths, with gaps between some, in random order."""
        column = 0
        while column < self.columns:
            tokens = int(self.generator.integers(0, min(9, self.columns - column) + 1))
            token, room = (int(n) for n in self.generator.integers(0, 4, 2))
            position = int(self.generator.integers(0, positions - tokens + 1))
            self.add(token + tokens + room, token, tokens, position, column)
            column += tokens + int(self.generator.integers(0, 3))
        self.generator.shuffle(self.rows)

    def runs(self) -> np.ndarray:
        found = [(self.blocks[n][0].data_ptr(), self.blocks[n][1].data_ptr(), *rest) for n, *rest in self.rows]
        return np.array(found, dtype=np.int64).reshape(-1, 7)

    def target(self) -> Target:
        """Noise, in the middle of more noise."""
        if not self.page_tokens:
            keys, values = (self.noise(self.heads + 2, self.columns + 3, dim) for dim in self.dims)
            return Target(keys[1:-1, 2:-1], values[1:-1, 2:-1])
        count = -(-self.columns // self.page_tokens)
        keys, values = (self.noise(count + 2, self.page_tokens, self.heads + 1, dim) for dim in self.dims)
        pages = torch.from_numpy(self.generator.permutation(count + 2)[:count]).to(DEVICE)
        return Target(keys[:, :, 1:], values[:, :, 1:], pages)

    def right(self, turn: Turn | None, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """All the memory of keys and of values, as it must be after the transfer."""
        made = []
        for kind, tensor in enumerate((target.keys, target.values)):
            whole = memory(tensor).clone()
            copy = torch.as_strided(whole, tensor.shape, tensor.stride(), tensor.storage_offset())
            for block, _, token, tokens, position, column in self.rows:
                part = self.blocks[block][kind][:, token : token + tokens]
                if kind == 0 and turn is not None:
                    part = turned(part, turn, torch.arange(position, position + tokens, device=DEVICE))
                if target.pages is None:
                    copy[:, column : column + tokens] = part
                    continue
                for i in range(tokens):
                    page, inside = divmod(column + i, self.page_tokens)
                    copy[int(target.pages[page]), inside] = part[:, i]
            made.append(whole)
        return made[0], made[1]


def memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, but for what kind of NaN a NaN is."""
    if one.is_floating_point() and one.dtype.itemsize > 1 and torch.isnan(one).any():
        nan = torch.isnan(one)
        if not torch.equal(nan, torch.isnan(other)):
            return False
        one, other = one[~nan], other[~nan]
    bits = BITS[one.dtype.itemsize]
    return torch.equal(one.view(bits), other.view(bits))


def made_right(case: Case, turn: Turn | None, given: Turn | None = None) -> bool:
    """Whether the kernel, given ``given`` or ``turn``, does what ``turn`` says, and no more."""
    target = case.target()
    right = case.right(turn, target)
    rope_gpu.transfer(case.runs(), given or turn, target)
    return same(memory(target.keys), right[0]) and same(memory(target.values), right[1])


def tables(
    generator: np.random.Generator,
    positions: int,
    pairs: int,
    dtype: torch.dtype,
    pairing: str,
    rounded: bool,
    first: int,
) -> Turn:
    angles = torch.from_numpy(generator.uniform(-9, 9, (positions, pairs)).astype(np.float32))
    kind = dtype if rounded else torch.float32
    return Turn(angles.cos().to(kind).to(DEVICE), angles.sin().to(kind).to(DEVICE), pairing, rounded, first)
