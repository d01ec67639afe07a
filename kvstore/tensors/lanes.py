"""LLVM code for vectors of pairs: keys of 16 or 32 bits are widened, turned and rounded in registers.

Only for ``rope_cpu``, which imports numba. Nothing is fused into a multiply-add, and nothing assumes finite numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from kvstore.tensors.geometry import BFLOAT16, FLOAT16, FLOAT32, INTERLEAVED, PAST_CACHES, ROUNDED

AHEAD = 4096  # bytes that a source is fetched ahead of its use
LINE = 64

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()
STORED = (I16, F16, F32)  # what a key of each dtype is in memory
Value = Any  # of LLVM


class Lanes:
    """Emits code for vectors of ``count`` floats in one form."""

    def __init__(self, builder: Any, form: int, count: int) -> None:
        self.builder, self.form, self.count, self.dtype = builder, form, count, form & 3
        self.past_caches = bool(form & PAST_CACHES)
        self.rounds = bool(form & ROUNDED) and self.dtype != FLOAT32

    def vector(self, kind: Any) -> Any:
        return ir.VectorType(kind, self.count)

    def constant(self, value: int) -> Value:
        return ir.Constant(self.vector(I32), [value] * self.count)

    def load(self, address: Value, kind: Any, count: int) -> Value:
        loaded = self.builder.load(self.builder.inttoptr(address, ir.VectorType(kind, count).as_pointer()))
        loaded.align = 1
        return loaded

    def store(self, made: Value, address: Value, past_caches: bool = False) -> None:
        """``past_caches``: the address must be one of whole lines, and so must the vector."""
        stored = self.builder.store(made, self.builder.inttoptr(address, made.type.as_pointer()))
        stored.align = LINE if past_caches else 1
        if past_caches:
            stored.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(I32, 1)]))

    def prefetch(self, address: Value, size: int) -> None:
        """``size`` bytes that will be read soon."""
        b, byte = self.builder, ir.IntType(8).as_pointer()
        call = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = b.module.declare_intrinsic("llvm.prefetch", [byte], call)
        for start in range(AHEAD, AHEAD + size, LINE):
            ahead = b.inttoptr(b.add(address, ir.Constant(I64, start)), byte)
            b.call(function, [ahead, *(ir.Constant(I32, n) for n in (0, 3, 1))])  # to read, to keep, data

    def wide(self, stored: Value) -> Value:
        """Numbers of the keys' dtype, as float32."""
        if self.dtype == FLOAT32:
            return stored
        if self.dtype == FLOAT16:
            return self.builder.fpext(stored, self.vector(F32))
        words = self.builder.zext(stored, self.vector(I32))
        return self.builder.bitcast(self.builder.shl(words, self.constant(16)), self.vector(F32))

    def narrow(self, floats: Value) -> Value:
        """float32, rounded to the keys' dtype: to nearest, ties to even."""
        if self.dtype == FLOAT32:
            return floats
        if self.dtype == FLOAT16:
            return self.builder.fptrunc(floats, self.vector(F16))
        return self.builder.trunc(self.builder.lshr(self.biased(floats), self.constant(16)), self.vector(I16))

    def biased(self, floats: Value) -> Value:
        """The bits of float32, so that their upper half is the nearest bfloat16.

        The carry could make infinity or zero of a NaN with bits in its lower half. There is none where all numbers come
        from bfloat16; tables of float32 may hold one.
        """
        b = self.builder
        bits = b.bitcast(floats, self.vector(I32))
        odd = b.and_(b.lshr(bits, self.constant(16)), self.constant(1))
        biased = b.add(b.add(bits, self.constant(0x7FFF)), odd)
        if self.rounds:
            return biased
        return b.select(b.fcmp_unordered("uno", floats, floats), b.or_(bits, self.constant(0x400000)), biased)

    def rounded(self, floats: Value) -> Value:
        """A product, where the form rounds each: the nearest value of the keys' dtype, as float32."""
        if not self.rounds:
            return floats
        if self.dtype == FLOAT16:
            return self.wide(self.narrow(floats))
        upper = self.builder.and_(self.biased(floats), self.constant(0xFFFF0000))
        return self.builder.bitcast(upper, self.vector(F32))

    def turned(self, x: Value, y: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
        """Not yet rounded to the keys' dtype."""
        b = self.builder
        one = b.fsub(self.rounded(b.fmul(x, cos)), self.rounded(b.fmul(y, sin)))
        return one, b.fadd(self.rounded(b.fmul(y, cos)), self.rounded(b.fmul(x, sin)))

    def angles(self, address: Value) -> Value:
        """Cosines or sines, as float32."""
        if not self.rounds:
            return self.load(address, F32, self.count)
        return self.wide(self.load(address, STORED[self.dtype], self.count))

    # Two bfloat16 in a word of 32 bits become two vectors by a shift and a mask, cheaper than by widening lanes.

    def split(self, words: Value) -> tuple[Value, Value]:
        b, floats = self.builder, self.vector(F32)
        upper = b.and_(words, self.constant(0xFFFF0000))
        return b.bitcast(b.shl(words, self.constant(16)), floats), b.bitcast(upper, floats)

    def joined(self, low: Value, high: Value) -> Value:
        b = self.builder
        upper = b.and_(self.biased(high), self.constant(0xFFFF0000))
        return b.or_(b.lshr(self.biased(low), self.constant(16)), upper)

    def every_second(self, both: Value, first: int) -> Value:
        which = ir.Constant(self.vector(I32), list(range(first, 2 * self.count, 2)))
        return self.builder.shuffle_vector(both, ir.Constant(both.type, ir.Undefined), which)

    def alternating(self, one: Value, two: Value) -> Value:
        order = [i // 2 + i % 2 * self.count for i in range(2 * self.count)]
        return self.builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(I32, len(order)), order))


def turn_halves(lanes: Lanes, sources: Sequence[Value], cos: Value, sin: Value, targets: Sequence[Value]) -> None:
    """Pairs whose firsts and seconds lie apart: ``sources`` and ``targets`` are two addresses each."""
    if lanes.dtype == BFLOAT16 and lanes.rounds and lanes.count > 1:
        lanes = Lanes(lanes.builder, lanes.form, lanes.count // 2)
        parts = [lanes.split(lanes.load(address, I32, lanes.count)) for address in (*sources, cos, sin)]
        low, high = (lanes.turned(*part) for part in zip(*parts, strict=True))
        made = [lanes.joined(*both) for both in zip(low, high, strict=True)]
    else:
        x, y = (lanes.wide(lanes.load(address, STORED[lanes.dtype], lanes.count)) for address in sources)
        made = [lanes.narrow(one) for one in lanes.turned(x, y, lanes.angles(cos), lanes.angles(sin))]
    for vector, address in zip(made, targets, strict=True):
        lanes.store(vector, address, lanes.past_caches)


def turn_neighbours(lanes: Lanes, source: Value, cos: Value, sin: Value, target: Value) -> None:
    """Pairs whose firsts and seconds alternate."""
    if lanes.dtype == BFLOAT16:
        x, y = lanes.split(lanes.load(source, I32, lanes.count))
        made = lanes.joined(*lanes.turned(x, y, lanes.angles(cos), lanes.angles(sin)))
    else:
        both = lanes.load(source, STORED[lanes.dtype], 2 * lanes.count)
        x, y = (lanes.wide(lanes.every_second(both, first)) for first in (0, 1))
        one, two = lanes.turned(x, y, lanes.angles(cos), lanes.angles(sin))
        made = lanes.alternating(lanes.narrow(one), lanes.narrow(two))
    lanes.store(made, target, lanes.past_caches)


def turn_pairs(lanes: Lanes, pair: Value, pairs: Value, source: Value, cos: Value, sin: Value, target: Value) -> None:
    """Of a row with ``pairs`` pairs at ``source``, the ``lanes.count`` from number ``pair`` on, to ``target``."""
    b, item = lanes.builder, 4 if lanes.dtype == FLOAT32 else 2

    def after(address: Value, count: Value, size: int) -> Value:
        return b.add(address, b.mul(count, ir.Constant(I64, size)))

    angle = item if lanes.rounds else 4
    cos, sin = after(cos, pair, angle), after(sin, pair, angle)
    size = lanes.count * item
    if lanes.form & INTERLEAVED:
        source, target = after(source, pair, 2 * item), after(target, pair, 2 * item)
        if lanes.past_caches:
            lanes.prefetch(source, 2 * size)
        turn_neighbours(lanes, source, cos, sin, target)
        return
    x, to = after(source, pair, item), after(target, pair, item)
    y, beyond = after(x, pairs, item), after(to, pairs, item)
    if lanes.past_caches:
        lanes.prefetch(x, size)
        lanes.prefetch(y, size)
    turn_halves(lanes, (x, y), cos, sin, (to, beyond))
