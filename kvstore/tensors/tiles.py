"""LLVM code that turns a small tile of memory about its diagonal, in registers, or zips and unzips rows of it.

Only for ``pages_cpu``, which imports numba. A unit is a power of two of bytes, and bytes are all that is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from kvstore.tensors.geometry import FLOAT32
from kvstore.tensors.lanes import I64, LINE, Lanes, Value
from kvstore.tensors.paging import WORD

PART = 16  # bytes: inside such parts of a register, units change place at little cost on any processor


def transpose(builder: Any, unit: int, parts: int, past_caches: bool, places: Sequence[Value]) -> None:
    """``places``: the source, its step, the target, its step.

    Of ``parts * PART / unit`` rows of the source, ``PART / unit`` units each, unit ``i`` of all goes to row ``i`` of
    the target. ``past_caches``: these rows are whole lines then, or lie one behind the other and fill lines together.
    """
    source, source_step, target, target_step = places
    count, item = PART // unit, ir.IntType(8 * unit)
    lanes = Lanes(builder, FLOAT32, 1)
    rows = [lanes.load(_stepped(builder, source, source_step, i), item, count) for i in range(parts * count)]
    made = [_joined(builder, rows[i::count]) for i in range(count)]
    half = count // 2
    while half:  # each round zips the first half with the second; when all are done, rows are columns
        pairs = zip(made[: count // 2], made[count // 2 :], strict=True)
        made = [_zipped(builder, one, two, count, part) for one, two in pairs for part in (0, 1)]
        half //= 2
    together = LINE // (parts * PART) if past_caches else 1
    for i in range(0, count, together):
        lanes.store(_joined(builder, made[i : i + together]), _stepped(builder, target, target_step, i), past_caches)


def zip_rows(builder: Any, item: int, past_caches: bool, source: Value, step: Value, target: Value) -> None:
    """Of ``WORD / item`` rows, the first items, then the second, and so on, until a line is full."""
    rows, lanes = WORD // item, Lanes(builder, FLOAT32, 1)
    count = LINE // WORD
    loaded = [lanes.load(_stepped(builder, source, step, i), ir.IntType(8 * item), count) for i in range(rows)]
    order = [row * count + i for i in range(count) for row in range(rows)]
    lanes.store(_shuffled(builder, _joined(builder, loaded), order), target, past_caches)


def unzip_rows(builder: Any, item: int, source: Value, target: Value, step: Value) -> None:
    """The other way: a line becomes part of ``WORD / item`` rows."""
    rows, lanes = WORD // item, Lanes(builder, FLOAT32, 1)
    line = lanes.load(source, ir.IntType(8 * item), LINE // item)
    for i in range(rows):
        lanes.store(_shuffled(builder, line, range(i, LINE // item, rows)), _stepped(builder, target, step, i))


def move_unit(builder: Any, unit: int, target: Value, source: Value) -> None:
    """One unit."""
    lanes = Lanes(builder, FLOAT32, 1)
    lanes.store(lanes.load(source, ir.IntType(8 * unit), 1), target)


def _stepped(builder: Any, address: Value, step: Value, count: int) -> Value:
    return builder.add(address, builder.mul(step, ir.Constant(I64, count)))


def _joined(builder: Any, vectors: Sequence[Value]) -> Value:
    """One vector of them all; their number is a power of two."""
    made = list(vectors)
    while len(made) > 1:
        size = 2 * made[0].type.count
        made = [_shuffled(builder, made[i], range(size), made[i + 1]) for i in range(0, len(made), 2)]
    return made[0]


def _zipped(builder: Any, one: Value, two: Value, count: int, half: int) -> Value:
    """In each part, the units of its first or second half, those of ``one`` and ``two`` in turns."""
    size = one.type.count
    firsts = range(half * count // 2, size, count)
    return _shuffled(builder, one, [first + i // 2 + i % 2 * size for first in firsts for i in range(count)], two)


def _shuffled(builder: Any, one: Value, order: Sequence[int], two: Value | None = None) -> Value:
    which = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
    return builder.shuffle_vector(one, ir.Constant(one.type, ir.Undefined) if two is None else two, which)
