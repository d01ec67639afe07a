"""Triton kernels that sum: what was found in splits of a context, and sources themselves.

Addresses, and strides in bytes, are integers. Annotations are Triton's own.
"""

import triton
import triton.language as tl

from kvstore.tensors.fused_tiles import dims_of, narrow, tile_of, weights_of


@triton.jit(do_not_specialize=range(5))
def combine(
    parts: tl.int64,
    sums: tl.int64,
    made: tl.int64,
    rows: tl.int64,
    splits: tl.int32,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """One row of all splits: each part weighs as much as what it saw. ``sums``: log2 of that, [splits, rows].

    ``TOGETHER``: splits that are read at a time, because waiting for memory is all that this does.
    """
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, triton.next_power_of_2(DIM))
    highest, total = -float("inf"), 0.0
    out = tl.zeros([dims.shape[0]], tl.float32)
    for first in range(0, splits, TOGETHER):
        split = first + tl.arange(0, TOGETHER)
        place = split * rows + row
        seen = tl.load(sums.to(tl.pointer_type(tl.float32)) + place, mask=split < splits, other=-float("inf"))
        wanted = (split < splits)[:, None] & (dims < DIM)[None, :]
        part = tl.load(
            parts.to(tl.pointer_type(tl.float32)) + place[:, None] * DIM + dims[None, :], mask=wanted, other=0
        )
        top = tl.maximum(highest, tl.max(seen, 0))
        base = tl.where(top == -float("inf"), 0.0, top)
        fade, weight = tl.exp2(highest - base), tl.exp2(seen - base)
        out = out * fade + tl.sum(part * weight[:, None], 0)
        total, highest = total * fade + tl.sum(weight, 0), top
    out = out / tl.where(total == 0, 1.0, total)
    tl.store(made.to(tl.pointer_type(KIND)) + row * DIM + dims, narrow(out, KIND), mask=dims < DIM)


@triton.jit(do_not_specialize=range(11))
def rebuild(
    s0: tl.int64,
    s1: tl.int64,
    s2: tl.int64,
    s3: tl.int64,
    weights: tl.int64,
    made: tl.int64,
    batch_step: tl.int64,
    head_step: tl.int64,
    token_step: tl.int64,
    heads: tl.int32,
    tokens: tl.int32,
    DIM: tl.constexpr,
    SOURCES: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The weighted sum of up to four sources, [sequences, heads, tokens, dim]: rounded once, no multiply-add.

    Programs: tiles of tokens, by sequences and heads.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    token = first + tl.arange(0, TILE)
    live = token < tokens
    move = batch * batch_step + head * head_step + first * token_step
    w = weights_of(weights, head, heads, DIM, SOURCES)
    total = tile_of(s0 + move, token_step, live, DIM, KIND, ALIGNED, False).to(tl.float32) * w[0]
    if SOURCES > 1:
        total += tile_of(s1 + move, token_step, live, DIM, KIND, ALIGNED, False).to(tl.float32) * w[1]
    if SOURCES > 2:
        total += tile_of(s2 + move, token_step, live, DIM, KIND, ALIGNED, False).to(tl.float32) * w[2]
    if SOURCES > 3:
        total += tile_of(s3 + move, token_step, live, DIM, KIND, ALIGNED, False).to(tl.float32) * w[3]
    dims = dims_of(DIM)
    places = (tl.program_id(1).to(tl.int64) * tokens + token)[:, None] * DIM + dims[None, :]
    tl.store(made.to(tl.pointer_type(KIND)) + places, narrow(total, KIND), mask=live[:, None] & (dims < DIM)[None, :])
