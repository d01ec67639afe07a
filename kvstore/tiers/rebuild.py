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
from kvstore.sealed import SealedTokens, stored_sum
from kvstore.tiers.base import Entry, Problem
from kvstore.tiers.catalog import Catalog, Change, Doubt, MemoryCatalog
from kvstore.tiers.lmdb_catalog import LmdbCatalog
from kvstore.tiers.slab import SLOT_BITS, Extent
from kvstore.vault import NoKey, Vault

Read = Callable[[int, int, memoryview], None]  # address, offset in the slot, buffer
Tokens = Callable[[int], bytes | SealedTokens | None]
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
                seal = None if header.seal is None else header.seal.brief()
                found.append((address, replace(header, checksums=None, seal=seal)))
    return found


def _header(read: Read, address: int, buffer: memoryview) -> Header:
    read(address, 0, buffer[:PAGE])
    total = header_length(buffer[:PAGE], len(buffer))
    if total > PAGE:
        read(address, PAGE, buffer[PAGE : -(-total // PAGE) * PAGE])
    return decode_header(buffer[: max(total, PAGE)], sealed=True)


def check(
    read: Read, entries: Iterable[Entry], tokens: Tokens, vault: Vault | None = None
) -> Iterator[tuple[Problem, int]]:
    """Reads each block and compares it with its entry and its checksums. Problems come with the block's sequence.

    Entries and tokens are as the catalog has them. Sealed blocks are opened with the keys that are there; of
    others, the header and the checksums of what is on disk are looked at.
    """
    with ExitStack() as stack:
        buffer = memoryview(b"")
        for entry in entries:
            need = -(-entry.layout.slot_bytes(entry.stride) // PAGE) * PAGE
            if need > len(buffer):
                stack.close()
                buffer = stack.enter_context(memoryview(stack.enter_context(mmap.mmap(-1, need))))
            try:
                with buffer[:need] as slot:
                    what = _wrong(read, entry, tokens, slot, vault)
            except TierError as error:
                what = str(error)
            if what:
                yield Problem(entry.address, entry.key.hex(), what), entry.sequence


def _wrong(read: Read, entry: Entry, tokens: Tokens, slot: memoryview, vault: Vault | None) -> str:
    read(entry.address, 0, slot)
    area = entry.layout.header_bytes
    header = decode_header(slot[:area], sealed=True)
    if (header.key, header.parent, header.sequence) != (entry.key, entry.parent, entry.sequence):
        raise Corrupt("another block lies in its slot")
    mark = 0 if header.seal is None else header.seal.mark
    said = entry.layout, entry.stride, entry.namespace, entry.form, entry.seal
    if (header.layout, header.stride, header.namespace, header.form, mark) != said:
        raise Corrupt("the index and the header disagree")
    if tokens(entry.sequence) != header.indexed_tokens:
        return "the index has other token ids than the header"
    layers, payload = len(header.layout.layers), slot[area:]
    if header.seal is not None:
        bad = _bad_layers(header, payload)
        if not bad and vault is not None:
            try:
                opened = vault.open(header)
            except NoKey:
                return ""
            opened.layers(payload, 0, layers)
            header = opened.header
    if header.seal is None:
        bad = sorted({layer for layer, _ in bad_pieces(header, payload, 0, layers)})
    return f"bytes of {len(bad)} of {layers} layers are not what was written" if bad else ""


def _bad_layers(header: Header, payload: memoryview) -> list[int]:
    """Layers of a sealed payload that are not the ciphertext that was written. It takes no key to tell."""
    assert header.seal is not None and header.checksums is not None
    layout, stride = header.layout, header.stride
    return [n for n, known in enumerate(header.checksums) if stored_sum(payload, layout, stride, n) != known]
