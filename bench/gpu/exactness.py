"""The device's kernel beside plain torch: every dtype, pairing, arithmetic and kind of target, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from kvstore.bench.gpu.setting import Figure, Setting
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn, turned
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import transfer

Transfer = Callable[[np.ndarray, Turn | None, Target], None]
Case = tuple[torch.dtype, str, bool, bool, int, int]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FAR = 131_000  # a position near the end of a context of 128k tokens


def measure(setting: Setting) -> Iterator[Figure]:
    """``exact_cases`` that were tried, whether all are ``bit_equal``, and whether the comparison sees a wrong turn."""
    name, transfer = kernel(setting)
    setting.notes.append(f"exactness: checked the {name}")
    yield from compared(setting, transfer)


def compared(setting: Setting, transfer: Transfer) -> Iterator[Figure]:
    """The figures of one kernel."""
    differing, tried, blind = [], 0, []
    for case in cases(setting):
        tried += 1
        made, expected, off = tried_case(setting, transfer, case)
        if not same(made, expected):
            differing.append(case)
        if same(made, off):
            blind.append(case)
    setting.notes.extend(f"exactness: {case} differs" for case in differing)
    yield Figure("exact_cases", float(tried))
    yield Figure("bit_equal", not differing)
    yield Figure("one_position_off_is_noticed", not blind)


def kernel(setting: Setting) -> tuple[str, Transfer]:
    """The kernel of this device: Triton's where it runs, else what ``transfer`` chooses."""
    if setting.triton:
        from kvstore.tensors import rope_gpu

        return "Triton kernel" if setting.cuda else "Triton kernel in its interpreter", rope_gpu.transfer
    return "kernel that transfer() chooses", transfer


def cases(setting: Setting) -> Iterator[Case]:
    """Dtype, pairing, whether as the model rounds, whether paged, key dim, first dim that turns."""
    for dtype, pairing, rounded, paged in itertools.product(DTYPES, (HALF, INTERLEAVED), (True, False), (False, True)):
        if rounded or dtype != torch.float32:
            dims: tuple[tuple[int, int], ...] = ((24, 8),) if paged else ((16, 0),)
            if not setting.small:
                dims = ((64, 0), (128, 32), (128, 0), (96, 0))[: 4 if dtype == torch.bfloat16 else 2]
            yield from ((dtype, pairing, rounded, paged, dim, first) for dim, first in dims)


def tried_case(setting: Setting, transfer: Transfer, case: Case) -> tuple[Any, Any, Any]:
    """The target as the kernel left it, as it must be, and as it would be one position further."""
    dtype, pairing, rounded, paged, dim, first = case
    heads, stride, tokens = (2, 8, (8, 5)) if setting.small else (8, 256, (256, 256, 77))
    far = 900 if setting.small else FAR
    device, generator = setting.device, torch.Generator().manual_seed(dim + first)
    blocks = (4 * torch.randn((len(tokens), 2, heads, stride, dim), generator=generator)).to(device, dtype)
    columns = sum(tokens) + 3  # some before and behind that nobody may touch
    turn = tables(setting, dtype, pairing, rounded, (dim - first) // 2, far + columns + 1)
    turn = Turn(turn.cos, turn.sin, pairing, rounded, first)
    runs, column = [], 1
    for block, count in zip(blocks, tokens, strict=True):
        position = column if column == 1 else far + column
        runs.append((block[0].data_ptr(), block[1].data_ptr(), stride, 0, count, position, column))
        column += count
    target = _target(setting, paged, heads, columns, dim, dtype)
    before = [flat(target, tensor)[:, :columns].clone() for tensor in (target.keys, target.values)]
    transfer(np.array(runs, dtype=np.int64), turn, target)
    setting.settle()
    wanted = []
    for shift in (0, 1):
        keys, values = (tensor.clone() for tensor in before)
        for block, run in zip(blocks, runs, strict=True):
            count, position, column = run[4:]
            positions = torch.arange(position, position + count, device=device) + shift
            keys[:, column : column + count] = turned(block[0, :, :count], turn, positions)
            values[:, column : column + count] = block[1, :, :count]
        wanted.append((keys, values))
    made = tuple(flat(target, tensor)[:, :columns] for tensor in (target.keys, target.values))
    return made, wanted[0], wanted[1]


def tables(setting: Setting, dtype: torch.dtype, pairing: str, rounded: bool, pairs: int, positions: int) -> Turn:
    """Cosines and sines as a model with base 500,000 has them."""
    rates = 500_000.0 ** (-torch.arange(pairs, device=setting.device, dtype=torch.float32) / pairs)
    angles = torch.arange(positions, device=setting.device, dtype=torch.float32)[:, None] * rates
    kept = dtype if rounded else torch.float32
    return Turn(angles.cos().to(kept), angles.sin().to(kept), pairing, rounded)


def _target(setting: Setting, paged: bool, heads: int, columns: int, dim: int, dtype: torch.dtype) -> Target:
    device = setting.device
    if not paged:
        keys, values = (torch.full((heads, columns, dim), 7.0, dtype=dtype, device=device) for _ in range(2))
        return Target(keys, values)
    size = 4 if setting.small else 16
    count = -(-columns // size)
    order = torch.randperm(count + 2, generator=torch.Generator().manual_seed(columns))[:count].to(device)
    keys, values = (torch.full((count + 2, size, heads, dim), 7.0, dtype=dtype, device=device) for _ in range(2))
    return Target(keys, values, order)


def flat(target: Target, tensor: torch.Tensor) -> torch.Tensor:
    """One of the target's tensors as [heads, columns, dim], whatever it is."""
    if target.pages is None:
        return tensor
    return tensor[target.pages].flatten(0, 1).transpose(0, 1)


def same(one: Any, other: Any) -> bool:
    """Whether all bits are equal."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
