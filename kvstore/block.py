"""The header of a block: what its bytes are, whose, and the checksums that prove it. FORMAT.md is the prose.

A slot is ``[header area][payload]``. The header area starts with a fixed struct, then msgpack metadata, the piece
table and one xxh3_64 per piece; an xxh3_128 covers all of it. Nothing in a header is trusted before that matches.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack
from xxhash import xxh3_128_digest

from kvstore.checksum import copy_digests, digests
from kvstore.errors import BadInput, Corrupt
from kvstore.keys import KEY_BYTES, TOKEN_BYTES
from kvstore.layout import MAX_LAYERS, PIECE_BYTES, LayerShape, Layout
from kvstore.sealed import CODEC_SEALED, TOKENS, Seal, SealedTokens, layer_range, seal_of

MAGIC = b"KVBLOCK1"
VERSION = 1
# magic, version, flags (whoever does not know one must not read on), bytes of the header area, of the metadata, number
# of pieces, bytes of the payload, xxh3_128 of the header with this field zero
FIXED = struct.Struct("<8sHHIIIQ16s")
# kind, codec, layer, first head, number of heads, offset in the payload, raw length, stored length
PIECE = struct.Struct("<BBHHHQQQ")
CODEC_PLAIN = 0
KIND_OPAQUE = 2
FORMS = ("pre", "rotated", "opaque")
MAX_METADATA = 16 << 20
MAX_NUMBER = 1 << 63
assert PIECE.size == PIECE_BYTES
_TYPES = {
    "key": bytes,
    "parent": bytes,
    "root": bool,
    "namespace": bytes,
    "fingerprint": bytes,
    "tenant": str,
    "owner": str,
    "tokens": bytes,
    "stride": int,
    "sequence": int,
    "created": float,
    "expires": float,
    "form": str,
    "base": int,
    "writer": str,
}


@dataclass(slots=True)
class Header:
    """Everything that is known of one block beside its payload.

    ``tokens`` are little-endian uint32 bytes; ``checksums`` one xxh3_64 per piece in the order of ``layout.pieces``;
    ``created`` and ``expires`` are Unix seconds (``expires`` 0: never); ``sequence`` orders writes of one store.
    ``form`` says whether keys are before RoPE (``pre``), rotated at ``base``, or opaque to us. Where there is a
    ``seal``, key, parent and tokens are encrypted, and ``checksums`` are of each stored layer's ciphertext.
    """

    key: bytes
    parent: bytes
    root: bool
    namespace: bytes
    fingerprint: bytes
    tenant: str
    owner: str
    tokens: bytes
    layout: Layout
    stride: int
    sequence: int
    created: float
    expires: float = 0.0
    form: str = "pre"
    base: int = 0
    writer: str = ""
    checksums: array[int] | None = None
    seal: Seal | None = None

    @property
    def token_count(self) -> int:
        """Number of tokens in the block."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of header area and payload."""
        return self.layout.slot_bytes(self.stride)

    @property
    def indexed_tokens(self) -> bytes | SealedTokens:
        """The token ids as an index keeps them."""
        seal = self.seal
        return self.tokens if seal is None else SealedTokens(self.tokens, seal.key, seal.salt, seal.tag(TOKENS))


def address_of(buffer: object) -> int:
    """Memory address of the first byte of a writable buffer, for ``ctypes.memmove`` and alignment checks."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # type: ignore[arg-type]


def checksums(layout: Layout, stride: int, payload: memoryview) -> array[int]:
    """One xxh3_64 per piece of ``payload``. Lets other threads run while it reads."""
    address = None if payload.readonly else address_of(payload)
    return digests(layout, stride, payload, address, 0, len(layout.pieces(stride)))


def copy_checked(target: memoryview, source: memoryview, layout: Layout, stride: int) -> array[int]:
    """Copies a payload and takes the checksums of what was copied, in one pass over memory.

    Both buffers must be writable (their addresses are needed). Returns one xxh3_64 per piece of ``target``.
    """
    return copy_digests(layout, stride, target, address_of(target), address_of(source))


def bad_pieces(header: Header, payload: memoryview, first: int, last: int, base: int = 0) -> Iterator[tuple[int, int]]:
    """(layer, piece number) of each piece in layers ``first`` to ``last - 1`` that is not what was written.

    ``payload`` starts at payload offset ``base``.
    """
    assert header.checksums is not None
    layout = header.layout
    start, stop = piece_start(layout, first), piece_start(layout, last)
    address = None if payload.readonly or not payload else address_of(payload)
    sums, expected = digests(layout, header.stride, payload, address, start, stop, base), header.checksums[start:stop]
    if sums != expected:
        for number, piece in enumerate(layout.pieces(header.stride)[start:stop]):
            if sums[number] != expected[number]:
                yield piece.layer, start + number


@lru_cache(maxsize=65536)
def _piece_starts(layers: tuple[LayerShape, ...], layer: int) -> int:
    return sum(2 * shape.heads for shape in layers[:layer])


def piece_start(layout: Layout, layer: int) -> int:
    """The number of a layer's first piece."""
    first = layout.layers[0].heads
    if all(shape.heads == first for shape in layout.layers[:layer]):
        return 2 * first * layer
    return _piece_starts(layout.layers, layer)


def encode_header(header: Header) -> bytes:
    """Bytes of the header, to be put at the start of the slot. ``checksums`` must be set.

    Raises ``BadInput`` when owner, tenant or writer are too long for the header area.
    """
    assert header.checksums is not None
    layout, seal = header.layout, header.seal
    metadata: bytes = msgpack.packb(described(header) | {"seal": None if seal is None else seal.fields()})
    sums = header.checksums
    body: bytes = metadata + _piece_table(layout, header.stride, seal is not None) + sums.tobytes()
    sizes = layout.header_bytes, len(metadata), len(sums), layout.payload_bytes(header.stride)
    zero = FIXED.pack(MAGIC, VERSION, 0, *sizes, bytes(16))
    if len(zero) + len(body) > layout.header_bytes:
        raise BadInput("owner, tenant and writer are too long together: keep each under 256 bytes")
    fixed = FIXED.pack(MAGIC, VERSION, 0, *sizes, xxh3_128_digest(zero + body))
    return fixed + body


def described(header: Header) -> dict[str, object]:
    """The header's metadata by field, in the order of the format, without the seal."""
    return {
        "key": header.key,
        "parent": header.parent,
        "root": header.root,
        "namespace": header.namespace,
        "fingerprint": header.fingerprint,
        "tenant": header.tenant,
        "owner": header.owner,
        "tokens": header.tokens,
        "layout": _layout_fields(header.layout),
        "stride": header.stride,
        "sequence": header.sequence,
        "created": float(header.created),
        "expires": float(header.expires),
        "form": header.form,
        "base": header.base,
        "writer": header.writer,
    }


def decode_header(data: memoryview | bytes, sealed: bool = False) -> Header:
    """Header at the start of ``data`` (at least the header area). Raises ``Corrupt`` with what is wrong, which a seal
    is for who does not say that it may be ``sealed``."""
    view = memoryview(data)
    total = header_length(view, len(view))
    magic, version, flags, area, size, pieces, payload, digest = FIXED.unpack_from(view)
    body = view[FIXED.size : total]
    if xxh3_128_digest(FIXED.pack(magic, version, flags, area, size, pieces, payload, bytes(16)) + body) != digest:
        raise Corrupt("header checksum differs")
    try:
        fields = msgpack.unpackb(body[:size])
        if not sealed and fields["seal"] is not None:
            raise ValueError("it is encrypted")
        header = _header(fields, array("Q", bytes(body[size + pieces * PIECE.size :])))
    except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise Corrupt(f"header metadata cannot be read: {error}") from error
    layout = header.layout
    if (area, payload) != (layout.header_bytes, layout.payload_bytes(header.stride)):
        raise Corrupt("header area or payload do not have the layout's size")
    if bytes(body[size : size + pieces * PIECE.size]) != _piece_table(layout, header.stride, header.seal is not None):
        raise Corrupt("piece table is not the canonical one of the layout")
    return header


def header_length(view: memoryview, limit: int) -> int:
    """Bytes that the header at the start of ``view`` uses. Raises ``Corrupt`` when it is none, or beyond ``limit``."""
    if len(view) < FIXED.size:
        raise Corrupt("slot is shorter than a header")
    magic, version, flags, area, size, pieces, _, _ = FIXED.unpack_from(view)
    if magic != MAGIC or version != VERSION or flags:
        raise Corrupt("no block header here that this version can read")
    total = int(FIXED.size + size + pieces * (PIECE.size + 8))
    if size > MAX_METADATA or total > min(limit, area):
        raise Corrupt("header is longer than its area")
    return total


def _header(fields: dict[str, Any], sums: array[int]) -> Header:
    """Checks types and ranges; fields that are not known here are passed over."""
    layout = _layout_of(fields["layout"])
    seal = seal_of(fields["seal"], layout)
    values = {name: fields[name] for name in _TYPES}
    for name, kind in _TYPES.items():
        if type(values[name]) is not kind:
            raise ValueError(f"type of {name}")
    count = len(values["tokens"]) // TOKEN_BYTES
    if len(values["tokens"]) % TOKEN_BYTES or not 1 <= count <= values["stride"] <= layout.block_tokens:
        raise ValueError("token count")
    if any(len(values[name]) != KEY_BYTES for name in ("key", "parent", "namespace", "fingerprint")):
        raise ValueError("length of a digest")
    if not (0 <= values["sequence"] < MAX_NUMBER and 0 <= values["base"] < MAX_NUMBER and values["form"] in FORMS):
        raise ValueError("a number or the form of keys")
    return Header(**values, layout=layout, checksums=sums, seal=seal)


def pack_layout(layout: Layout) -> bytes:
    """A layout as bytes, the same for equal layouts."""
    packed: bytes = msgpack.packb(_layout_fields(layout))
    return packed


def unpack_layout(data: bytes) -> Layout:
    """The layout in ``data``. Raises ``Corrupt``."""
    try:
        return _layout_of(msgpack.unpackb(data))
    except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise Corrupt(f"layout cannot be read: {error}") from error


def _layout_fields(layout: Layout) -> list[object]:
    runs = [[count, shape.heads, shape.key_dim, shape.value_dim] for count, shape in layout.runs]
    return [runs, layout.dtype, layout.block_tokens, layout.alignment]


def _layout_of(fields: Any) -> Layout:
    runs, dtype, block_tokens, alignment = fields
    if any(type(number) is not int for run in runs for number in (*run, block_tokens, alignment)):
        raise ValueError("a number of the layout")
    if any(run[0] < 1 for run in runs) or sum(run[0] for run in runs) > MAX_LAYERS:
        raise ValueError("number of layers")
    return _layout(tuple(map(tuple, runs)), dtype, block_tokens, alignment)


@lru_cache(maxsize=256)
def _layout(runs: tuple[tuple[int, int, int, int], ...], dtype: str, block_tokens: int, alignment: int) -> Layout:
    layers = [LayerShape(*shape) for count, *shape in runs for _ in range(count)]
    return Layout(tuple(layers), dtype, block_tokens, alignment)


@lru_cache(maxsize=1024)
def _piece_table(layout: Layout, stride: int, sealed: bool) -> bytes:
    if not sealed:
        return b"".join(
            PIECE.pack(p.kind, CODEC_PLAIN, p.layer, p.head, 1, p.offset, p.length, p.length)
            for p in layout.pieces(stride)
        )
    rows = []
    for layer, shape in enumerate(layout.layers):
        start, end = layer_range(layout, stride, layer)
        rows.append(PIECE.pack(KIND_OPAQUE, CODEC_SEALED, layer, 0, shape.heads, start, end - start, end - start))
    return b"".join(rows)
