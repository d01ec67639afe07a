"""Stores whose disk is encrypted, what of them must not be found on it, and slots that are sealed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from blocks import NS, SMALL, marks, rows
from gates import GatedTier

import kvstore
from kvstore import Layout, Namespace
from kvstore.block import bad_pieces, checksums, decode_header
from kvstore.errors import TierError
from kvstore.files import OsFiles
from kvstore.keys import block_key, token_bytes
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.vault import Vault

MIB = 1 << 20


def sealed(root: Path, files: OsFiles | None = None, keys: str = "keys") -> LocalStore:
    """A store on ``root/cache`` whose keys are in ``root/keys``."""
    return kvstore.open(root / "cache", host="4MiB", disk="32MiB", encryption=root / keys, files=files)


@contextmanager
def gated_and_sealed(root: Path) -> Iterator[tuple[LocalStore, GatedTier]]:
    """(store, its tier behind gates); closed at the end."""
    files = OsFiles()
    tier = GatedTier(DiskTier(files, root / "cache", 32 * MIB, vault=Vault(files, root / "keys")))
    store = LocalStore(HostTier(4 * MIB), cast(Tier, tier), LRU(), LRU())
    try:
        yield store, tier
    finally:
        store.close()


def keys_of(root: Path, folder: str = "keys") -> list[str]:
    """Names of the keys that there are."""
    return sorted(path.name for path in (root / folder).iterdir() if re.fullmatch("[0-9a-f]{64}", path.name))


def secrets(tokens: Sequence[int], space: Namespace = NS, layout: Layout = SMALL) -> dict[bytes, str]:
    """What nobody without the key may see of a chain: token ids, keys and values, and digests that prove a guess."""
    found, parent, size = dict[bytes, str](), space.root, layout.block_tokens
    for start in range(0, len(tokens), size):
        piece = token_bytes(tokens[start : start + size])
        parent = block_key(space, parent, piece)
        found[parent] = f"key of block {start // size}"
        for at in range(0, len(piece) - 8, 8):
            found[piece[at : at + 8]] = f"tokens {start + at // 4}"
    for place, mark in enumerate(marks(space, tokens)):
        for layer, shape in enumerate(layout.layers):
            for kind in range(2):
                for head in range(shape.heads):
                    row = rows(layout, layer, kind, head, [mark])
                    if len(row) >= 8:
                        found[row] = f"KV of token {place}"
    return found


def leaks_of(folder: Path, patterns: dict[bytes, str]) -> list[str]:
    """Which of the patterns stand in any file below a folder."""
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [
        f"{what} in {path.name}" for pattern, what in patterns.items() for path, data in held.items() if pattern in data
    ]


def plain_sums(store: LocalStore) -> dict[bytes, str]:
    """The checksums of the pieces of every block in memory, as a header that is not encrypted has them."""
    found = dict[bytes, str]()
    residency = store._residency
    for number, resident in residency.residents.items():
        slot = residency.host.view(resident.address)
        payload = slot[resident.layout.header_bytes : resident.layout.slot_bytes(resident.stride)]
        for place, digest in enumerate(checksums(resident.layout, resident.stride, payload)):
            found[digest.to_bytes(8, "little")] = f"checksum {place} of block {number}"
    return found


def slots_on_disk(store: LocalStore) -> list[tuple[Path, int, int]]:
    """File, offset and bytes of each block's slot, the youngest last."""
    residency, found = store._residency, []
    disk = residency.disk
    assert isinstance(disk, DiskTier)
    for number in sorted(residency.index.number.values(), key=residency.index.sequence.__getitem__):
        address = residency.index.disk[number]
        if address >= 0:
            layout, stride = residency.index.kind_of(number).layout, residency.index.stride[number]
            offset, _ = disk._place(address, 0, layout.slot_bytes(stride))
            path = Path(disk._folder.data) / f"extent-{address >> 24:06}.slab"
            found.append((path, offset, layout.slot_bytes(stride)))
    return found


def patch(path: Path, offset: int, data: bytes) -> bytes:
    """Writes over a file's bytes; what was there."""
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(len(data))
        file.seek(offset)
        file.write(data)
    return old


def opens(vault: Vault, slot: bytes) -> Any:
    """The plain (header, payload) of a slot, or None where anything is not what was sealed."""
    try:
        header = decode_header(slot, sealed=True)
        if header.seal is None:
            return None
        opened = vault.open(header)
        layers = len(header.layout.layers)
        payload = memoryview(bytearray(slot[header.layout.header_bytes : header.layout.slot_bytes(header.stride)]))
        opened.layers(payload, 0, layers)
    except TierError:
        return None
    assert list(bad_pieces(opened.header, payload, 0, layers)) == []
    return opened.header, bytes(payload)
