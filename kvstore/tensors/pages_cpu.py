"""The kernels of paged caches for the CPU, compiled: rows of blocks to where an engine's pages want them, and back.

Numba compiles the loops, without Python's lock. Import this where the time does not matter that numba takes to load,
as ``Compiled`` does. What turns keys is compiled for each form of turn, and reached by its address: so the loops that
move them, which take longer to compile, are compiled once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kvstore.compiled import nogil
from kvstore.tensors.geometry import FLOAT16, FLOAT32, INTERLEAVED, NO_TURN, ROUNDED
from kvstore.tensors.lanes import I64, LINE
from kvstore.tensors.page_moves import put_rows, take_rows
from kvstore.tensors.paging import TAKE, Paging, PagingKernel, Side
from kvstore.tensors.rope_cpu import FORM_BITS, checked, copy_part, fence, prefetch, stage, turn_row

OFFSETS = types.Array(types.int64, 1, "C")
SIDE = types.NamedUniTuple(types.int64, len(Side._fields), Side)
SIGNATURE = types.int64(
    types.Array(types.int64, 2, "C"),
    OFFSETS,
    types.NamedUniTuple(types.int64, len(Paging._fields), Paging),
    *(SIDE, OFFSETS, OFFSETS) * 2,
)
TURNED = 8  # numbers that a turner takes
FILES = ("lanes.py", "page_moves.py", "paging.py", "rope_cpu.py", "tiles.py")


@intrinsic
def turn(
    context: Any,
    turner: Any,
    first: Any,
    pairs: Any,
    row: Any,
    source: Any,
    rows: Any,
    cos: Any,
    sin: Any,
    target: Any,
) -> Any:
    """Calls a turner by its address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [I64] * TURNED)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.void(*[types.int64] * (1 + TURNED)), emit


def kernel_for(form: int) -> PagingKernel:
    """The compiled kernel for a form of turn or for ``TAKE``. ``ImportError``: this processor has none."""
    # numba's cache knows a function by this file and what it closes over, so the other files are one of these.
    version = zlib.crc32(b"".join((Path(__file__).parent / name).read_bytes() for name in FILES)) << FORM_BITS
    if form == TAKE:
        return nogil(SIGNATURE)(paging_for(version + TAKE))
    put = _put(version)
    if form == NO_TURN:
        return put
    if form & 3 == FLOAT16 and _without_halves():
        raise ImportError("this processor has no conversions of half precision")
    turner = cfunc(types.void(*[types.int64] * TURNED))(turner_for(form))

    def turning(runs: np.ndarray, pages: np.ndarray, paging: Paging, *sides: Any) -> int:
        return put(runs, pages, paging._replace(turner=turner.address), *sides)

    return turning


@cache
def _put(version: int) -> PagingKernel:
    return nogil(SIGNATURE)(paging_for(version + NO_TURN))


def _without_halves() -> bool:
    """Whether LLVM would look for a library to convert them, in vain."""
    machine, _, features = cpu_target.target_context.codegen().magic_tuple()
    return machine.startswith("x86") and "+f16c" not in features


def turner_for(form: int) -> Callable[..., None]:
    """What numba compiles to turn ``rows`` keys of ``row`` bytes, one behind the other, of which it gets the angles."""
    item = 4 if form & 3 == FLOAT32 else 2
    wide = 32 if item == 2 and not form & INTERLEAVED else 16
    angle = item if form & ROUNDED else 4

    def turner(first: int, pairs: int, row: int, source: int, rows: int, cos: int, sin: int, target: int) -> None:
        before, after = first * item, (first + 2 * pairs) * item
        for _ in range(rows):
            for line in range(-source % LINE, row, LINE):
                prefetch(source + line)
            turn_row(form, wide, pairs, source + before, cos, sin, target + before)
            if before > 0:
                copy_part(target, source, before)
            if after < row:
                copy_part(target + after, source + after, row - after)
            source, target = source + row, target + row
            cos, sin = cos + pairs * angle, sin + pairs * angle

    return turner


def paging_for(form: int) -> PagingKernel:
    """What numba compiles to put, or to take where ``TAKE`` is part of the form: a constant to it."""

    def paging(runs: Any, pages: Any, p: Paging, keys: Side, kt: Any, kd: Any, values: Side, vt: Any, vd: Any) -> int:
        bad, tokens = checked(runs, pages, p)
        if bad >= 0:
            return int(bad)
        move = take_rows if form & TAKE else put_rows
        streams, own = tokens * p.heads * (keys.row + values.row) >= p.stream_from, stage()
        # What is read is read in the order of its memory: blocks head by head, pages page by page.
        each = p.heads if form & TAKE else 1
        for i in range(runs.shape[0]):
            stride, first, count = runs[i, 2], runs[i, 3], runs[i, 4]
            for heads in range(0, p.heads, each):
                done = 0
                while done < count:
                    column = runs[i, 6] + done
                    place, inside = pages[column // p.page], column % p.page
                    rows = min(count - done, p.page - inside)
                    if p.turner != 0:
                        rows = min(rows, p.batch - inside % p.batch)
                    for head in range(heads, heads + each):
                        token = head * stride + first + done
                        row = runs[i, 0] + token * keys.row
                        if p.turner != 0:
                            angles = (runs[i, 5] + done) * p.angles
                            turn(p.turner, p.first, p.pairs, keys.row, row, rows, p.cos + angles, p.sin + angles, own)
                            row = own
                        page = keys.address + place * keys.page + head * keys.head
                        move(keys, kt, kd, row, rows, page, inside, streams)
                        page = values.address + place * values.page + head * values.head
                        move(values, vt, vd, runs[i, 1] + token * values.row, rows, page, inside, streams)
                    done += rows
        if streams:
            fence()
        return -1

    return paging
