"""The contract of catalogs, run against the naive and the real one; and what only a file can get wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
from slots import LAYOUT, OTHER, Book, holds

from kvstore.block import Header
from kvstore.errors import TierError
from kvstore.files import OsFiles
from kvstore.tiers.catalog import Catalog, Change, Doubt, MemoryCatalog, entry_of
from kvstore.tiers.lmdb_catalog import LmdbCatalog
from kvstore.tiers.records import RecordSnapshot

MIB = 1 << 20


@pytest.fixture
def book(seed: int) -> Book:
    return Book(random.Random(seed))


def headers(book: Book, count: int) -> list[Header]:
    """Headers of many kinds; no slots are needed."""
    made = [book.make(tokens=n + 1, owner=f"owner {n}").header for n in range(3)]
    made.append(book.make(layout=OTHER).header)
    for n in range(len(made) + 1, count + 1):
        like = made[n % 4]
        tokens = book.rng.randbytes(len(like.tokens))
        made.append(replace(like, sequence=n, key=book.rng.randbytes(32), tokens=tokens, expires=n / 2))
    return made


class CatalogContract:
    def test_it_tells_what_it_was_told(self, catalog: Catalog, book: Book) -> None:
        added = [(n << 24 | 7, header) for n, header in enumerate(headers(book, 300))]
        book.rng.shuffle(added)
        for start in range(0, 300, 37):
            catalog.apply(Change(added=added[start : start + 37]))
        added.sort(key=lambda pair: pair[1].sequence)
        snapshot = catalog.snapshot()
        assert list(snapshot.entries()) == [entry_of(*pair) for pair in added]
        assert list(snapshot.addresses()) == [address for address, _ in added]
        assert all(catalog.tokens(header.sequence) == header.tokens for _, header in added)
        assert catalog.tokens(0) is None
        assert catalog.tokens(1 << 62) is None

    def test_forgotten_used_and_remembered(self, catalog: Catalog, book: Book) -> None:
        added = list(enumerate(headers(book, 20)))
        catalog.apply(Change(added=added))
        catalog.apply(Change(forgotten=[3, 4, 99], used={5: 77.5, 99: 1.0, 3: 2.0}, memos={"a": "b", "ü" * 600: ""}))
        entries = {entry.sequence: entry for entry in catalog.snapshot().entries()}
        assert sorted(entries) == [n for n in range(1, 21) if n not in (3, 4)]
        assert entries[5] == entry_of(*added[4])._replace(used=77.5)
        assert catalog.tokens(3) is None
        assert (catalog.recall("a"), catalog.recall("ü" * 600), catalog.recall("c")) == ("b", "", None)
        catalog.apply(Change(memos={"a": "é"}))
        assert catalog.recall("a") == "é"

    def test_a_snapshot_does_not_change(self, catalog: Catalog, book: Book) -> None:
        catalog.apply(Change(added=list(enumerate(headers(book, 10)))))
        snapshot = catalog.snapshot()
        catalog.apply(Change(forgotten=range(1, 6)))
        assert len(list(snapshot.entries())) == 10
        assert len(list(catalog.snapshot().entries())) == 5

    def test_rewriting_changes_nothing_that_is_told(self, catalog: Catalog, book: Book) -> None:
        given = headers(book, 50)
        catalog.apply(Change(added=list(enumerate(given)), memos={"a": "b"}))
        catalog.apply(Change(forgotten=range(10, 30)))
        before = list(catalog.snapshot().entries())
        catalog.rewrite()
        catalog.rewrite()
        assert list(catalog.snapshot().entries()) == before
        assert catalog.recall("a") == "b"
        assert catalog.tokens(5) == given[4].tokens
        assert catalog.tokens(10) is None
        catalog.apply(Change(added=[(9, replace(given[0], sequence=60, owner="new"))]))
        assert list(catalog.snapshot().entries())[-1].owner == "new"


class TestMemoryCatalog(CatalogContract):
    @pytest.fixture
    def catalog(self) -> Catalog:
        return MemoryCatalog()


class TestLmdbCatalog(CatalogContract):
    @pytest.fixture
    def catalog(self, quick: Path) -> Iterator[Catalog]:
        catalog = made(quick)
        yield catalog
        catalog.close()


def made(folder: Path, limit: int = MIB) -> LmdbCatalog:
    catalog = LmdbCatalog(OsFiles(), str(folder / "index"), limit, create=True)
    catalog.finish()
    return catalog


def test_what_is_forgotten_is_not_in_the_file_after_rewriting(quick: Path, book: Book) -> None:
    catalog = made(quick)
    all_of = headers(book, 60)
    all_of[1] = replace(all_of[1], owner="only here")
    catalog.apply(Change(added=list(enumerate(all_of)), memos={"memo": "kept"}))
    assert holds(quick, b"only here")
    catalog.apply(Change(forgotten=[2]))
    assert holds(quick, all_of[1].tokens)  # LMDB leaves it on free pages
    catalog.rewrite()
    assert not holds(quick, all_of[1].tokens)
    assert not holds(quick, b"only here")
    assert holds(quick, all_of[2].tokens)
    catalog.close()


def test_an_unfinished_catalog_is_doubted(quick: Path, book: Book) -> None:
    catalog = LmdbCatalog(OsFiles(), str(quick / "index"), MIB, create=True)
    catalog.apply(Change(added=list(enumerate(headers(book, 5)))))
    catalog.close()
    with pytest.raises(Doubt, match="not finished"):
        LmdbCatalog(OsFiles(), str(quick / "index"), MIB)


def test_a_full_map_changes_nothing(quick: Path, book: Book) -> None:
    catalog = made(quick, 32 * 4096)
    few, many = headers(book, 40), headers(book, 4000)
    catalog.apply(Change(added=list(enumerate(few))))
    assert catalog.room(41)
    with pytest.raises(TierError, match="full"):
        catalog.apply(Change(added=list(enumerate(many)), memos={"a": "b"}))
    assert len(list(catalog.snapshot().entries())) == 40
    assert catalog.recall("a") is None
    assert not catalog.room(41)
    catalog.apply(Change(forgotten=range(1, 21)))
    assert catalog.room(21)
    assert catalog.size <= 32 * 4096
    catalog.close()


def test_names_survive_a_change_that_failed(quick: Path, book: Book) -> None:
    catalog = made(quick, 32 * 4096)
    new = replace(book.make().header, owner="first seen in a change that fails")
    with pytest.raises(TierError):
        catalog.apply(Change(added=[(n, replace(new, sequence=n)) for n in range(1, 4000)]))
    catalog.apply(Change(added=[(1, new)]))
    assert [entry.owner for entry in catalog.snapshot().entries()] == [new.owner]
    catalog.close()
    catalog = LmdbCatalog(OsFiles(), str(quick / "index"), 32 * 4096)
    assert [entry.owner for entry in catalog.snapshot().entries()] == [new.owner]
    catalog.close()


def test_a_damaged_record_is_noticed(quick: Path, book: Book) -> None:
    catalog = made(quick)
    catalog.apply(Change(added=list(enumerate(headers(book, 9)))))
    snapshot = catalog.snapshot()
    snapshot.check()
    image = snapshot._image
    for bit in random.Random(1).sample(range(len(image) * 8), 200):
        image[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Doubt):
            RecordSnapshot(image, snapshot._names).check()
        image[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Doubt):
        RecordSnapshot(image[:-1], snapshot._names).check()
    with pytest.raises(Doubt):
        RecordSnapshot(image, {}).check()
    RecordSnapshot(image, snapshot._names).check()
    catalog.close()


def test_damaged_token_bytes_are_not_given_out(quick: Path, book: Book) -> None:
    catalog = made(quick)
    header = book.make().header
    catalog.apply(Change(added=[(1, header)]))
    catalog.close()
    path = quick / "index/data.mdb"
    path.write_bytes(path.read_bytes().replace(header.tokens, header.tokens[:-1] + b"\0"))
    (quick / "index/digest").unlink()  # as if the process had been killed
    catalog = LmdbCatalog(OsFiles(), str(quick / "index"), MIB)
    assert len(list(catalog.snapshot().entries())) == 1
    assert catalog.tokens(header.sequence) is None
    catalog.close()


def test_an_lmdb_file_of_somebody_else(quick: Path) -> None:
    with lmdb.open(str(quick / "index")) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(Doubt):
        LmdbCatalog(OsFiles(), str(quick / "index"), MIB)


def test_long_token_runs_lie_on_pages_of_their_own(quick: Path, book: Book) -> None:
    header = book.make().header
    long = [replace(header, sequence=n, tokens=book.rng.randbytes(4 * 3000)) for n in range(1, 30)]
    catalog = made(quick, 4 * MIB)
    catalog.apply(Change(added=list(enumerate(long))))
    catalog.close()
    (quick / "index/digest").unlink()
    catalog = LmdbCatalog(OsFiles(), str(quick / "index"), 4 * MIB)
    assert all(catalog.tokens(h.sequence) == h.tokens for h in long)
    catalog.close()


def test_a_much_changed_index_passes_the_walk(quick: Path, book: Book, seed: int) -> None:
    rng, catalog, live = random.Random(seed), made(quick, 8 * MIB), dict[int, Header]()
    some = headers(book, 4)
    for turn in range(60):
        fresh = [
            replace(rng.choice(some), sequence=turn * 50 + n + 10, owner=str(turn)) for n in range(rng.randrange(50))
        ]
        gone = rng.sample(sorted(live), min(len(live), rng.randrange(60)))
        catalog.apply(Change(added=[(h.sequence, h) for h in fresh], forgotten=gone, used=dict.fromkeys(live, turn)))
        live |= {header.sequence: header for header in fresh}
        for sequence in gone:
            del live[sequence]
        if turn % 6 == 5:
            catalog.close()
            (quick / "index/digest").unlink()
            catalog = LmdbCatalog(OsFiles(), str(quick / "index"), 8 * MIB)
            assert [entry.sequence for entry in catalog.snapshot().entries()] == sorted(live)
    catalog.close()
    assert LAYOUT in {header.layout for header in live.values()}
