"""Slots to give to a tier, and a book of all that was ever written, to hold what comes back against."""

from __future__ import annotations

import mmap
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.block import Header, bad_pieces, checksums, decode_header, encode_header
from kvstore.errors import Corrupt
from kvstore.files import OsFiles
from kvstore.keys import Fingerprint, Namespace, block_key, token_bytes
from kvstore.layout import LayerShape, Layout
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.lmdb_catalog import LmdbCatalog

LAYOUT = Layout((LayerShape(2, 16, 8), LayerShape(1, 8, 16)), "float32", block_tokens=16)
OTHER = Layout((LayerShape(1, 64, 64),) * 3, "bfloat16", block_tokens=32)
SPACE = Namespace(Fingerprint({"checkpoint": "slots"}), "tenant")


def memory(size: int) -> memoryview:
    """Page-aligned memory, as O_DIRECT wants it."""
    return memoryview(mmap.mmap(-1, size))


@dataclass
class Block:
    """A block as it was given to a tier."""

    header: Header
    slot: memoryview
    address: int = 0

    @property
    def sequence(self) -> int:
        """Its name."""
        return self.header.sequence


@dataclass
class Book:
    """Makes blocks, and knows every byte of each."""

    rng: random.Random
    blocks: dict[int, Block] = field(default_factory=dict)
    last: int = 0

    def make(
        self,
        parent: Block | None = None,
        tokens: int | None = None,
        layout: Layout = LAYOUT,
        owner: str = "owner",
        form: str = "pre",
    ) -> Block:
        """A new block behind ``parent``, with random tokens and bytes."""
        count = tokens or layout.block_tokens
        ids = token_bytes([self.rng.randrange(1 << 17, 1 << 32) for _ in range(count)])
        above = parent.header.key if parent else SPACE.root
        self.last += 1
        slot = memory(-(-layout.slot_bytes(count) // 4096) * 4096)
        payload = slot[layout.header_bytes : layout.slot_bytes(count)]
        payload[:] = self.rng.randbytes(len(payload))
        header = Header(
            key=block_key(SPACE, above, ids),
            parent=above,
            root=parent is None,
            namespace=SPACE.digest,
            fingerprint=SPACE.fingerprint.digest,
            tenant=SPACE.tenant,
            owner=owner,
            tokens=ids,
            layout=layout,
            stride=count,
            sequence=self.last,
            created=float(self.last),
            form=form,
            checksums=checksums(layout, count, payload),
        )
        data = encode_header(header)
        slot[: len(data)] = data
        block = self.blocks[self.last] = Block(header, slot)
        return block

    def check(self, data: memoryview) -> int | None:
        """Sequence of the block in ``data``, which must be byte for byte one of ours; None for what is detected as
        no block. Anything else is a wrong byte that nobody noticed."""
        try:
            header = decode_header(data)
        except Corrupt:
            return None
        layout, end = header.layout, header.layout.slot_bytes(header.stride)
        payload = data[layout.header_bytes : end]
        if list(bad_pieces(header, payload, 0, len(layout.layers))):
            return None
        ours = self.blocks[header.sequence]
        assert header == ours.header
        for piece in layout.pieces(header.stride):
            here = layout.header_bytes + piece.offset
            assert data[here : here + piece.length] == ours.slot[here : here + piece.length]
        return header.sequence


def put(tier: Tier, block: Block) -> bool:
    """Reserves and writes; False when there is no room."""
    address = tier.reserve(block.header.layout.class_bytes(block.header.stride))
    if address is None:
        return False
    block.address = address
    tier.write(address, block.slot)
    return True


def save(tier: Tier, *blocks: Block) -> None:
    """Puts and commits."""
    for block in blocks:
        assert put(tier, block)
    tier.commit([(block.address, block.header) for block in blocks])


def fill(tier: Tier, book: Book, **kind: Any) -> list[Block]:
    """Saves blocks, 32 at a time, until there is no room."""
    blocks = list[Block]()
    while more := [block for block in (book.make(**kind) for _ in range(32)) if put(tier, block)]:
        tier.commit([(block.address, block.header) for block in more])
        blocks += more
        assert tier.used <= tier.capacity
    return blocks


def drop(tier: Tier, *blocks: Block) -> None:
    """Forgets blocks and gives their slots back."""
    tier.forget([block.sequence for block in blocks])
    for block in blocks:
        tier.free(block.address)


def fetch(tier: Tier, address: int, layout: Layout = LAYOUT, stride: int | None = None) -> memoryview:
    """The whole slot at an address."""
    buffer = memory(-(-layout.slot_bytes(stride or layout.block_tokens) // 4096) * 4096)
    tier.read(address, 0, buffer)
    return buffer


def opened(folder: Path, capacity: int | None = 16 << 20, files: OsFiles | None = None) -> DiskTier:
    """A tier whose index was read."""
    tier = DiskTier(files or OsFiles(), folder, capacity)
    for _ in tier.load():
        pass
    return tier


def stored(tier: DiskTier, book: Book) -> list[Block]:
    """The blocks that a tier's index knows."""
    return [book.blocks[entry.sequence] for entry in tier._catalog.snapshot().entries()]


def abandon(tier: DiskTier) -> None:
    """What the death of the process does to a tier: nothing is written any more, all is let go."""
    catalog = tier._catalog
    if isinstance(catalog, LmdbCatalog):
        catalog._view.abort()
        catalog._env.close()
    for file in tier._extents._open.values():
        tier._files.close(file.handle)
    tier._files.close(tier._folder._lock)
    tier._closed = True


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def holds(folder: Path, needle: bytes) -> list[str]:
    """Files below a folder in which ``needle`` can be found."""
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file() and needle in path.read_bytes()]
