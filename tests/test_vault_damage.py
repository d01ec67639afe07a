"""Encrypted slots on disk that somebody changed or exchanged: misses, and never a wrong byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import NS, SMALL, WIDE, found, ids, load_all, namespace, recount, save
from gates import fetches_are_over, only_on_disk
from vaults import patch, sealed, slots_on_disk
from xxhash import xxh3_64_intdigest

from kvstore.block import decode_header, encode_header
from kvstore.directory import verify
from kvstore.local import LocalStore


def on_disk_only(store: LocalStore, *chains: list[int]) -> None:
    for tokens in chains:
        save(store, tokens, layout=WIDE).wait()
    only_on_disk(store)


@pytest.mark.parametrize("where", ["header", "first layer", "last layer", "tag"])
def test_a_flip_on_disk_is_a_miss(tmp_path: Path, where: str) -> None:
    tokens = ids(1, 32)
    with sealed(tmp_path) as store:
        on_disk_only(store, tokens)
        path, offset, size = slots_on_disk(store)[-1]
        slot = patch(path, offset, b"")
        with path.open("rb") as file:
            file.seek(offset)
            slot = file.read(size)
        header = decode_header(slot, sealed=True)
        assert header.seal is not None
        at = {
            "header": 60,
            "first layer": WIDE.header_bytes + 5,
            "last layer": WIDE.header_bytes + WIDE.layer_offsets(32)[5] + 9,
            "tag": slot.index(header.seal.tags) + 3,
        }[where]
        patch(path, offset + at, bytes([slot[at] ^ 4]))
        assert load_all(store, [*tokens, 0], layout=WIDE) == 0
        fetches_are_over(store)
        assert store.stats()["counters"]["corrupt_blocks"] == 1
        assert "sealed_blocks" not in store.stats()["counters"]
        assert found(store, tokens, layout=WIDE).tokens == 0
        on_disk_only(store, tokens)
        assert load_all(store, [*tokens, 0], layout=WIDE) == 32
        assert recount(store) == []


@pytest.mark.parametrize("across", [False, True], ids=["one namespace", "two"])
def test_exchanged_slots_are_misses(tmp_path: Path, across: bool) -> None:
    spaces = NS, namespace("other") if across else NS
    chains = ids(1, 16), ids(2, 16)
    with sealed(tmp_path) as store:
        for tokens, space in zip(chains, spaces, strict=True):
            save(store, tokens, space).wait()
        only_on_disk(store)
        one, two = slots_on_disk(store)
        assert one[2] == two[2]
        with two[0].open("rb") as file:
            file.seek(two[1])
            held = file.read(two[2])
        patch(two[0], two[1], patch(one[0], one[1], held))
        assert [problem.what for problem in store.verify()] == ["another block lies in its slot"] * 2
        for tokens, space in zip(chains, spaces, strict=True):
            assert load_all(store, [*tokens, 0], space, SMALL) == 0
        fetches_are_over(store)
        assert store.stats()["counters"]["corrupt_blocks"] == 2
        assert recount(store) == []


def test_verify_finds_what_lies_under_a_matching_checksum(tmp_path: Path) -> None:
    """Without the keys, only what is no longer the ciphertext that was written can be found."""
    with sealed(tmp_path) as store:
        on_disk_only(store, ids(1, 32))
        path, offset, size = slots_on_disk(store)[-1]
    with path.open("rb") as file:
        file.seek(offset)
        slot = bytearray(file.read(size))
    slot[WIDE.header_bytes] ^= 1
    patch(path, offset, bytes(slot))
    for keys in (None, tmp_path / "keys"):
        *_, problem = verify(tmp_path / "cache", keys)
        assert getattr(problem, "what", "") == "bytes of 1 of 6 layers are not what was written"
    header = decode_header(memoryview(slot), sealed=True)
    assert header.checksums is not None
    end = WIDE.header_bytes + WIDE.key_bytes(0, 32) + WIDE.value_bytes(0, 32)
    header.checksums[0] = xxh3_64_intdigest(slot[WIDE.header_bytes : end])
    patch(path, offset, encode_header(header))
    assert list(verify(tmp_path / "cache", None)) == [1, 1]
    *_, problem = verify(tmp_path / "cache", tmp_path / "keys")
    assert getattr(problem, "what", "") == "layer 0 is not what was sealed"
