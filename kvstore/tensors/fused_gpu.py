"""Attention over weighted sums of sources on the GPU, in one pass over them; with few rows, in splits of the context.

Needs Triton. Under Triton's interpreter (``TRITON_INTERPRET=1`` before the first import) the addresses are the host's.
A token behind a long context is little work, so what Python does here is a large part of its time: no call more than
needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstore.tensors import fused_sums, fused_triton
from kvstore.tensors.fusion import Fusion, additive

KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}
WIDEST = 16  # bytes of the widest access of a thread
FEW_ROWS = 16  # that one program takes alone
SPLIT_TOKENS = 128  # that a split has at least
WAVES = 1  # programs for each multiprocessor, up to which the context is split
LOG2_E = math.log2(math.e)
# Rows and tokens of a tile of a program, its warps, and how many tiles are on their way: the first that has room.
FEW = ((16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2))
MANY = ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 2))
WIDE = ((16, 32, 8, 2), (16, 16, 8, 2))  # float32, which has no matrix units to feed
SUM_BYTES = 8192  # of one source that a program sums
MOST_NUMBERS = 128  # of what is found, in each thread


class Chip(NamedTuple):
    """What of a device decides how work is cut."""

    processors: int
    shared: int  # bytes that a program may have


LEAST = Chip(132, 99 << 10)  # where there is no device to ask: what every GPU has that multiplies bfloat16


@cache
def chip(device: torch.device) -> Chip:
    """Of a device."""
    if device.type != "cuda":
        return LEAST
    found = torch.cuda.get_device_properties(device)
    return Chip(found.multi_processor_count, int(getattr(found, "shared_memory_per_block_optin", LEAST.shared)))


def attend(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    fusion: Fusion,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """``fused_attention.attend`` without gradients, for what that has checked, of 16 or 32 bits.

    One launch on the current stream, or two; nothing waits. Sources that are not strided as the first are copied.
    The first call for a number of sources, dims, dtype, alignment and kind of mask compiles for seconds; no number of
    tokens, heads or sequences does, but few rows compile apart from many.
    """
    keys, values = _alike(keys), _alike(values)
    if not queries.is_contiguous():
        queries = queries.contiguous()
    device = queries.device
    key_weights, value_weights = _weights(fusion.keys, device), _weights(fusion.values, device)
    if mask is not None and mask.dtype != torch.bool:
        mask = additive(mask, mask.shape[2], mask.shape[3], key_weights)
    batch, heads, tokens, _ = queries.shape
    _, kv_heads, context, value_dim = values[0].shape
    made = queries.new_empty((batch, tokens, heads, value_dim))
    if not made.numel():
        return made
    here, groups = chip(device), heads // kv_heads
    constants, launch = form(queries, keys, values, mask, here)
    tiles = -(-tokens * groups // constants["ROWS"])
    splits, split_tokens = split(tiles * batch * kv_heads, context, constants["TILE"], here.processors)
    parts = sums = made
    if splits > 1:
        room = torch.empty(splits * batch * tokens * heads * (value_dim + 1), dtype=torch.float32, device=device)
        parts, sums = room, room[splits * batch * tokens * heads * value_dim :]
    weights = key_weights.data_ptr(), value_weights.data_ptr()
    given = (*_sources(keys), *_sources(values), *weights, 0 if mask is None else mask.data_ptr())
    steps = (*_steps(keys[0]), *_steps(values[0]), *((0, 0, 0) if mask is None else _mask_steps(mask)))
    counts = batch, kv_heads, groups, tokens, context, split_tokens, scaling * LOG2_E
    addresses = queries.data_ptr(), *given, parts.data_ptr(), sums.data_ptr()
    with torch.cuda.device_of(queries):
        fused_triton.attend[(tiles, batch * kv_heads, splits)](
            *addresses, *steps, *counts, **constants, SPLIT=splits > 1, **launch
        )
        if splits > 1:
            rows, kind = batch * tokens * heads, {"DIM": value_dim, "KIND": constants["KIND"], "TOGETHER": 16}
            fused_sums.combine[(rows,)](parts.data_ptr(), sums.data_ptr(), made.data_ptr(), rows, splits, **kind)
    return made


def rebuilt(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``fusion.rebuilt`` without gradients, of 16 or 32 bits, bit for bit: one launch on the current stream."""
    states, first = _alike(states), states[0]
    batch, heads, tokens, dim = first.shape
    made = first.new_empty(first.shape)
    kind = {"DIM": dim, "SOURCES": len(states), "KIND": KINDS[first.dtype], "ALIGNED": _aligned(states)}
    tile = max(1, SUM_BYTES // (triton.next_power_of_2(dim) * BYTES[first.dtype]))
    given = *_sources(states), _weights(weights, first.device).data_ptr(), made.data_ptr(), *_steps(states[0])
    if made.numel():
        with torch.cuda.device_of(first):
            grid = -(-tokens // tile), batch * heads
            fused_sums.rebuild[grid](*given, heads, tokens, **kind, TILE=tile, num_warps=4, enable_fp_fusion=False)
    return made


def form(
    queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None, here: Chip = LEAST
) -> tuple[dict[str, Any], dict[str, int]]:
    """The kernel's constants but for SPLIT, each set of which is compiled for itself; and how it is compiled."""
    (_, heads, tokens, key_dim), (_, kv_heads, _, value_dim) = queries.shape, values[0].shape
    item, widest = BYTES[queries.dtype], triton.next_power_of_2(max(16, key_dim, value_dim))
    few = tokens * heads <= FEW_ROWS * kv_heads
    fits = WIDE if item > 2 else FEW if few else MANY
    for rows, tile, warps, stages in fits:
        tiles = rows * len(keys) + stages * tile * (len(keys) + len(values))
        numbers = rows * widest * len(values) // (32 * warps)
        if tiles * widest * item <= here.shared and numbers <= MOST_NUMBERS:
            break
    constants = {
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_SOURCES": len(keys),
        "VALUE_SOURCES": len(values),
        "KIND": KINDS[queries.dtype],
        "ALIGNED": _aligned((queries,), keys, values),
        "MASK": "causal" if mask is None else "bool" if mask.dtype == torch.bool else "bias",
        "ROWS": rows,
        "TILE": tile,
    }
    return constants, {"num_warps": warps, "num_stages": stages}


def split(programs: int, context: int, tile: int, processors: int) -> tuple[int, int]:
    """How many splits of the context keep a GPU busy, and the tokens of each: whole tiles."""
    wanted = max(1, WAVES * processors // programs)
    tokens = max(SPLIT_TOKENS, -(-context // wanted))
    tokens = -(-tokens // tile) * tile
    return max(1, -(-context // tokens)), tokens


def _alike(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sources of equal strides, whose last is 1."""
    strides = states[0].stride()
    if all(state.stride() == strides for state in states[1:]):
        return states
    return [state.contiguous() for state in states]


def _weights(weights: Tensor, device: torch.device) -> Tensor:
    """As the kernels read them."""
    if weights.dtype == torch.float32 and weights.device == device and weights.is_contiguous():
        return weights
    return weights.detach().to(device, torch.float32).contiguous()


def _aligned(several: Sequence[Tensor], *others: Sequence[Tensor]) -> int:
    """The widest access that suits all of these, in bytes; each sequence is strided as its first."""
    bits, item = WIDEST, BYTES[several[0].dtype]
    for tensors in (several, *others):
        for tensor in tensors:
            bits |= tensor.data_ptr()
        first, second, third, _ = tensors[0].stride()
        batch, heads, tokens, _ = tensors[0].shape
        steps = first if batch > 1 else 0
        bits |= (steps | (second if heads > 1 else 0) | (third if tokens > 1 else 0)) * item
    return bits & -bits


def _sources(states: Sequence[Tensor]) -> tuple[int, ...]:
    """Addresses of up to four."""
    return (*(state.data_ptr() for state in states), 0, 0, 0)[:4]


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    """From sequence to sequence, head to head and token to token, in bytes."""
    first, second, third, _ = tensor.stride()
    item = tensor.itemsize
    return first * item, second * item, third * item


def _mask_steps(mask: Tensor) -> tuple[int, int, int]:
    """From sequence to sequence, token to token and column to column, in bytes."""
    first, _, second, third = mask.stride()
    item = mask.itemsize
    return first * item if mask.shape[0] > 1 else 0, second * item, third * item
