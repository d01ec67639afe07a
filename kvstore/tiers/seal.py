"""What a block is made of where it is stored part by part, and the proof that whoever wrote a part knew a secret.

The header goes in an envelope that says how its payload was cut. With a secret, envelope and parts each end with a
BLAKE2b over the block's key, the number of the part and its bytes, keyed by a digest of the secret: without it nobody
makes a part, or passes one for another.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from hmac import compare_digest
from typing import NamedTuple

from kvstore.errors import Corrupt

TAG_BYTES = 32
HEADER_PART = 0xFFFFFFFF  # the number that stands for the header in a proof
_ENVELOPE = struct.Struct("<4sIII")  # magic, bytes of a part at most, number of parts, bytes of the header
_MAGIC = b"KVR1"
_NUMBER = struct.Struct("<I")
ENVELOPE_BYTES = _ENVELOPE.size
MOST_PARTS, LEAST_PART, MOST_PART = 1 << 16, 1 << 10, 256 << 20


class Envelope(NamedTuple):
    """A block's header, and how its payload was cut: into so many parts of at most ``part_bytes``."""

    header: bytes
    part_bytes: int
    parts: int

    def pack(self) -> bytes:
        """As bytes."""
        return _ENVELOPE.pack(_MAGIC, self.part_bytes, self.parts, len(self.header)) + self.header


def unpack(data: bytes) -> Envelope:
    """The envelope that is ``data``. Raises ``Corrupt``."""
    size, part_bytes, parts = _fixed(data)
    if len(data) != ENVELOPE_BYTES + size:
        raise Corrupt("an envelope is longer or shorter than it says")
    return Envelope(data[ENVELOPE_BYTES:], part_bytes, parts)


def parts_in(start: bytes) -> int:
    """How many parts belong to an envelope that begins so. Raises ``Corrupt``."""
    return _fixed(start)[2]


def _fixed(data: bytes) -> tuple[int, int, int]:
    if len(data) < ENVELOPE_BYTES:
        raise Corrupt("an envelope is cut short")
    magic, part_bytes, parts, size = _ENVELOPE.unpack_from(data)
    if magic != _MAGIC or not (1 <= parts <= MOST_PARTS and LEAST_PART <= part_bytes <= MOST_PART):
        raise Corrupt("no envelope that this version can read")
    return size, part_bytes, parts


class Seal:
    """Adds proofs to parts, and checks them; does nothing without a secret. Any thread."""

    def __init__(self, secret: bytes | None) -> None:
        self._key = (
            None if secret is None else blake2b(secret, digest_size=TAG_BYTES, person=b"kvstore remote").digest()
        )

    @property
    def size(self) -> int:
        """Bytes that a proof adds."""
        return 0 if self._key is None else TAG_BYTES

    def close(self, key: bytes, part: int, data: bytes | memoryview) -> bytes | memoryview:
        """A part as it is stored: as it is, or a copy with its proof."""
        return data if self._key is None else b"".join((data, self._proof(key, part, data)))

    def open(self, key: bytes, part: int, data: bytes) -> memoryview:
        """The bytes of a stored part. Raises ``Corrupt`` when the proof is missing or another's."""
        view = memoryview(data)
        if self._key is None:
            return view
        split = max(len(view) - TAG_BYTES, 0)
        if not compare_digest(self._proof(key, part, view[:split]), view[split:]):
            raise Corrupt("a part has no proof that whoever wrote it knew the secret")
        return view[:split]

    def _proof(self, key: bytes, part: int, data: bytes | memoryview) -> bytes:
        assert self._key is not None
        digest = blake2b(_NUMBER.pack(len(key)) + key + _NUMBER.pack(part), digest_size=TAG_BYTES, key=self._key)
        digest.update(data)
        return digest.digest()
