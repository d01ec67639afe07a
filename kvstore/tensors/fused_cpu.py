"""The kernel of ``fused_attention`` for the CPU, compiled: each source is read once, and only a tile's sums are made.

Sums, scores and the running softmax are in float32. One thread takes some pairs of a sequence and a kv head; all query
heads of that kv head, and all query tokens, are rows that share what is read. Import this where the time does not
matter that numba takes to load, as ``Compiled`` does.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kvstore.compiled import nogil
from kvstore.tensors import lanes
from kvstore.tensors.geometry import FLOAT16, FLOAT32
from kvstore.tensors.lanes import F32, Lanes

TILE = 64  # tokens whose sums are made at a time; a multiple of four
FORM_BITS = 2
WIDE = 16  # channels in a vector
FAST = {"contract", "nsz", "reassoc"}  # infinities and NaN stay what they are
LOWEST = np.float32(-126)  # what is below is zero, as a power of two
SOURCES = types.Array(types.int64, 2, "C")
FLOATS = {dims: types.Array(types.float32, dims, "C") for dims in (3, 4)}
SIGNATURE = types.void(
    FLOATS[4], SOURCES, SOURCES, FLOATS[3], FLOATS[3], FLOATS[3], types.int64, types.int64, types.int64, FLOATS[4]
)
# 2^x = sum_i POWERS[i] x^i for 0 <= x < 1, to 2e-9 of it: interpolated at the Chebyshev points of the interval.
POWERS = tuple(
    np.float32(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp2, 6, [0, 1]).convert(kind=np.polynomial.Polynomial).coef
)


@intrinsic(prefer_literal=True)
def add_scaled(context: Any, form: Any, count: Any, first: Any, target: Any, factors: Any, source: Any) -> Any:
    """``target += factors * source`` for ``count`` channels, or ``=`` for the first; of float32, but the source."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        vector = Lanes(builder, form.literal_value, count.literal_value)
        if vector.count > 1:
            vector.prefetch(args[5], lanes.LINE)
        widened = vector.wide(vector.load(args[5], lanes.STORED[vector.dtype], vector.count))
        made = builder.fmul(widened, vector.load(args[4], F32, vector.count))
        if not first.literal_value:
            made = builder.fadd(vector.load(args[3], F32, vector.count), made)
        vector.store(made, args[3])

    return types.void(form, count, first, *[types.int64] * 3), emit


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), emit


@njit(inline="always")
def add_row(dtype: int, first: bool, dim: int, target: int, factors: int, source: int) -> None:
    """``add_scaled`` for all channels of a token; ``dtype`` and ``first`` are written out."""
    item = 4 if dtype == FLOAT32 else 2
    d = 0
    while d + WIDE <= dim:
        add_scaled(dtype, WIDE, first, target + 4 * d, factors + 4 * d, source + item * d)
        d += WIDE
    while d < dim:
        add_scaled(dtype, 1, first, target + 4 * d, factors + 4 * d, source + item * d)
        d += 1


@njit(inline="always")
def add(dtype: int, sources: Any, weights: Any, batch: int, head: int, start: int, count: int, tile: Any) -> None:
    """The sums of ``count`` tokens from ``start`` on, and zeros behind them; ``dtype`` is written out."""
    dim = tile.shape[1]
    tile[count:] = 0
    for j in range(sources.shape[0]):
        source = sources[j, 0] + batch * sources[j, 1] + head * sources[j, 2] + start * sources[j, 3]
        target, factors = tile.ctypes.data, weights[j, head].ctypes.data
        for _ in range(count):
            if j == 0:
                add_row(dtype, True, dim, target, factors, source)
            else:
                add_row(dtype, False, dim, target, factors, source)
            source, target = source + sources[j, 3], target + 4 * dim


@njit(nogil=True, fastmath=FAST)
def power(x: Any) -> Any:
    """2^x for x <= 0, and NaN for NaN."""
    clipped = x if x > LOWEST else LOWEST
    whole = np.floor(clipped)
    f = clipped - whole
    c = POWERS
    made = c[0] + f * (c[1] + f * (c[2] + f * (c[3] + f * (c[4] + f * (c[5] + f * c[6])))))
    made *= float_of((np.int32(whole) + np.int32(127)) << np.int32(23))
    if x > LOWEST:
        return made
    return np.float32(0) if x <= LOWEST else x


@njit(nogil=True, fastmath=FAST)
def score(rows: Any, tile: Any, scores: Any) -> None:
    """Of each row with each token of a tile: [rows, dim] and [TILE, dim] to [rows, TILE]."""
    for r in range(rows.shape[0]):
        for t in range(0, TILE, 4):
            s0 = s1 = s2 = s3 = np.float32(0)
            for d in range(rows.shape[1]):
                q = rows[r, d]
                s0 += q * tile[t, d]
                s1 += q * tile[t + 1, d]
                s2 += q * tile[t + 2, d]
                s3 += q * tile[t + 3, d]
            scores[r, t], scores[r, t + 1], scores[r, t + 2], scores[r, t + 3] = s0, s1, s2, s3


@njit(nogil=True, fastmath=FAST)
def soften(scores: Any, count: int, bias: Any, start: int, highest: Any, total: Any, made: Any) -> None:
    """Scores of ``count`` tokens from ``start`` on become weights, relative to the highest score of their row so far.

    ``bias`` [query tokens, context], or empty. ``highest`` and ``total`` [rows]: of the row until now; ``made`` [rows,
    dim], its sum until now, is scaled to the new highest.
    """
    for r in range(scores.shape[0]):
        if bias.shape[0]:
            for t in range(count):
                scores[r, t] += bias[r % bias.shape[0], start + t]
        top = highest[r]
        for t in range(count):
            top = scores[r, t] if scores[r, t] > top else top
        for t in range(count, TILE):
            scores[r, t] = -np.inf
        if top == -np.inf:
            scores[r] = 0
            continue
        if top > highest[r]:
            scale = power(highest[r] - top)
            total[r] *= scale
            for d in range(made.shape[1]):
                made[r, d] *= scale
            highest[r] = top
        added = np.float32(0)
        for t in range(TILE):
            scores[r, t] = power(scores[r, t] - top)
            added += scores[r, t]
        total[r] += added


@njit(nogil=True, fastmath=FAST)
def gather(weights: Any, tile: Any, made: Any) -> None:
    """``made += weights @ tile``: [rows, TILE] and [TILE, dim] to [rows, dim]."""
    for r in range(weights.shape[0]):
        for t in range(0, TILE, 4):
            w0, w1, w2, w3 = weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            for d in range(made.shape[1]):
                part = w0 * tile[t, d] + w1 * tile[t + 1, d] + w2 * tile[t + 2, d] + w3 * tile[t + 3, d]
                made[r, d] += part


def kernel_for(dtype: int) -> Any:
    """The compiled kernel for sources of a dtype of ``geometry``; any thread may use it.

    ``ImportError``: this processor has none.
    """
    if dtype == FLOAT16:
        machine, _, features = cpu_target.target_context.codegen().magic_tuple()
        if machine.startswith("x86") and "+f16c" not in features:  # LLVM would look for a library, in vain
            raise ImportError("this processor has no conversions of half precision")
    # numba's cache knows a function by this file and what it closes over, so the other file is one of these.
    return nogil(SIGNATURE)(attend_for(dtype + (zlib.crc32(Path(lanes.__file__).read_bytes()) << FORM_BITS)))


def attend_for(form: int) -> Any:
    """What numba compiles for a form: a constant to it, so that only the code for that form is left."""
    dtype = form % (1 << FORM_BITS)

    def attend(
        queries: Any,
        keys: Any,
        values: Any,
        key_weights: Any,
        value_weights: Any,
        bias: Any,
        context: int,
        begin: int,
        end: int,
        made: Any,
    ) -> None:
        kv_heads, rows = queries.shape[1], queries.shape[2]
        room = np.empty(TILE * max(queries.shape[3], made.shape[3]), np.float32)
        key_tile = room[: TILE * queries.shape[3]].reshape(TILE, queries.shape[3])
        value_tile = room[: TILE * made.shape[3]].reshape(TILE, made.shape[3])
        scores = np.empty((rows, TILE), np.float32)
        highest, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
        for pair in range(begin, end):
            batch, head = pair // kv_heads, pair % kv_heads
            own, out = queries[batch, head], made[batch, head]
            seen = bias[batch % bias.shape[0]]
            highest[:], total[:], out[:] = -np.inf, 0, 0
            for start in range(0, context, TILE):
                count = min(TILE, context - start)
                add(dtype, keys, key_weights, batch, head, start, count, key_tile)
                score(own, key_tile, scores)
                soften(scores, count, seen, start, highest, total, out)
                add(dtype, values, value_weights, batch, head, start, count, value_tile)
                gather(scores, value_tile, out)
            for r in range(rows):
                if total[r] > 0:
                    out[r] /= total[r]

    return attend
