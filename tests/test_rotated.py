"""Chains of which some blocks hold keys before rotation, and others keys that are turned: every tier tells which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from blocks import NS, SMALL, drafts, fill, found, ids, marks, recount, rows
from gates import MIB, PATIENCE
from hosted import hosted
from outside import FarHostedClient, Papers, papers
from remotes import Fleet, settled
from servers import running
from slots import memory
from vaults import sealed

import kvstore
from kvstore import BadInput
from kvstore.bench.remote.server import Server
from kvstore.block import decode_header, encode_header
from kvstore.composition import Context
from kvstore.heading import heading
from kvstore.load import Load
from kvstore.local import LocalStore
from kvstore.remote.block import RemoteBlock
from kvstore.save import Saved
from kvstore.store import Store
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.rebuild import check

TOKENS = ids(1, 70)  # four blocks of SMALL, and six tokens
WRITERS = {"pre": "alpha/1", "rotated": "beta/2"}  # a form's engine, and the number of its bytes
NUMBERS = {"pre": 0, "rotated": 1}
MIXED = ["pre", "pre", "rotated", "rotated", "pre"]  # of TOKENS, as ``mix`` saves them


def stored(store: Store, tokens: list[int], form: str) -> Saved:
    """Saves what is not stored of a chain, as the engine does that has keys in this form."""
    made = drafts(store, NS, SMALL, tokens, NUMBERS[form])
    return store.save(NS, SMALL, tokens, made, writer=WRITERS[form], form=form)


def mix(store: Store) -> None:
    assert stored(store, TOKENS[:32], "pre").tokens == 32
    assert stored(store, TOKENS[:64], "rotated").tokens == 64
    assert stored(store, TOKENS, "pre").tokens == 70


def told(store: Store, tokens: list[int], whole: bool = True) -> list[str]:
    """The form of each block that is found, the same by match, pieces and places, whose every byte is its engine's."""
    match = found(store, tokens)
    load = store.load(match)
    try:
        assert not whole or load.tokens == len(tokens)
        assert all(load.wait(layer, PATIENCE) for layer in range(len(SMALL.layers)))
        forms = [origin.form for origin in match.origins]
        assert set(match.forms) == set(forms)
        for layer in range(len(SMALL.layers)):
            places = load.places(layer)
            assert [place.rotated for place in places] == [piece.rotated for piece in load.pieces(layer)]
            assert [place.rotated for place in places] == [form == "rotated" for form in forms]
            assert [place.position for place in places] == list(range(0, len(tokens), 16))
        assert wrong_bytes(load, tokens, forms) == []
        return forms
    finally:
        load.release()


def wrong_bytes(load: Load, tokens: list[int], forms: list[str]) -> list[str]:
    """Where a block's bytes are not those that the engine of its form saved."""
    faults = []
    for layer, shape in enumerate(SMALL.layers):
        for block, (piece, form) in enumerate(zip(load.pieces(layer), forms, strict=True)):
            made = marks(NS, tokens, NUMBERS[form])[block * 16 : block * 16 + piece.tokens]
            for kind, view in enumerate((piece.keys, piece.values)):
                size = len(view) // shape.heads
                for head in range(shape.heads):
                    expected = rows(SMALL, layer, kind, head, made)
                    if bytes(view[head * size : head * size + len(expected)]) != expected:
                        faults.append(f"block {block} layer {layer} kind {kind}")
    return faults


@contextmanager
def daemon(path: Path) -> Iterator[Store]:
    with hosted(path, host=8 * MIB, disk=64 * MIB) as there, there.connect() as client:
        yield client
        client.flush()
        assert recount(cast(LocalStore, client)) == []


def opened(path: Path) -> LocalStore:
    return kvstore.open(path, host="8MiB", disk="64MiB")


# -- what is saved is told, wherever it is -----------------------------------------------------------------------------


def test_memory_tells_which_keys_are_rotated() -> None:
    with kvstore.open(host="8MiB") as store:
        mix(store)
        assert told(store, TOKENS) == MIXED
        assert found(store, TOKENS).writers == ("alpha/1", "beta/2")
        assert found(store, TOKENS[:32]).forms == ("pre",) and found(store, TOKENS[:32]).writers == ("alpha/1",)


def test_blocks_before_rotation_are_what_they_always_were() -> None:
    with kvstore.open(host="8MiB") as store:
        mix(store)
        match, index = found(store, TOKENS), store._residency.index
        heads = [heading(index, number, 16) for number, _ in match.blocks]
        match.release()
    assert [(head.form, head.base) for head in heads] == list(zip(MIXED, [0, 0, 32, 48, 0], strict=True))
    assert [head.writer for head in heads] == [WRITERS[form] for form in MIXED]
    with kvstore.open(host="8MiB") as other:  # keys do not depend on the form
        stored(other, TOKENS, "rotated")
        match = found(other, TOKENS)
        assert [other._residency.index.key[number] for number, _ in match.blocks] == [head.key for head in heads]
        match.release()


@pytest.mark.parametrize("rebuilt", [False, True], ids=["index", "headers"])
def test_a_restart_tells_it(tmp_path: Path, rebuilt: bool) -> None:
    with opened(tmp_path / "cache") as store:
        mix(store)
    if rebuilt:  # as when the process was killed, and the index was lost
        for path in (tmp_path / "cache" / "v1" / "index").iterdir():
            path.unlink()
    with opened(tmp_path / "cache") as store:
        match = found(store, TOKENS)
        assert match.tiers == ["disk"] * 5 and match.writers == ()  # nobody has read them yet
        match.release()
        assert told(store, TOKENS) == MIXED
        assert found(store, TOKENS).writers == ("alpha/1", "beta/2")
        assert not [problem for problem in store.verify() if problem.key] and recount(store) == []


def test_a_load_tells_who_wrote_what_it_brings_from_disk(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as store:
        mix(store)
    with opened(tmp_path / "cache") as store:
        load = store.load(found(store, TOKENS))
        assert load.wait(0, PATIENCE)
        assert load.writers == ("alpha/1", "beta/2")
        load.release()


def test_encrypted_blocks_tell_it(tmp_path: Path) -> None:
    with sealed(tmp_path) as store:
        mix(store)
    with sealed(tmp_path) as store:
        assert told(store, TOKENS) == MIXED and list(store.verify()) == []


def test_a_daemon_tells_it_also_after_it_was_started_anew(quick: Path) -> None:
    with daemon(quick / "cache") as client:
        mix(client)
        assert told(client, TOKENS) == MIXED
        assert found(client, TOKENS).writers == ("alpha/1", "beta/2")
    with daemon(quick / "cache") as client:
        assert found(client, TOKENS).writers == ()
        assert told(client, TOKENS) == MIXED
        match = found(client, TOKENS)
        assert match.writers == ("alpha/1", "beta/2")
        load = client.load(match)
        assert load.writers == ("alpha/1", "beta/2")
        load.release()


def test_a_match_that_was_cut_tells_of_what_is_left(quick: Path) -> None:
    with daemon(quick / "cache") as client:
        mix(client)
        match = found(client, TOKENS)
        match.cut(40)
        assert match.forms == ("pre",) and len(match.origins) == len(match.blocks) == 2
        load = client.load(match)
        assert [place.rotated for place in load.places(0)] == [False, False]
        load.release()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("papers"))


def test_a_daemon_on_another_machine_tells_it(quick: Path, made: Papers) -> None:
    with hosted(quick / "cache", host=8 * MIB) as there, FarHostedClient(there, made, False) as client:
        mix(client)
        assert told(client, TOKENS) == MIXED
    with hosted(quick / "cache", host=8 * MIB) as there, FarHostedClient(there, made, False) as client:
        assert told(client, TOKENS) == MIXED


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as there:
        yield there


@pytest.fixture(params=["naive", "redis"])
def fleet(request: pytest.FixtureRequest, server: Server) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(request.param, server, stack)


def test_another_host_is_told_it(fleet: Fleet, tmp_path: Path) -> None:
    one, other = fleet.host(tmp_path / "one"), fleet.host(tmp_path / "other")
    mix(one)
    assert one.flush(PATIENCE)
    match = found(other, TOKENS[:64])
    assert match.tiers == ["remote"] * 4 and match.writers == ("alpha/1", "beta/2")
    match.release()
    assert told(other, TOKENS[:64]) == MIXED[:4]
    settled(other)
    assert found(other, TOKENS[:64]).tiers == ["host"] * 4 and told(other, TOKENS[:64]) == MIXED[:4]


# -- what is stored stays as it is -------------------------------------------------------------------------------------


def offered(store: Store, form: str) -> Saved:
    """Saves all of ``TOKENS`` anew, whatever is stored."""
    every, made = marks(NS, TOKENS, NUMBERS[form]), {}
    for block, draft in enumerate(store.drafts(SMALL, 5)):
        fill(draft, every[block * 16 : block * 16 + 16])
        made[block] = draft
    return store.save(NS, SMALL, TOKENS, made, writer=WRITERS[form], form=form)


@pytest.mark.parametrize("form", ["pre", "rotated"])
def test_a_block_in_memory_keeps_its_form(form: str) -> None:
    with kvstore.open(host="8MiB") as store:
        mix(store)
        saved = offered(store, form)
        assert (saved.tokens, saved.new_tokens) == (70, 0)
        assert told(store, TOKENS) == MIXED


@pytest.mark.parametrize("form", ["pre", "rotated"])
def test_a_block_on_disk_is_not_taken_for_what_another_engine_has_computed(tmp_path: Path, form: str) -> None:
    """A block that is only on disk is in memory once it was computed again; but not in another form."""
    with opened(tmp_path / "cache") as store:
        mix(store)
    with opened(tmp_path / "cache") as store:
        assert offered(store, form).tokens == 70
        assert store.stats()["counters"]["host_adopted_blocks"] == MIXED.count(form)
        assert found(store, TOKENS).tiers == ["host" if other == form else "disk" for other in MIXED]
        assert told(store, TOKENS) == MIXED and recount(store) == []
    with daemon(tmp_path / "cache") as client:
        assert offered(client, form).tokens == 70
        assert told(client, TOKENS) == MIXED


@pytest.mark.parametrize("form", ["pre", "rotated"])
def test_nor_is_one_of_another_host(fleet: Fleet, form: str) -> None:
    one, other = fleet.host(), fleet.host()
    mix(one)
    assert one.flush(PATIENCE)
    match = found(other, TOKENS[:64])
    assert match.tiers == ["remote"] * 4
    assert offered(other, form).tokens == 70
    assert other.stats()["counters"]["host_adopted_blocks"] == MIXED[:4].count(form)
    match.release()
    assert told(other, TOKENS) == [*MIXED[:4], form]


def test_a_longer_block_of_another_form_takes_the_place_of_a_tail() -> None:
    with kvstore.open(host="8MiB") as store:
        stored(store, TOKENS[:20], "rotated")
        assert told(store, TOKENS[:20]) == ["rotated", "rotated"]
        made = drafts(store, NS, SMALL, TOKENS[:28])
        assert store.save(NS, SMALL, TOKENS[:28], made).new_tokens == 12
        assert told(store, TOKENS[:28]) == ["rotated", "pre"]
        assert store.stats()["counters"]["superseded_blocks"] == 1
        saved = stored(store, TOKENS[:24], "rotated")  # is covered
        assert (saved.tokens, saved.new_tokens) == (24, 0)
        assert told(store, TOKENS[:28]) == ["rotated", "pre"]


def test_a_block_that_was_forgotten_comes_back_in_the_form_that_it_is_saved_in() -> None:
    with kvstore.open(host="8MiB") as store:
        stored(store, TOKENS[:16], "pre")
        held = found(store, TOKENS[:16])  # so that the number stays
        made = drafts(store, NS, SMALL, TOKENS[:32], 0)
        store.save(NS, SMALL, TOKENS[:32], made, owner="another")
        store.forget(owner="")
        assert found(store, TOKENS[:32]).tokens == 0
        stored(store, TOKENS[:16], "rotated")
        held.release()
        assert told(store, TOKENS[:32]) == ["rotated", "pre"]


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "daemon"])
def test_what_cannot_be_rotated_is_refused(kind: str, quick: Path) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(kvstore.open(host="8MiB") if kind == "local" else daemon(quick / "cache"))
        for form in ("opaque", "", "Rotated"):
            with pytest.raises(BadInput, match=f"form={form!r} is not known"):
                store.save(NS, SMALL, TOKENS, {}, form=form)
        behind = Context(("a mark",)).root(NS)
        with pytest.raises(BadInput, match="start at position 0"):
            store.save(NS, SMALL, TOKENS, {}, root=behind, form="rotated")
        draft = store.draft(SMALL)
        assert draft is not None
        fill(draft, marks(NS, TOKENS)[:16])
        assert store.save(NS, SMALL, TOKENS[:16], {0: draft}, root=Context().root(NS), form="rotated").tokens == 16
        assert found(store, TOKENS[:16]).forms == ("rotated",)


@pytest.mark.parametrize("change", [{"base": 48}, {"base": 0}, {"form": "pre", "base": 0}, {"form": "opaque"}])
def test_a_header_that_says_otherwise_than_the_index_is_a_miss(tmp_path: Path, change: dict[str, object]) -> None:
    """Whoever can write headers could have keys turned as they must not be."""
    with opened(tmp_path / "cache") as store:
        mix(store)
    with opened(tmp_path / "cache") as store:
        residency = store._residency
        match = found(store, TOKENS)
        address = residency.index.disk[match.blocks[2][0]]
        match.release()
        disk = cast(DiskTier, residency.disk)
        slot = memory(SMALL.full_slot_bytes)
        disk.read(address, 0, slot)
        header = decode_header(slot)
        assert (header.form, header.base) == ("rotated", 32)
        data = encode_header(replace(header, **change))  # type: ignore[arg-type]
        slot[: SMALL.header_bytes] = data.ljust(SMALL.header_bytes, b"\0")
        disk.write(address, slot)
        load = store.load(found(store, TOKENS))
        load.wait(0, PATIENCE)
        assert load.good_tokens() == 32
        load.release()
        settled(store)
        assert store.stats()["counters"]["corrupt_blocks"] == 1
        assert found(store, TOKENS).tokens == 32


def test_a_block_of_another_host_that_was_turned_for_other_positions_is_no_such_block() -> None:
    with kvstore.open(host="8MiB") as store:
        mix(store)
        match, index = found(store, TOKENS), store._residency.index
        for at, (number, _) in enumerate(match.blocks[:4]):
            head = heading(index, number, 16)
            for base in (0, 16, 32, 48):
                block, right = RemoteBlock(replace(head, base=base), MIB, 0), base == (16 * at if at > 1 else 0)
                assert block.is_of(NS, SMALL, head.parent, head.tokens, 16 * at) == right
        match.release()


def test_an_index_that_says_otherwise_than_a_header_is_found_out(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as store:
        mix(store)
        assert store.flush(PATIENCE)
        disk = cast(DiskTier, store._residency.disk)
        entries = list(disk._catalog.snapshot().entries())
        assert [entry.form for entry in entries] == MIXED
        assert list(check(disk.read, entries, disk.tokens)) == []
        lies = [entry._replace(form="pre") for entry in entries]
        assert [sequence for _, sequence in check(disk.read, lies, disk.tokens)] == [3, 4]
