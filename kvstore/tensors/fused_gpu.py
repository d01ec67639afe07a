"""Attention over weighted sums of sources on the GPU, in one pass over them; with few rows, in splits of the context.

Needs Triton. Under Triton's interpreter (``TRITON_INTERPRET=1`` before the first import) the addresses are the host's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstore.tensors import fused_triton
from kvstore.tensors.fusion import Fusion, additive

KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
WIDEST = 16  # bytes of the widest access of a thread
MOST_ROWS, FEWEST_ROWS = 64, 16  # of a program
TILE_BYTES = 8192  # of one source that a program reads at a time; more, and registers spill
ROW_BYTES = 128  # of a token of one source, up to which four warps are enough
LONGEST_TILE = 64  # tokens
SPLIT_TOKENS = 256  # that a split has at least
WAVES = 2  # programs for each multiprocessor, from which on the context is not split
PROCESSORS = 132  # where there is no device to ask


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
    queries = queries.contiguous()
    weights = [part.detach().to(queries.device, torch.float32).contiguous() for part in (fusion.keys, fusion.values)]
    if mask is not None and mask.dtype != torch.bool:
        mask = additive(mask, mask.shape[2], mask.shape[3], weights[0])
    batch, heads, tokens = queries.shape[:3]
    made = queries.new_empty(batch, tokens, heads, values[0].shape[3])
    if not made.numel():
        return made
    constants = form(queries, keys, values, mask)
    kv_heads, context = keys[0].shape[1:3]
    tiles = triton.cdiv(tokens * (heads // kv_heads), constants["ROWS"])
    splits, split_tokens = split(tiles * batch * kv_heads, context, constants["TILE"], queries.device)
    parts, sums = made, made
    if splits > 1:
        parts = weights[0].new_empty(splits, *made.shape)
        sums = weights[0].new_empty(splits, *made.shape[:3])
    addresses = _addresses(queries, keys, values, weights, mask, parts, sums)
    counts = batch, kv_heads, heads // kv_heads, tokens, context, split_tokens, scaling * math.log2(math.e)
    grid = tiles, batch * kv_heads, splits
    with torch.cuda.device_of(queries):
        fused_triton.attend[grid](*addresses, *counts, **constants, SPLIT=splits > 1, **options(constants))
        if splits > 1:
            rows, kind = batch * tokens * heads, {"DIM": made.shape[3], "KIND": constants["KIND"]}
            given = parts.data_ptr(), sums.data_ptr(), made.data_ptr(), rows, splits
            fused_triton.combine[(rows,)](*given, **kind, num_warps=1)
    return made


def _alike(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sources of equal strides, whose last is 1."""
    if all(state.stride() == states[0].stride() for state in states):
        return states
    return [state.contiguous() for state in states]


def form(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None) -> dict[str, Any]:
    """The kernel's constants but for SPLIT; each set of them is compiled for itself."""
    key_dim, value_dim = keys[0].shape[3], values[0].shape[3]
    rows = queries.shape[2] * (queries.shape[1] // keys[0].shape[1])
    widest = triton.next_power_of_2(max(key_dim, value_dim)) * queries.itemsize
    bits = 0
    for tensor in (queries, *keys, *values):
        bits |= tensor.data_ptr()
        for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            bits |= step * tensor.itemsize if size > 1 else 0
    return {
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_SOURCES": len(keys),
        "VALUE_SOURCES": len(values),
        "KIND": KINDS[queries.dtype],
        "ALIGNED": min(bits & -bits, WIDEST) or WIDEST,
        "MASK": "causal" if mask is None else "bool" if mask.dtype == torch.bool else "bias",
        "ROWS": FEWEST_ROWS if rows <= FEWEST_ROWS or queries.itemsize > 2 else MOST_ROWS,
        "TILE": max(16, min(LONGEST_TILE, TILE_BYTES // widest)),
    }


def options(constants: dict[str, Any]) -> dict[str, int]:
    """Of the compiler, for a form: as many warps as hold a tile of all sources in their registers."""
    widest = triton.next_power_of_2(max(constants["KEY_DIM"], constants["VALUE_DIM"]))
    wide = widest * constants["KIND"].primitive_bitwidth // 8 > ROW_BYTES
    many = max(constants["KEY_SOURCES"], constants["VALUE_SOURCES"]) > 2
    return {"num_warps": 8 if wide or many else 4, "num_stages": 2}


def split(programs: int, context: int, tile: int, device: torch.device) -> tuple[int, int]:
    """How many splits of the context keep a GPU busy, and the tokens of each: whole tiles."""
    processors = PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(WAVES * processors, programs)
    tokens = max(SPLIT_TOKENS, triton.cdiv(context, wanted))
    tokens = triton.cdiv(tokens, tile) * tile
    return max(1, triton.cdiv(context, tokens)), tokens


def _addresses(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[Tensor],
    mask: Tensor | None,
    parts: Tensor,
    sums: Tensor,
) -> list[int]:
    """The kernel's arguments up to its counts: addresses, then steps in bytes."""
    found = [queries.data_ptr()]
    for states in (keys, values):
        found += [state.data_ptr() for state in states] + [0] * (4 - len(states))
    found += [part.data_ptr() for part in weights]
    found += [0 if mask is None else mask.data_ptr(), parts.data_ptr(), sums.data_ptr()]
    for tensor in (keys[0], values[0]):
        found += [step * tensor.itemsize for step in tensor.stride()[:3]]
    if mask is None:
        return [*found, 0, 0, 0]
    first, _, second, third = (step * mask.itemsize for step in mask.stride())
    return [*found, first if mask.shape[0] > 1 else 0, second, third]
