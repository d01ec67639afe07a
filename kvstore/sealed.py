"""What the header of an encrypted block has that others have not. ``cipher.py`` makes and opens it; FORMAT.md is the
prose.

A sealed block's token ids, key and parent in the header are ciphertext; its piece table has one opaque piece for each
stored layer, and the checksums are those of the ciphertext. What the checksums of the plain pieces were stands in the
seal, encrypted, because they would prove a guess of what the pieces are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from kvstore.layout import Layout

ID_BYTES, SALT_BYTES, TAG_BYTES, SUM_BYTES = 16, 32, 16, 8
CODEC_SEALED = 1
TOKENS, SUMS = -2, -1  # the tags behind those of the layers
_SIZES = {"key": ID_BYTES, "salt": SALT_BYTES}
_MARK = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Seal:
    """The header's field ``seal``: which key, what was drawn for this write, and the proof that nothing changed.

    ``tags``: 16 bytes for each stored layer, then for the token ids and for the plain checksums. ``sums``: those, one
    u64 a piece, encrypted.
    """

    key: bytes
    salt: bytes
    tags: bytes
    sums: bytes

    def tag(self, message: int) -> bytes:
        """That of a layer, of ``TOKENS`` or of ``SUMS``."""
        start = message * TAG_BYTES if message >= 0 else len(self.tags) + message * TAG_BYTES
        return self.tags[start : start + TAG_BYTES]

    @property
    def mark(self) -> int:
        """See ``mark_of``."""
        return mark_of(self.key)

    def brief(self) -> Seal:
        """What of it an index needs; the rest takes kilobytes."""
        return replace(self, tags=self.tags[TOKENS * TAG_BYTES :], sums=b"")

    def fields(self) -> dict[str, bytes]:
        """As the header has it."""
        return {"key": self.key, "salt": self.salt, "tags": self.tags, "sums": self.sums}


class SealedTokens(NamedTuple):
    """Token ids as an index keeps them when they are encrypted: what stands in the header of their block."""

    data: bytes
    key: bytes
    salt: bytes
    tag: bytes


def mark_of(key: bytes) -> int:
    """The first bytes of a key's id as a number, which the index keeps of a sealed block; never 0."""
    return int(_MARK.unpack_from(key)[0]) or 1


def seal_of(fields: Any, layout: Layout) -> Seal | None:
    """The seal in a header's field; None where the block is not sealed. Raises ``ValueError``, ``TypeError`` and
    ``KeyError`` for what is neither."""
    if fields is None:
        return None
    pieces = sum(2 * shape.heads for shape in layout.layers)
    sizes = _SIZES | {"tags": (len(layout.layers) + 2) * TAG_BYTES, "sums": pieces * SUM_BYTES}
    found = {name: fields[name] for name in sizes}
    if len(fields) != len(sizes) or any(
        type(value) is not bytes or len(value) != sizes[name] for name, value in found.items()
    ):
        raise ValueError("it is sealed in a way that this version does not know")
    return Seal(**found)


def layer_range(layout: Layout, stride: int, layer: int) -> tuple[int, int]:
    """First byte of a layer in the payload, and the first behind it, without padding."""
    start = layout.layer_offsets(stride)[layer]
    return start, start + layout.key_bytes(layer, stride) + layout.value_bytes(layer, stride)


def stored_sum(payload: memoryview, layout: Layout, stride: int, layer: int) -> int:
    """Checksum of a layer as it lies on disk."""
    start, end = layer_range(layout, stride, layer)
    return xxh3_64_intdigest(payload[start:end])


def pack_tokens(tokens: SealedTokens) -> bytes:
    """For the index."""
    return tokens.data + tokens.key + tokens.salt + tokens.tag


def unpack_tokens(data: bytes) -> SealedTokens:
    """From the index, where a checksum said that it is whole."""
    parts = list(_cut(data, TAG_BYTES, SALT_BYTES, ID_BYTES))
    return SealedTokens(*reversed(parts))


def _cut(data: bytes, *sizes: int) -> Iterator[bytes]:
    """Parts from the end, and what is left."""
    for size in sizes:
        yield data[len(data) - size :]
        data = data[: len(data) - size]
    yield data
