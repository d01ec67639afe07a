"""What the values in the LMDB index look like: fixed records, names, and the checksum that each ends with."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

from xxhash import xxh3_64_intdigest

from kvstore.block import FORMS, Header, pack_layout, unpack_layout
from kvstore.layout import Layout
from kvstore.sealed import SealedTokens, pack_tokens, unpack_tokens
from kvstore.tiers.base import Entry
from kvstore.tiers.catalog import Doubt

# sequence, address, key, parent, numbers of namespace, tenant, owner and layout, tokens, stride, flags, mark of the key
# that it is sealed with (0: none), created, expires, used, xxh3_64 of what stands before it
RECORD = struct.Struct("<QQ32s32sIIIIIIIIdddQ")
ROOT = 1  # bit of the flags; the bits above it are the form's place in FORMS
_BODY = RECORD.size - 8
_NAMES = slice(80, 96)  # the numbers of names in a record
_SUM = struct.Struct("<Q")
_SEALED = (1 << 64) - 1  # the seed of sealed token bytes is the sequence's complement
Name = bytes | str | Layout


def names_of(header: Header) -> tuple[Name, Name, Name, Name]:
    """The names of a block that its record holds as numbers."""
    return header.namespace, header.tenant, header.owner, header.layout


def record(address: int, header: Header, numbers: list[int]) -> bytes:
    """Record of a block that was just written."""
    flags = int(header.root) | FORMS.index(header.form) << 1
    sizes = header.token_count, header.stride, flags, 0 if header.seal is None else header.seal.mark
    times = header.created, header.expires, header.created
    return _summed(header.sequence, address, header.key, header.parent, *numbers, *sizes, *times)


def used(old: bytes, when: float) -> bytes:
    """The record with another time of its last use."""
    return _summed(*RECORD.unpack(old)[:-2], when)


def numbers_in(old: bytes) -> Iterator[int]:
    """The numbers of names that a record holds."""
    return iter(struct.unpack("<4I", old[_NAMES]))


def _summed(*fields: object) -> bytes:
    return sealed(RECORD.pack(*fields, 0)[:_BODY])


def sealed(data: bytes, seed: int = 0) -> bytes:
    """``data`` and its checksum."""
    return data + _SUM.pack(xxh3_64_intdigest(data, seed))


def opened(value: bytes | None, seed: int = 0) -> bytes | None:
    """The data of a sealed value; None when there is none or it is damaged."""
    if value is None:
        return None
    data = value[:-8]
    return data if value[-8:] == _SUM.pack(xxh3_64_intdigest(data, seed)) else None


def tokens_value(header: Header) -> bytes:
    """What the table of token bytes has of a block. Sealed ones have another seed: none is taken for the other."""
    tokens, sequence = header.indexed_tokens, header.sequence
    if isinstance(tokens, SealedTokens):
        return sealed(pack_tokens(tokens), sequence ^ _SEALED)
    return sealed(tokens, sequence)


def tokens_in(value: bytes | None, sequence: int) -> bytes | SealedTokens | None:
    """The token bytes in a value; None when there is none or it is damaged."""
    data = opened(value, sequence)
    if data is None and (data := opened(value, sequence ^ _SEALED)) is not None:
        return unpack_tokens(data)
    return data


def pack_name(name: Name) -> bytes:
    """A name as bytes: its kind, and itself."""
    if isinstance(name, Layout):
        return b"l" + pack_layout(name)
    return b"n" + name if isinstance(name, bytes) else b"s" + name.encode()


def unpack_name(data: bytes) -> Name:
    """The name in ``data``."""
    kind, rest = data[:1], data[1:]
    if kind == b"l":
        return unpack_layout(rest)
    return rest if kind == b"n" else rest.decode()


class RecordSnapshot:
    """All records in one piece of memory."""

    def __init__(self, image: bytearray, names: dict[int, Name]) -> None:
        self._image = image
        self._names = names

    def check(self) -> None:
        """Raises ``Doubt`` when a record is damaged."""
        image, size, names, last = memoryview(self._image), RECORD.size, self._names, -1
        if len(image) % size:
            raise Doubt("a record has a wrong size")
        for start, r in zip(range(0, len(image), size), RECORD.iter_unpack(image), strict=True):
            if xxh3_64_intdigest(image[start : start + _BODY]) != r[-1] or r[0] <= last:
                raise Doubt("a record is damaged")
            if not all(number in names for number in r[4:8]) or r[10] >> 1 >= len(FORMS):
                raise Doubt("a record names what is not there")
            last = r[0]

    def addresses(self) -> array[int]:
        """Their addresses."""
        words = array("Q", self._image)
        return words[1 :: RECORD.size // 8]

    def entries(self) -> Iterator[Entry]:
        """Their entries; names and layouts are shared objects."""
        names, new, forms = self._names, tuple.__new__, FORMS
        for r in RECORD.iter_unpack(self._image):
            sequence, address, key, parent, space, tenant, owner, layout, tokens, stride, flags, mark, *times, _ = r
            what = names[space], names[tenant], names[owner], names[layout], tokens, stride
            how = flags & ROOT == ROOT, forms[flags >> 1], mark
            yield new(Entry, (sequence, address, key, parent, *what, *times, *how))
