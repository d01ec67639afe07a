"""Blocks keep the form that they were stored in; and what says otherwise, or cannot be, is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from blocks import NS, SMALL, drafts, fill, found, marks, recount
from gates import MIB, PATIENCE
from mixed import MIXED, NUMBERS, TOKENS, WRITERS, daemon, mix, opened, stored, told
from remotes import Fleet, settled
from servers import running
from slots import memory

import kvstore
from kvstore import BadInput
from kvstore.bench.remote.server import Server
from kvstore.block import decode_header, encode_header
from kvstore.composition import Context
from kvstore.heading import heading
from kvstore.keys import APART
from kvstore.remote.block import RemoteBlock
from kvstore.save import Saved
from kvstore.store import Store
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.rebuild import check


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as there:
        yield there


@pytest.fixture(params=["naive", "redis"])
def fleet(request: pytest.FixtureRequest, server: Server) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(request.param, server, stack)


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
        for root in (Context(("a mark",)).root(NS), APART):
            with pytest.raises(BadInput, match="start at position 0"):
                store.save(NS, SMALL, TOKENS, {}, root=root, form="rotated")
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
