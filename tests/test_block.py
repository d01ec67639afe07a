"""The header of a block: round trips, every flipped bit, hostile bytes, and what later versions may add."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import LAYOUT, OTHER, Book
from xxhash import xxh3_128_digest

from kvstore.block import (
    FIXED,
    FORMS,
    MAGIC,
    Header,
    bad_pieces,
    checksums,
    decode_header,
    encode_header,
    header_length,
    pack_layout,
    unpack_layout,
)
from kvstore.errors import BadInput, Corrupt
from kvstore.layout import LayerShape, Layout


@pytest.fixture
def book(seed: int) -> Book:
    return Book(random.Random(seed))


def test_golden_header() -> None:
    """A header as the first version wrote it, byte for byte."""
    layout = Layout((LayerShape(1, 2, 1), LayerShape(1, 2, 1), LayerShape(2, 1, 1)), "float16", 4)
    header = Header(
        key=b"k" * 32,
        parent=b"p" * 32,
        root=True,
        namespace=b"n" * 32,
        fingerprint=b"f" * 32,
        tenant="tenant",
        owner="öwner",
        tokens=b"\1\0\0\0\2\0\0\0",
        layout=layout,
        stride=3,
        sequence=7,
        created=1.5,
        expires=2.5,
        form="rotated",
        base=9,
        writer="test 1",
        checksums=array("Q", range(8)),
    )
    data = encode_header(header)
    assert xxh3_128_digest(data).hex() == "d0226af348b46946b665ee04469b359a"
    assert decode_header(data) == header


@pytest.mark.parametrize("layout", [LAYOUT, OTHER])
def test_round_trip(book: Book, layout: Layout) -> None:
    for tokens in range(1, layout.block_tokens + 1):
        block = book.make(tokens=tokens, layout=layout)
        assert decode_header(block.slot) == block.header
        assert header_length(block.slot, len(block.slot)) == len(encode_header(block.header))


def test_every_bit_of_a_header(book: Book) -> None:
    block = book.make()
    data = bytearray(encode_header(block.header))
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            decode_header(memoryview(data))
        data[bit // 8] ^= 1 << bit % 8
    assert decode_header(memoryview(data)) == block.header


def test_a_thousand_bits_of_payload(book: Book, seed: int) -> None:
    rng, block = random.Random(seed), book.make(layout=OTHER)
    payload = block.slot[OTHER.header_bytes :]
    for _ in range(1000):
        number = rng.randrange(len(OTHER.pieces(32)))
        piece = OTHER.pieces(32)[number]
        place, bit = piece.offset + rng.randrange(piece.length), 1 << rng.randrange(8)
        payload[place] ^= bit
        assert list(bad_pieces(block.header, payload, 0, 3)) == [(piece.layer, number)]
        start = OTHER.layer_offsets(32)[piece.layer]
        assert list(bad_pieces(block.header, payload[start:], piece.layer, piece.layer + 1, start))
        payload[place] ^= bit
    assert list(bad_pieces(block.header, payload, 0, 3)) == []


def test_truncated_headers(book: Book) -> None:
    data = encode_header(book.make().header)
    for length in range(len(data)):
        with pytest.raises(Corrupt):
            decode_header(data[:length])


def forge(
    header: Header, change: dict[str, object] | None = None, drop: str = "", fixed: dict[str, int] | None = None
) -> bytes:
    """A header with changed fields whose checksum is right: what a hostile or a later writer could make."""
    data = encode_header(header)
    magic, version, flags, area, size, pieces, payload, _ = FIXED.unpack_from(data)
    fields = msgpack.unpackb(data[FIXED.size : FIXED.size + size])
    fields.update(change or {})
    fields.pop(drop, None)
    metadata = msgpack.packb(fields)
    numbers = {
        "version": version,
        "flags": flags,
        "area": area,
        "size": len(metadata),
        "pieces": pieces,
        "payload": payload,
    }
    numbers.update(fixed or {})
    body: bytes = metadata + data[FIXED.size + size :]
    zero = FIXED.pack(magic, *numbers.values(), bytes(16))
    return FIXED.pack(magic, *numbers.values(), xxh3_128_digest(zero + body)) + body


def test_unknown_fields_are_passed_over(book: Book) -> None:
    header = book.make().header
    assert decode_header(forge(header)) == header
    assert decode_header(forge(header, {"later": [1, {"x": b"y"}]})) == header


HOSTILE: list[dict[str, object]] = [
    {"key": b"short"},
    {"key": "k" * 32},
    {"parent": None},
    {"root": 1},
    {"namespace": b""},
    {"tokens": b"123"},
    {"tokens": b""},
    {"tokens": "1234"},
    {"tokens": bytes(4 * 17)},
    {"stride": 0},
    {"stride": 17},
    {"stride": 16.0},
    {"sequence": -1},
    {"sequence": 1 << 63},
    {"created": "now"},
    {"form": "other"},
    {"base": -1},
    {"seal": {"key": 1}},
    {"layout": None},
    {"layout": []},
    {"layout": [[[1 << 40, 1, 1, 1]], "float32", 16, 4096]},
    {"layout": [[[4096, 4096, 1, 1]] * 3, "float32", 16, 4096]},
    {"layout": [[[1, 4096, 65536, 65536]], "float64", 65536, 4096]},
    {"layout": [[[-1, 1, 1, 1]], "float32", 16, 4096]},
    {"layout": [[[1, 1.5, 1, 1]], "float32", 16, 4096]},
    {"layout": [[[1, 1, 1, 1]], "float32", 16, 1]},
    {"layout": [[[1, 1, 1, 1]], "complex", 16, 4096]},
    {"layout": [[[1, 1, 1, 1]], ["float32"], 16, 4096]},
    {"layout": [[], "float32", 16, 4096]},
]


@pytest.mark.parametrize("change", HOSTILE, ids=[str(change)[:60] for change in HOSTILE])
def test_hostile_fields(book: Book, change: dict[str, object]) -> None:
    with pytest.raises(Corrupt):
        decode_header(forge(book.make().header, change))


@pytest.mark.parametrize("drop", ["key", "tokens", "layout", "seal", "writer"])
def test_missing_fields(book: Book, drop: str) -> None:
    with pytest.raises(Corrupt):
        decode_header(forge(book.make().header, drop=drop))


@pytest.mark.parametrize(
    "fixed",
    [
        {"version": 2},
        {"flags": 1},
        {"area": 8192},
        {"size": 1 << 31},
        {"pieces": 7},
        {"pieces": 1 << 31},
        {"payload": 1},
    ],
    ids=str,
)
def test_numbers_that_lie(book: Book, fixed: dict[str, int]) -> None:
    with pytest.raises(Corrupt):
        decode_header(forge(book.make().header, fixed=fixed))


def test_another_piece_table(book: Book) -> None:
    """A codec or kind of piece that is not known here must not be read as plain bytes."""
    header = book.make().header
    data = bytearray(encode_header(header))
    magic, version, flags, area, size, pieces, payload, _ = FIXED.unpack_from(data)
    data[FIXED.size + size + 1] = 3  # the codec of the first piece
    zero = FIXED.pack(magic, version, flags, area, size, pieces, payload, bytes(16))
    digest = xxh3_128_digest(zero + data[FIXED.size :])
    data[: FIXED.size] = FIXED.pack(magic, version, flags, area, size, pieces, payload, digest)
    with pytest.raises(Corrupt, match="piece table"):
        decode_header(memoryview(data))


@given(st.binary(max_size=300))
@settings(max_examples=400)
def test_random_metadata(noise: bytes) -> None:
    zero = FIXED.pack(MAGIC, 1, 0, 4096, len(noise), 0, 0, bytes(16))
    data = FIXED.pack(MAGIC, 1, 0, 4096, len(noise), 0, 0, xxh3_128_digest(zero + noise)) + noise
    with pytest.raises(Corrupt):
        decode_header(data)


def test_names_that_do_not_fit(book: Book) -> None:
    header = book.make().header
    for form in FORMS:
        full = replace(header, owner="ö" * 128, tenant="t" * 256, writer="w" * 256, form=form)
        assert decode_header(encode_header(full)) == full
    with pytest.raises(BadInput, match="too long"):
        encode_header(replace(header, owner="o" * 5000))


def test_layouts_travel() -> None:
    for layout in (
        LAYOUT,
        OTHER,
        Layout.uniform(80, 8, 128, "bfloat16"),
        Layout((LayerShape(1, 0, 5),), "uint8", 1, 512),
    ):
        assert unpack_layout(pack_layout(layout)) == layout
    for noise in (b"", b"\x90", b"junk", pack_layout(LAYOUT)[:-1]):
        with pytest.raises(Corrupt):
            unpack_layout(noise)


def test_the_most_broken_layout_has_room_for_its_header(book: Book) -> None:
    shapes = tuple(LayerShape(n % 3 + 1, 1000 + n, 2000 - n) for n in range(200))
    layout = Layout(shapes, "bfloat16", block_tokens=2)
    header = replace(book.make().header, layout=layout, stride=2, tokens=bytes(8))
    sums = checksums(layout, 2, memoryview(bytes(layout.payload_bytes(2))))
    full = replace(header, checksums=sums, owner="o" * 250, tenant="t" * 250, writer="w" * 250)
    assert decode_header(encode_header(full)) == full
