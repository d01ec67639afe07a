"""Bytes of blocks for clients on other machines, which share no memory: pieces of loads out, pieces of drafts in."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from kvstore.block import piece_start
from kvstore.daemon.packed import checked
from kvstore.daemon.session import Session
from kvstore.errors import BadInput
from kvstore.fetch import Fetch
from kvstore.load import Source

MAX_PART = 1 << 20  # bytes that one answer gives, and one request brings
MAX_RANGES = 1024  # that one request names
_RANGE = (int, int, int)  # of a load: its block, the first byte of its payload, how many


def part(session: Session, name: int, ranges: Sequence[object]) -> object:
    """Bytes of a load's blocks that are there, one range behind the other; and for each range the checksums of pieces,
    where they are known, of all layers that end in it. Raises ``BadInput``."""
    begun = session.loads.get(name)
    if ranges and begun is None:
        raise BadInput("the load was released")
    if len(ranges) > MAX_RANGES:
        raise BadInput(f"no more than {MAX_RANGES} ranges are given at once")
    found, sums, total = list[memoryview](), list[bytes | None](), 0
    for each in ranges:
        place, offset, length = checked(each, _RANGE)
        total += length
        if begun is None or place >= len(begun.sources) or total > MAX_PART:
            raise BadInput(f"the load has no such block, or this is more than {MAX_PART} bytes")
        data, known = _range(begun.sources[place], offset, length)
        found.append(data)
        sums.append(known)
    return [found[0] if len(found) == 1 else b"".join(found), sums]


def _range(source: Source, offset: int, length: int) -> tuple[memoryview, bytes | None]:
    held, view = source.held, source.view
    assert held is not None and view is not None  # the daemon has no device
    resident = held.resident if isinstance(held, Fetch) else held
    layout, end = resident.layout, offset + length
    offsets = layout.layer_offsets(resident.stride)
    if not length or end > offsets[-1]:
        raise BadInput(f"the block has {offsets[-1]} bytes")
    first, stop, whole = bisect_right(offsets, offset) - 1, bisect_left(offsets, end), bisect_right(offsets, end) - 1
    checksums = resident.checksums
    if isinstance(held, Fetch):
        wanted = (1 << stop) - (1 << first)
        if held.ready & wanted != wanted:
            raise BadInput("these layers are not there yet")
        checksums = held.header.checksums if held.header is not None else None
    known: array[int] | None = checksums and checksums[piece_start(layout, first) : piece_start(layout, whole)]
    start = layout.header_bytes + offset
    return view[start : start + length], None if known is None else known.tobytes()


def put(session: Session, number: int, offset: int, data: bytes) -> None:
    """Writes a piece of a draft's payload. Raises ``BadInput``."""
    if not session.peer.place:
        raise BadInput("drafts of clients on this machine are filled in place")
    layout, slot = session.area.draft(number)
    if len(data) > MAX_PART or offset + len(data) > layout.payload_bytes(layout.block_tokens):
        raise BadInput(f"this is not in the draft, or more than {MAX_PART} bytes")
    start = layout.header_bytes + offset
    slot[start : start + len(data)] = data
