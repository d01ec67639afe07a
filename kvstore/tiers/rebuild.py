"""Reads a disk tier's slots: the headers, from which a lost index is made anew, and whole blocks, to verify them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from kvstore.block import Header, bad_pieces, decode_header, header_length
from kvstore.errors import Corrupt, TierError
from kvstore.files import PAGE, Files
from kvstore.tiers.base import Entry, Problem
from kvstore.tiers.catalog import Catalog, Change, Doubt, MemoryCatalog
from kvstore.tiers.lmdb_catalog import LmdbCatalog
from kvstore.tiers.slab import SLOT_BITS, Extent

Read = Callable[[int, int, memoryview], None]  # address, offset in the slot, buffer
THREADS = 4
BATCHES = 4096, 64


def blocks(read: Read, extents: Iterable[Extent]) -> list[tuple[int, Header]]:
    """Address and header (without checksums) of each block that the slots hold, in order of sequence.

    Of two blocks of one key, and of two with one sequence, the younger is taken.
    """
    with ThreadPoolExecutor(THREADS, "kvstore-rebuild") as pool:
        found = [pair for pairs in pool.map(lambda extent: _headers(read, extent), extents) for pair in pairs]
    found.sort(key=lambda pair: (pair[1].sequence, pair[1].created))
    by_sequence = {pair[1].sequence: pair for pair in found}
    by_key = {pair[1].key: pair for pair in by_sequence.values()}
    return [pair for pair in by_sequence.values() if by_key[pair[1].key] is pair]


def catalog(
    files: Files, place: str | None, limit: int, read: Read, extents: Mapping[int, Extent], note: Callable[[str], None]
) -> Catalog:
    """The catalog at ``place`` (None: in memory only). One that is not sound is made anew from the slots' headers."""
    made: Catalog = MemoryCatalog()
    if place is not None:
        try:
            return LmdbCatalog(files, place, limit)
        except Doubt as doubt:
            if extents:
                note(f"the index was made anew from the blocks: {doubt}")
            made = LmdbCatalog(files, place, limit, create=True)
    try:
        found = blocks(read, extents.values())
        start = 0
        while start < len(found):
            size = next((size for size in BATCHES if made.room(start + size)), 0)
            if not size:
                note(f"the index has no room for {len(found) - start} blocks")
                break
            made.apply(Change(added=found[start : start + size]))
            start += size
        if isinstance(made, LmdbCatalog):
            made.finish()
    except BaseException:
        made.close()
        raise
    return made


def _headers(read: Read, extent: Extent) -> list[tuple[int, Header]]:
    found = []
    with ExitStack() as stack:
        buffer = stack.enter_context(memoryview(stack.enter_context(mmap.mmap(-1, extent.slot_bytes))))
        for slot in range(extent.slots):
            address = extent.number << SLOT_BITS | slot
            try:
                header = _header(read, address, buffer)
            except TierError:  # empty, torn or unreadable: a free slot
                continue
            if header.slot_bytes <= extent.slot_bytes:
                found.append((address, replace(header, checksums=None)))
    return found


def _header(read: Read, address: int, buffer: memoryview) -> Header:
    read(address, 0, buffer[:PAGE])
    total = header_length(buffer[:PAGE], len(buffer))
    if total > PAGE:
        read(address, PAGE, buffer[PAGE : -(-total // PAGE) * PAGE])
    return decode_header(buffer[: max(total, PAGE)])


def check(read: Read, entries: Iterable[Entry], tokens: Callable[[int], bytes | None]) -> Iterator[tuple[Problem, int]]:
    """Reads each block and compares it with its entry and its checksums. Problems come with the block's sequence."""
    with ExitStack() as stack:
        buffer = memoryview(b"")
        for entry in entries:
            need = -(-entry.layout.slot_bytes(entry.stride) // PAGE) * PAGE
            if need > len(buffer):
                stack.close()
                buffer = stack.enter_context(memoryview(stack.enter_context(mmap.mmap(-1, need))))
            try:
                with buffer[:need] as slot:
                    what = _wrong(read, entry, tokens, slot)
            except TierError as error:
                what = str(error)
            if what:
                yield Problem(entry.address, entry.key.hex(), what), entry.sequence


def _wrong(read: Read, entry: Entry, tokens: Callable[[int], bytes | None], slot: memoryview) -> str:
    read(entry.address, 0, slot)
    area = entry.layout.header_bytes
    header = decode_header(slot[:area])
    if (header.key, header.parent, header.sequence) != (entry.key, entry.parent, entry.sequence):
        raise Corrupt("another block lies in its slot")
    if (header.layout, header.stride, header.namespace) != (entry.layout, entry.stride, entry.namespace):
        raise Corrupt("the index and the header disagree")
    if tokens(entry.sequence) != header.tokens:
        return "the index has other token ids than the header"
    bad = sorted({layer for layer, _ in bad_pieces(header, slot[area:], 0, len(header.layout.layers))})
    return f"bytes of {len(bad)} of {len(header.layout.layers)} layers are not what was written" if bad else ""
