"""The kernel for the CPU, compiled: turns keys and copies values in one pass over memory, without Python's lock.

Numba compiles the loops over runs, heads and rows; ``lanes`` gives the code for a vector of pairs. Import this where
the time does not matter that numba takes to load, as ``Compiled`` does.

Large layers are written past the caches, because nobody finds them there later: rows are turned into a small stage,
which stays in the core's own cache, and go to the target in whole cache lines. So rows may have any width and place.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kvstore.compiled import nogil
from kvstore.tensors import lanes
from kvstore.tensors.geometry import FLOAT16, FLOAT32, INTERLEAVED, NO_TURN, PAST_CACHES, ROUNDED, Geometry, Kernel
from kvstore.tensors.lanes import I32, I64, LINE, Lanes

STAGE = 8192  # bytes
FORM_BITS = 8
SIGNATURE = types.int64(
    types.Array(types.int64, 2, "C"), types.Array(types.int64, 1, "C"), types.NamedUniTuple(types.int64, 19, Geometry)
)


@intrinsic(prefer_literal=True)
def turn_pairs(
    context: Any, form: Any, count: Any, pair: Any, pairs: Any, source: Any, cos: Any, sin: Any, target: Any
) -> Any:
    """``lanes.turn_pairs`` for ``count`` pairs."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        lanes.turn_pairs(Lanes(builder, form.literal_value % (1 << FORM_BITS), count.literal_value), *args[2:])

    return types.void(form, count, *[types.int64] * 6), emit


@intrinsic(prefer_literal=True)
def stream(context: Any, count: Any, target: Any, source: Any) -> Any:
    """``count`` cache lines to an address of whole lines, past the caches."""
    size = count.literal_value * LINE

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        line = Lanes(builder, FLOAT32, LINE // 4)
        line.prefetch(args[2], size)
        for start in range(0, size, LINE):
            to, of = (builder.add(address, ir.Constant(I64, start)) for address in args[1:])
            line.store(line.load(of, I32, line.count), to, past_caches=True)

    return types.void(count, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def copy_words(context: Any, count: Any, target: Any, source: Any) -> Any:
    """``count`` words of 32 bits; a number that is written out, as all counts here."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        words = Lanes(builder, FLOAT32, count.literal_value)
        words.store(words.load(args[2], I32, words.count), args[1])

    return types.void(count, types.int64, types.int64), emit


@intrinsic
def prefetch(context: Any, source: Any) -> Any:
    """The cache line that lies ``lanes.AHEAD`` bytes further."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        Lanes(builder, FLOAT32, 1).prefetch(args[0], LINE)

    return types.void(types.int64), emit


@intrinsic
def move(context: Any, target: Any, source: Any, size: Any) -> Any:
    """memcpy."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        to, of = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, to, of, args[2], ir.Constant(I64, 1), align=1)

    return types.void(*[types.int64] * 3), emit


@intrinsic
def stage(context: Any) -> Any:
    """The address of the stage, on the stack of the thread."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = cgutils.alloca_once(builder, ir.ArrayType(I32, (STAGE + LINE) // 4))
        start = builder.add(builder.ptrtoint(made, I64), ir.Constant(I64, LINE - 1))
        return builder.and_(start, ir.Constant(I64, -LINE))

    return types.int64(), emit


@intrinsic
def fence(context: Any) -> Any:
    """Other threads see what went past the caches before they see anything that follows."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        builder.fence("seq_cst")

    return types.void(), emit


@njit(nogil=True)
def copy(target: int, source: int, size: int, streams: bool) -> None:
    """``size`` bytes; past the caches if it ``streams``, but for lines that are written in part."""
    start = -target % LINE
    if not streams or size < start + LINE:
        move(target, source, size)
        return
    if start:
        move(target, source, start)
    while start + 4 * LINE <= size:
        stream(4, target + start, source + start)
        start += 4 * LINE
    while start + LINE <= size:
        stream(1, target + start, source + start)
        start += LINE
    if start < size:
        move(target + start, source + start, size - start)


@njit(nogil=True)
def copy_rows(target: int, step: int, source: int, row: int, rows: int, streams: bool) -> None:
    """``rows`` rows of ``row`` bytes, one behind the other, to where a row begins every ``step`` bytes."""
    if step == row:
        copy(target, source, row * rows, streams)
        return
    for i in range(rows):
        copy(target + i * step, source + i * row, row, streams)


@njit(nogil=True)
def copy_part(target: int, source: int, size: int) -> None:
    """``size`` bytes of a row, without a call where that can be; the last ones over again where vectors do not fit."""
    at = 0
    while at + LINE <= size:
        copy_words(16, target + at, source + at)
        at += LINE
    while at + 16 <= size:
        copy_words(4, target + at, source + at)
        at += 16
    if at < size and size >= 16:
        copy_words(4, target + size - 16, source + size - 16)
    elif at < size:
        move(target, source, size)


@njit(inline="always")
def turn_row(form: int, wide: int, pairs: int, source: int, cos: int, sin: int, target: int) -> None:
    """All pairs of a row, in vectors of ``wide``, 16 and 8; the last ones over again where these do not fit."""
    pair = 0
    while pair + wide <= pairs:
        turn_pairs(form, wide, pair, pairs, source, cos, sin, target)
        pair += wide
    if wide > 16 and pair + 16 <= pairs:
        turn_pairs(form, 16, pair, pairs, source, cos, sin, target)
        pair += 16
    if pair + 8 <= pairs:
        turn_pairs(form, 8, pair, pairs, source, cos, sin, target)
        pair += 8
    if 0 < pair < pairs:
        turn_pairs(form, 8, pairs - 8, pairs, source, cos, sin, target)
        pair = pairs
    while pair < pairs:
        turn_pairs(form, 1, pair, pairs, source, cos, sin, target)
        pair += 1


@njit(nogil=True)
def checked(runs: Any, pages: Any, g: Geometry) -> tuple[int, int]:
    """The number of the first run that leaves its block, the tables or the target, or -1; and the tokens of all."""
    tokens = 0
    for i in range(runs.shape[0]):
        stride, token, count, position, column = runs[i, 2], runs[i, 3], runs[i, 4], runs[i, 5], runs[i, 6]
        inside = token >= 0 and count >= 0 and token + count <= stride and column >= 0
        if not inside or position < 0 or position + count > g.positions:
            return i, tokens
        for number in range(column // g.page, (column + count + g.page - 1) // g.page):
            if number >= pages.size or pages[number] < 0 or pages[number] >= g.pages:
                return i, tokens
        tokens += count
    return -1, tokens


def kernel_for(form: int) -> Kernel:
    """The compiled transfer for one form; any thread may use it. ``ImportError``: this processor has none."""
    if form & 3 == FLOAT16 and form != NO_TURN:
        machine, _, features = cpu_target.target_context.codegen().magic_tuple()
        if machine.startswith("x86") and "+f16c" not in features:  # LLVM would look for a library, in vain
            raise ImportError("this processor has no conversions of half precision")
    # numba's cache knows a function by this file and what it closes over, so the other file is one of these.
    form += zlib.crc32(Path(lanes.__file__).read_bytes()) << FORM_BITS
    return nogil(SIGNATURE)(transfer_for(form))


def transfer_for(form: int) -> Kernel:
    """What numba compiles for a form: a constant to it, so that only the code for that form is left."""
    kind, past = form % (1 << FORM_BITS), form + PAST_CACHES
    turns, item = kind != NO_TURN, 4 if kind & 3 == FLOAT32 else 2
    angle = item if kind & ROUNDED else 4  # bytes of one in the tables
    wide = 32 if item == 2 and not kind & INTERLEAVED else 16

    def transfer(runs: Any, pages: Any, g: Geometry) -> int:
        bad, tokens = checked(runs, pages, g)
        if bad >= 0:
            return int(bad)
        streams = tokens * g.heads * (g.key_bytes + g.value_bytes) >= g.stream_from
        own, before, after = stage(), g.first * item, (g.first + 2 * g.pairs) * item
        lines = (g.keys | g.key_page | g.key_head | g.key_column) % LINE == 0
        direct = streams and lines and g.pairs % wide == 0 and 2 * g.pairs * item == g.key_bytes
        staged = streams and not direct and 0 < g.key_bytes <= STAGE
        batch = STAGE // g.key_bytes if staged else g.page
        for i in range(runs.shape[0]):
            stride, token, end, column = runs[i, 2], runs[i, 3], runs[i, 3] + runs[i, 4], runs[i, 6]
            position = runs[i, 5] - token
            while token < end:
                place, inside = pages[column // g.page], column % g.page
                rows = min(end - token, g.page - inside)
                for head in range(g.heads):
                    source = runs[i, 1] + (head * stride + token) * g.value_bytes
                    target = g.values + place * g.value_page + head * g.value_head + inside * g.value_column
                    copy_rows(target, g.value_column, source, g.value_bytes, rows, streams)
                    source = runs[i, 0] + (head * stride + token) * g.key_bytes
                    target = g.keys + place * g.key_page + head * g.key_head + inside * g.key_column
                    if not turns:
                        copy_rows(target, g.key_column, source, g.key_bytes, rows, streams)
                        continue
                    angles = (position + token) * g.pairs * angle
                    cos, sin = g.cos + angles, g.sin + angles
                    for start in range(0, rows, batch):
                        size = min(batch, rows - start)
                        to, step = (own, g.key_bytes) if staged else (target, g.key_column)
                        for _ in range(size):
                            if direct:
                                for pair in range(0, g.pairs, wide):
                                    turn_pairs(past, wide, pair, g.pairs, source, cos, sin, to)
                            else:
                                for line in range(-source % LINE, g.key_bytes, LINE):
                                    prefetch(source + line)
                                turn_row(form, wide, g.pairs, source + before, cos, sin, to + before)
                                if before > 0:
                                    copy_part(to, source, before)
                                if after < g.key_bytes:
                                    copy_part(to + after, source + after, g.key_bytes - after)
                            source, to = source + g.key_bytes, to + step
                            cos, sin = cos + g.pairs * angle, sin + g.pairs * angle
                        if staged:
                            copy_rows(target, g.key_column, own, g.key_bytes, size, True)
                        target += size * g.key_column
                token, column = token + rows, column + rows
        if streams:
            fence()
        return -1

    return transfer
