"""Checksums of the pieces of a payload: compiled, without Python's lock, once that pays and is ready; else plain.

Both forms give the same numbers. python-xxhash keeps Python's lock for inputs of up to 128 KiB, which most pieces are,
so that threads that check blocks wait for each other; the compiled form takes all pieces of a payload in one call.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from kvstore.compiled import Compiled
from kvstore.layout import Layout

if TYPE_CHECKING:
    from kvstore.xxh3 import Kernels

STEP_BYTES = 256 << 10  # copied and checked while it is in the core's cache
ENOUGH_BYTES = 64 << 20  # checked in the plain form before it pays to compile: a short process never does
SHORT_BYTES = 240  # pieces of no more than this have a plain form only


def _build() -> Kernels:
    from kvstore import xxh3

    return xxh3.kernels()


KERNELS: Compiled[Kernels] = Compiled("checksums", _build)
_plain_bytes = 0  # so far; no lock, because a lost addition is no harm


def digests(
    layout: Layout, stride: int, payload: memoryview, address: int | None, first: int, last: int, base: int = 0
) -> array[int]:
    """One xxh3_64 for each of the pieces ``first`` to ``last - 1``.

    ``payload`` starts at payload offset ``base``, and in memory at ``address`` (None: not known, plain form). A piece
    that it does not hold whole is taken as far as it goes.
    """
    pieces = layout.pieces(stride)[first:last]
    whole = bool(pieces) and base <= pieces[0].offset and pieces[-1].offset + pieces[-1].length - base <= len(payload)
    kernels = _kernels(layout, stride, len(payload)) if whole and address is not None else None
    if kernels is None or address is None:
        spots = [(p.offset - base, p.offset - base + p.length) for p in pieces]
        return array("Q", [xxh3_64_intdigest(payload[begin:end]) for begin, end in spots])
    sums, spans = array("Q", bytes(8 * len(pieces))), layout.spans(stride)
    kernels.digests(address - base, spans.buffer_info()[0] + 16 * first, len(pieces), sums.buffer_info()[0])
    return sums


def copy_digests(layout: Layout, stride: int, target: memoryview, to: int, of: int) -> array[int]:
    """Copies a payload from address ``of`` to ``target`` (address ``to``); one xxh3_64 per piece of what was copied."""
    kernels = _kernels(layout, stride, len(target))
    if kernels is not None:
        spans = layout.spans(stride)
        sums = array("Q", bytes(4 * len(spans)))
        kernels.copy_digests(to, of, spans.buffer_info()[0], len(sums), sums.buffer_info()[0])
        return sums
    sums = array("Q")
    for begin, end, pieces in _steps(layout, stride):
        ctypes.memmove(to + begin, of + begin, end - begin)
        sums.extend([xxh3_64_intdigest(target[first:last]) for first, last in pieces])
    return sums


def _kernels(layout: Layout, stride: int, size: int) -> Kernels | None:
    """The compiled form, if there is one for this layout now. Asks for it once enough bytes have gone by."""
    global _plain_bytes
    kernels = KERNELS.get(ask=_plain_bytes >= ENOUGH_BYTES)
    if kernels is None:
        _plain_bytes += size
        return None
    dims = min(min(shape.key_dim, shape.value_dim) for _, shape in layout.runs)
    return kernels if dims * stride * layout.itemsize > SHORT_BYTES else None


@lru_cache(maxsize=256)
def _steps(layout: Layout, stride: int) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
    """Byte ranges of about ``STEP_BYTES`` that end with a piece, and the pieces in each."""
    steps: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
    begin, pieces = 0, [(p.offset, p.offset + p.length) for p in layout.pieces(stride)]
    group: list[tuple[int, int]] = []
    for piece in pieces:
        group.append(piece)
        if piece[1] - begin >= STEP_BYTES or piece is pieces[-1]:
            steps.append((begin, piece[1], tuple(group)))
            begin, group = piece[1], []
    return tuple(steps)
