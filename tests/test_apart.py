"""Blocks that are chains of their own: found, saved and lost each by itself, by one call for all of them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
from blocks import NS, namespace, recount
from gates import MIB, PATIENCE
from hosted import hosted
from hypothesis import given
from hypothesis import strategies as st
from remotes import options, sharing

import kvstore
from kvstore import LayerShape, Layout, Namespace, Store
from kvstore.keys import APART, SHELVES, links
from kvstore.match import without
from kvstore.tiers.naive_remote import NaiveRemote, Shelf

PAGE = Layout((LayerShape(1, 512, 0), LayerShape(1, 64, 0)), "uint8", block_tokens=8)
SIZE = 32


def name(number: int) -> bytes:
    return blake2b(number.to_bytes(4, "little"), digest_size=SIZE).digest()


def page(number: int, space: Namespace = NS) -> bytes:
    data = random.Random(f"{number} {space.digest.hex()}").randbytes(PAGE.token_payload * 8)
    return data.ljust(PAGE.payload_bytes(8), b"\0")


def put(store: Store, numbers: Sequence[int], space: Namespace = NS) -> int:
    """Saves pages; how many of them are stored."""
    drafts = store.drafts(PAGE, len(numbers))
    for number, draft in zip(numbers, drafts, strict=False):
        draft.payload[:] = page(number, space)
    tokens = b"".join(map(name, numbers))
    return store.save(space, PAGE, tokens, dict(enumerate(drafts)), root=APART, owner="o").tokens // 8


def got(store: Store, numbers: Sequence[int], space: Namespace = NS, layout: Layout = PAGE) -> list[int]:
    """Those of the pages that a match finds, all of which must load as they were saved."""
    match = store.match(space, layout, b"".join(map(name, numbers)), root=APART, whole=True)
    there = [number for at, number in enumerate(numbers) if at not in set(match.lacking)]
    assert (match.tokens, match.token_ids) == (8 * len(there), b"".join(map(name, there)))
    assert (match.miss.kind == "complete") == (len(there) == len(numbers))
    load = store.load(match)
    buffer = bytearray(PAGE.payload_bytes(8) * len(there))
    assert load.read_into(memoryview(buffer), PATIENCE) == len(buffer)
    assert bytes(buffer) == b"".join(page(number, space) for number in there)
    load.release()
    return there


@pytest.fixture(params=["local", "daemon"])
def store(request: pytest.FixtureRequest, quick: Path) -> Iterator[Store]:
    if request.param == "local":
        with kvstore.open(quick / "cache", host=8 * MIB, disk=64 * MIB) as local:
            yield local
            assert local.flush(PATIENCE) and recount(local) == []
        return
    with hosted(quick / "cache", host=8 * MIB, disk=64 * MIB) as daemon, daemon.connect() as client:
        yield client
        assert client.flush(PATIENCE) and recount(client) == []  # type: ignore[arg-type]


def test_each_block_is_found_whichever_others_are_there(store: Store) -> None:
    assert got(store, range(6)) == []
    assert put(store, [1, 3, 4]) == 3
    assert got(store, range(6)) == [1, 3, 4] and got(store, [4, 2, 1]) == [4, 1]
    assert got(store, [3]) == [3] and got(store, []) == []
    assert put(store, [5, 3, 0]) == 3 and got(store, range(6)) == [0, 1, 3, 4, 5]


def test_another_namespace_layout_or_token_is_another_block(store: Store) -> None:
    put(store, [1, 2])
    other = Layout(PAGE.layers[:1], "uint8", 8)
    assert got(store, [1, 2], namespace("tenant")) == got(store, [1, 2], namespace(checkpoint="x")) == []
    assert store.match(NS, other, name(1), root=APART, whole=True).blocks == []
    near = name(1)[:-1] + bytes([name(1)[-1] ^ 1])  # on the same shelf, its last bit turned
    assert store.match(NS, PAGE, near, root=APART, whole=True).blocks == []
    assert store.match(NS, PAGE, name(1), whole=True).blocks == []  # as a chain it was never saved
    assert got(store, [1, 2]) == [1, 2]


def test_what_is_neither_stored_nor_drafted_is_left_out(store: Store) -> None:
    drafts = store.drafts(PAGE, 2)
    for number, draft in zip((0, 2), drafts, strict=True):
        draft.payload[:] = page(number)
    tokens = b"".join(map(name, range(3)))
    saved = store.save(NS, PAGE, tokens, {0: drafts[0], 2: drafts[1]}, root=APART)
    assert saved.settled(PATIENCE) and (saved.tokens, saved.new_tokens) == (16, 16)
    assert got(store, range(3)) == [0, 2] and saved.wait(PATIENCE).blocks == 2


def test_one_is_forgotten_and_the_others_stay(store: Store) -> None:
    put(store, range(4))
    store.forget(match=store.match(NS, PAGE, name(1), root=APART, whole=True))
    assert got(store, range(4)) == [0, 2, 3]
    assert put(store, [1]) == 1 and got(store, range(4)) == [0, 1, 2, 3]
    store.forget(owner="o")
    assert got(store, range(4)) == []


def test_they_outlive_a_restart_and_the_loss_of_the_index(quick: Path) -> None:
    place = quick / "cache"
    with kvstore.open(place, host=8 * MIB, disk=64 * MIB) as store:
        put(store, range(20))
    with kvstore.open(place, host=8 * MIB, disk=64 * MIB) as store:
        assert got(store, range(21)) == list(range(20)) and recount(store) == []
    shutil.rmtree(place / "v1" / "index")
    with kvstore.open(place, host=8 * MIB, disk=64 * MIB) as store:
        assert got(store, range(21)) == list(range(20)) and recount(store) == []


def test_more_than_there_is_room_for_goes_oldest_first(quick: Path) -> None:
    with kvstore.open(quick / "cache", host=2 * MIB, disk=4 * MIB) as store:
        for start in range(0, 4000, 50):
            put(store, range(start, start + 50))
            assert store.flush(PATIENCE)
        for start in range(3800, 4000, 40):
            assert got(store, range(start, start + 40)) == list(range(start, start + 40))
        assert got(store, range(200)) == []
        assert recount(store) == []
        assert len(store._residency.index._roots) <= min(4000, SHELVES)


def test_a_broken_hash_costs_hits_and_gives_no_wrong_bytes(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(space: Namespace, parent: bytes, tokens: bytes, extras: object = ()) -> bytes:
        return blake2b(parent + tokens, digest_size=1, key=space.digest).digest() * 32

    monkeypatch.setattr("kvstore.keys.block_key", weak)
    with kvstore.open(quick / "cache", host=8 * MIB, disk=64 * MIB) as store:
        stored = sum(put(store, range(start, start + 50)) for start in range(0, 400, 50))
        assert len(got(store, range(400))) == stored <= 256  # each as it was saved
    with kvstore.open(quick / "cache", host=8 * MIB, disk=64 * MIB) as store:
        assert len(got(store, range(400))) == stored


def test_other_hosts_find_them() -> None:
    shelf = Shelf()
    with (
        sharing(NaiveRemote(shelf, 64 * MIB, None), options()) as one,
        sharing(NaiveRemote(shelf, 64 * MIB, None), options()) as other,
    ):
        put(one, range(4))
        assert one.flush(PATIENCE)
        put(other, [5])
        assert got(other, [5, 0, 1, 2, 3, 4]) == [5, 0, 1, 2, 3]


def test_keys_are_what_they_always_were() -> None:
    (above, key, piece), (other, _, _) = links(NS, APART, name(1) + name(2), SIZE)
    assert piece == name(1) and above != other
    assert [above.hex()[:16], key.hex()[:16]] == ["908ccf66f2fdc981", "25db1a00ba559909"]
    assert [above for above, _, _ in links(NS, APART, name(1) + name(1), SIZE)] == [above, above]
    chained = list(links(NS, NS.root, name(1) + name(2), SIZE))
    assert [each[0] for each in chained] == [NS.root, chained[0][1]]


@given(st.lists(st.binary(min_size=2, max_size=2), max_size=12), st.data())
def test_without_some_of_them(pieces: list[bytes], data: st.DataObject) -> None:
    lacking = sorted(data.draw(st.sets(st.integers(0, len(pieces) - 1)))) if pieces else []
    left = b"".join(piece for at, piece in enumerate(pieces) if at not in lacking)
    assert without(b"".join(pieces), 2, lacking) == left
