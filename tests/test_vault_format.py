"""Sealed slots, byte by byte: how they open, and that nothing opens which somebody changed, exchanged or made up."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgpack
import pytest
from blocks import NS
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from slots import LAYOUT, Book
from vaults import opens
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from kvstore import LayerShape, Layout
from kvstore.block import FIXED, PIECE, Header, checksums, decode_header, encode_header
from kvstore.cipher import Key
from kvstore.errors import Corrupt
from kvstore.files import OsFiles
from kvstore.vault import Vault


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    vault = Vault(OsFiles(), tmp_path / "keys")
    yield vault
    vault.close()


def sealed_slot(vault: Vault, header: Header, payload: bytes) -> bytes:
    target = bytearray(payload)
    made = vault.seal(header, memoryview(bytearray(payload)), memoryview(target))
    return encode_header(made).ljust(header.layout.header_bytes, b"\0") + bytes(target)


@pytest.fixture
def two(vault: Vault, seed: int) -> list[tuple[Header, bytes, bytes]]:
    """Two blocks of one chain: header, payload, sealed slot."""
    book = Book(random.Random(seed))
    first = book.make()
    made = []
    for block in (first, book.make(first, tokens=5)):
        payload = bytes(block.slot[LAYOUT.header_bytes : LAYOUT.slot_bytes(block.header.stride)])
        made.append((block.header, payload, sealed_slot(vault, block.header, payload)))
    return made


def test_what_was_sealed_comes_back(vault: Vault, two: list[tuple[Header, bytes, bytes]]) -> None:
    for header, payload, slot in two:
        assert opens(vault, slot) == (header, payload)


def test_every_flipped_bit_is_noticed(vault: Vault, two: list[tuple[Header, bytes, bytes]], seed: int) -> None:
    """Of the header every byte, of each layer many; between them nobody reads."""
    header, payload, slot = two[0]
    rng = random.Random(seed)
    layout = header.layout
    ends = [layout.layer_offsets(header.stride)[n] for n in range(len(layout.layers))]
    inside = [
        layout.header_bytes + end + rng.randrange(layout.key_bytes(n, 16))
        for n, end in enumerate(ends)
        for _ in range(100)
    ]
    length = len(encode_header(decode_header(slot, sealed=True)))
    for at in [*range(length), *inside]:
        changed = bytearray(slot)
        changed[at] ^= 1 << rng.randrange(8)
        assert opens(vault, bytes(changed)) is None, at
    changed = bytearray(slot)
    changed[length] ^= 1
    assert opens(vault, bytes(changed)) == (header, payload)


CHANGES: dict[str, Any] = {
    "tenant": "other",
    "owner": "other",
    "writer": "other",
    "root": False,
    "sequence": 77,
    "created": 0.5,
    "expires": 1e12,
    "form": "rotated",
    "base": 3,
    "fingerprint": bytes(32),
}


@pytest.mark.parametrize("field", [*CHANGES, "key", "parent", "tokens", "checksums", "tags", "sums", "salt"])
def test_a_header_that_is_made_up_does_not_open(
    vault: Vault, two: list[tuple[Header, bytes, bytes]], field: str
) -> None:
    """Whoever can write the directory can make its checksums match."""
    one, other = (decode_header(slot, sealed=True) for _, _, slot in two)
    assert one.seal is not None and other.seal is not None and one.checksums is not None
    if field in CHANGES:
        forged = replace(one, **{field: CHANGES[field]})
    elif field in ("key", "parent"):
        forged = replace(one, **{field: getattr(other, field)})
    elif field == "tokens":
        forged = replace(one, tokens=one.tokens[::-1])
    elif field == "checksums":  # these are no secret, and prove nothing
        slot = two[0][2]
        forged = replace(one, checksums=array("Q", [number ^ 1 for number in one.checksums]))
        again = encode_header(forged)
        assert opens(vault, again.ljust(LAYOUT.header_bytes, b"\0") + slot[LAYOUT.header_bytes :]) == two[0][:2]
        return
    else:
        forged = replace(one, seal=replace(one.seal, **{field: getattr(one.seal, field)[::-1]}))
    slot = encode_header(forged).ljust(LAYOUT.header_bytes, b"\0") + two[0][2][LAYOUT.header_bytes :]
    assert decode_header(slot, sealed=True) == forged  # nothing else is wrong with it
    assert opens(vault, slot) is None


def test_layers_that_are_exchanged_do_not_open(vault: Vault, two: list[tuple[Header, bytes, bytes]]) -> None:
    header, payload, slot = two[0]
    again = sealed_slot(vault, header, payload)
    area = LAYOUT.header_bytes
    second = area + LAYOUT.layer_offsets(header.stride)[1]
    assert opens(vault, again[:area] + slot[area:]) is None
    assert opens(vault, slot[:second] + again[second:]) is None


def test_an_old_reader_refuses_it(two: list[tuple[Header, bytes, bytes]]) -> None:
    """``sealed`` is what this version has beyond the one before: without it, a seal is refused as it always was."""
    with pytest.raises(Corrupt, match="encrypted"):
        decode_header(two[0][2])


@pytest.mark.parametrize(
    "wrong", [5, "seal", [], {}, {"key": b"k" * 16}, {"key": 1, "salt": b"", "tags": b"", "sums": b""}]
)
def test_seals_of_another_kind_are_refused(two: list[tuple[Header, bytes, bytes]], wrong: object) -> None:
    data = two[0][2]
    magic, version, flags, area, size, pieces, payload, _ = FIXED.unpack_from(data)
    fields = msgpack.unpackb(data[FIXED.size : FIXED.size + size])
    for seal in (wrong, {**fields["seal"], "more": b""}, {**fields["seal"], "tags": fields["seal"]["tags"][1:]}):
        metadata = msgpack.packb(fields | {"seal": seal})
        rest = data[FIXED.size + size : FIXED.size + size + pieces * (PIECE.size + 8)]
        fixed = magic, version, flags, area, len(metadata), pieces, payload
        digest = xxh3_128_digest(FIXED.pack(*fixed, bytes(16)) + metadata + rest)
        forged = (FIXED.pack(*fixed, digest) + metadata + rest).ljust(len(data), b"\0")
        with pytest.raises(Corrupt, match="metadata"):
            decode_header(forged, sealed=True)


ROOMS = [(layers, heads) for layers in (1, 61, 600, 4096) for heads in (1, 8) if layers < 4096 or heads == 1]


@pytest.mark.parametrize(("layers", "heads"), ROOMS)
def test_the_header_has_room_for_any_seal(vault: Vault, layers: int, heads: int) -> None:
    """With names of the greatest length, numbers of the greatest size, and layouts whose area has nothing to spare."""
    name = "é" * 127 + "x"
    for block_tokens in (1, 256):
        layout = Layout((LayerShape(heads, 1, 1),) * layers, "uint8", block_tokens, alignment=512)
        payload = bytes(layout.payload_bytes(1))
        plain = Header(
            b"k" * 32, b"p" * 32, True, b"n" * 32, b"f" * 32, name, name, bytes(4 * block_tokens), layout,
            block_tokens, 2**63 - 1, 1e9, 1e9, "rotated", 2**63 - 1, name,
        )  # fmt: skip
        payload = bytes(layout.payload_bytes(block_tokens))
        plain.checksums = checksums(layout, block_tokens, memoryview(bytearray(payload)))
        assert opens(vault, sealed_slot(vault, plain, payload)) == (plain, payload)


def test_the_page_on_the_format_says_how_it_is_opened(
    vault: Vault, tmp_path: Path, two: list[tuple[Header, bytes, bytes]]
) -> None:
    """By hand, from nothing but FORMAT.md and the key's file."""
    header, payload, slot = two[1]
    secret = (tmp_path / "keys" / header.namespace.hex()).read_bytes()
    size, pieces = FIXED.unpack_from(slot)[4:6]
    fields = msgpack.unpackb(slot[FIXED.size : FIXED.size + size])
    seal = fields.pop("seal")

    def h(data: bytes, length: int = 32) -> bytes:
        return blake2b(data, digest_size=length, key=secret).digest()

    assert seal["key"] == h(b"kvstore/1 key", 16)
    slot_key = AESGCM(h(b"kvstore/1 slot" + seal["salt"]))
    bound = blake2b(msgpack.packb([fields, seal["key"], seal["salt"]]), digest_size=32).digest()
    tags = [seal["tags"][at : at + 16] for at in range(0, len(seal["tags"]), 16)]

    def opened(message: int, data: bytes, proof: bytes, tag: bytes) -> bytes:
        return slot_key.decrypt(message.to_bytes(12, "little"), data + tag, proof)

    place = header.sequence.to_bytes(8, "little")
    assert opened(2**32 - 2, fields["tokens"], place, tags[-2]) == header.tokens
    assert header.checksums is not None
    assert opened(2**32 - 1, seal["sums"], bound, tags[-1]) == header.checksums.tobytes()
    mask = Cipher(algorithms.AES(h(b"kvstore/1 mask")), modes.ECB()).decryptor()
    assert mask.update(fields["key"] + fields["parent"]) == header.key + header.parent
    table = slot[FIXED.size + size :]
    sums = array("Q", table[pieces * PIECE.size : pieces * (PIECE.size + 8)])
    assert pieces == len(LAYOUT.layers)
    for layer, (kind, codec, number, first, heads, offset, raw, stored) in enumerate(
        PIECE.iter_unpack(table[: pieces * PIECE.size])
    ):
        assert (kind, codec, number, first, heads) == (2, 1, layer, 0, LAYOUT.layers[layer].heads) and raw == stored
        data = slot[LAYOUT.header_bytes + offset : LAYOUT.header_bytes + offset + stored]
        assert xxh3_64_intdigest(data) == sums[layer]
        assert opened(layer, data, bound, tags[layer]) == payload[offset : offset + raw]


def test_golden_vector() -> None:
    layout = Layout((LayerShape(1, 2, 2), LayerShape(2, 1, 3)), "uint8", block_tokens=4, alignment=512)
    payload = bytearray(range(256)) * 4
    plain = Header(
        bytes(range(32)),
        bytes(32),
        True,
        NS.digest,
        NS.fingerprint.digest,
        "t",
        "o",
        bytes(range(16)),
        layout,
        4,
        9,
        1.5,
    )
    plain.checksums = checksums(layout, 4, memoryview(payload))
    target = memoryview(bytearray(1024))
    made = Key(bytes(range(32))).seal(plain, memoryview(payload), target, bytes(range(32, 64)))
    assert (
        blake2b(encode_header(made) + bytes(target), digest_size=16).hexdigest() == "94f27c246a50772dbe69cb6cff058b69"
    )
