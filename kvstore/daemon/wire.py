"""Frames between a client and the daemon: a fixed header, then msgpack. Bytes from outside are data, and bounded.

``magic (4)  version u8  kind u8  0 u16  number u32  length u32  xxh3_64 of the body u64``, little-endian, then it.
``number`` is the request's own, and its answer's. Nothing is allocated for a body before its length is known to be
allowed, and nothing is unpacked before its checksum holds: what is wrong with a frame ends the connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgpack
from xxhash import xxh3_64_intdigest

from kvstore.errors import KVStoreError, TierError

HEADER = struct.Struct("<4sBBHIIQ")
MAGIC = b"KVSD"
VERSION = 1
MAX_BODY = 32 << 20  # what a daemon takes, if it is not told another bound
MAX_ANSWER = 256 << 20  # what a client takes from a daemon
MAX_NUMBER = (1 << 32) - 1
MAX_VALUES = 1 << 18  # that a request is made of
FEW_BYTES = 512  # are never many values
# Of msgpack: first bytes of what has a length in so many bytes behind it, and of what has a fixed size.
_LENGTH = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ITEMS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # and how many values an item is
_SIZE = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_SIZE |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1  # [verb, arguments…]
    ANSWER = 2  # the value
    ERROR = 3  # [name of the error, sentence]
    EVENT = 4  # [what, arguments…], asked for by nobody in particular; both ways, on the second socket


class BadFrame(TierError):
    """What came is no frame of this version, or not what was sent."""


@dataclass(frozen=True, slots=True)
class Head:
    """The fixed part of a frame."""

    kind: Kind
    number: int
    length: int
    check: int


def pack(kind: Kind, number: int, value: object) -> bytes:
    """A frame. Raises ``BadFrame`` for what msgpack has no form for, or more bytes than any peer takes."""
    try:
        body: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadFrame(f"it cannot be put in a message: {error}") from error
    if len(body) > MAX_ANSWER:
        raise BadFrame(f"a message of {len(body)} bytes is too long")
    return HEADER.pack(MAGIC, VERSION, kind, 0, number, len(body), xxh3_64_intdigest(body)) + body


def head_of(data: bytes | bytearray | memoryview, limit: int) -> Head:
    """The header at the start of ``data``; raises ``BadFrame``, also when the body has more than ``limit`` bytes."""
    magic, version, kind, zero, number, length, check = HEADER.unpack_from(data)
    if magic != MAGIC or zero:
        raise BadFrame("this is no message of kvstore")
    if version != VERSION:
        raise BadFrame(f"this is a message of version {version}, and version {VERSION} is spoken here")
    if length > limit:
        raise BadFrame(f"a message of {length} bytes is more than the {limit} that are taken")
    try:
        return Head(Kind(kind), number, length, check)
    except ValueError:
        raise BadFrame(f"kind {kind} of a message is unknown") from None


def unpack(head: Head, body: bytes | bytearray | memoryview, most: int | None = None) -> Any:
    """The value of a frame. Raises ``BadFrame``, also when it is made of more than ``most`` values: each would take
    many times the byte that it may be in the body."""
    if xxh3_64_intdigest(body) != head.check:
        raise BadFrame("the checksum of a message differs")
    if most is not None and len(body) > FEW_BYTES and not few(body, most):
        raise BadFrame(f"a message has more than {most} values, or cannot be read")
    try:
        return msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise BadFrame(f"a message cannot be read: {error}") from error


def few(body: bytes | bytearray | memoryview, most: int) -> bool:
    """Whether a body of msgpack says of itself that it has at most so many values, and has them."""
    place, left, size = 0, 1, len(body)
    while left and place < size:
        first = body[place]
        place, left = place + 1, left - 1
        if first < 0x80 or first >= 0xE0:
            continue
        items = 0
        if first < 0xA0:
            items = (first & 15) * (2 if first < 0x90 else 1)
        elif first < 0xC0:
            place += first & 31
        elif first in _LENGTH:
            width = _LENGTH[first]
            place += width + int.from_bytes(body[place : place + width], "big") + (0xC7 <= first <= 0xC9)
        elif first in _ITEMS:
            width, times = _ITEMS[first]
            items = int.from_bytes(body[place : place + width], "big") * times
            place += width
        else:
            place += _SIZE.get(first, 0)
        left, most = left + items, most - items
        if most < 0:
            return False
    return not left and place <= size


def error_of(error: Exception) -> list[str]:
    """An error for the wire: what kind, and the sentence."""
    kind = type(error).__name__ if isinstance(error, KVStoreError) else "KVStoreError"
    return [kind, str(error) if isinstance(error, KVStoreError) else "the daemon failed; its log says how"]
