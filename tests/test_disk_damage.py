"""Files of a disk tier that were changed behind its back: found, dropped or made anew, and never a wrong byte."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from slots import LAYOUT, Book, abandon, fetch, holds, save

from kvstore.block import encode_header
from kvstore.errors import TierError
from kvstore.files import OsFiles
from kvstore.tiers.disk import DiskTier

CAPACITY = 8 << 20
COUNT = 100  # blocks: more than one extent


@dataclass
class Seen:
    """What a tier offers, and what of it is whole."""

    whole: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@pytest.fixture
def book(seed: int) -> Book:
    return Book(random.Random(seed))


@pytest.fixture
def folder(quick: Path, book: Book) -> Path:
    """A closed tier with blocks."""
    fill(quick / "cache", book).close()
    return quick / "cache"


def fill(folder: Path, book: Book) -> DiskTier:
    tier = DiskTier(OsFiles(), folder, CAPACITY)
    assert list(tier.load()) == []
    blocks = [book.make() for _ in range(COUNT)]
    save(tier, *blocks)
    tier.remember("memo", "value")
    tier.commit(())
    return tier


def survey(folder: Path, book: Book) -> Seen:
    """Opens, reads all that is offered, and holds it against the book."""
    seen = Seen()
    tier = DiskTier(OsFiles(), folder, CAPACITY)
    try:
        for entry in tier.load():
            header = book.blocks[entry.sequence].header
            assert (entry.key, entry.parent, entry.owner) == (header.key, header.parent, header.owner)
            assert tier.tokens(entry.sequence) in (None, header.tokens)
            try:
                found = book.check(fetch(tier, entry.address, entry.layout, entry.stride))
            except TierError:
                found = None
            (seen.whole if found == entry.sequence else seen.broken).add(entry.sequence)
        seen.problems = [problem.what for problem in tier.verify()]
        save(tier, book.make())
    finally:
        tier.close()
    return seen


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


ALL = set(range(1, COUNT + 1))


def test_nothing_is_found_where_nothing_is_wrong(folder: Path, book: Book) -> None:
    assert survey(folder, book) == Seen(ALL, set(), [])


def test_every_flip_in_a_closed_index_is_noticed(folder: Path, book: Book, seed: int) -> None:
    rng = random.Random(seed)
    spare = shutil.copytree(folder, folder.parent / "spare")
    size = (folder / "v1/index/data.mdb").stat().st_size
    for bit in [*rng.sample(range(size * 8), 40), *rng.sample(range(16 * 8, 160 * 8), 10)]:
        shutil.rmtree(folder)
        shutil.copytree(spare, folder)
        flip(folder / "v1/index/data.mdb", bit)
        seen = survey(folder, book)
        del book.blocks[book.last]
        assert seen.whole == ALL, bit
        assert "made anew" in seen.problems[0], bit


def test_flips_in_the_index_of_a_killed_process(quick: Path, book: Book, seed: int) -> None:
    abandon(fill(quick / "spare", book))
    rng, anew, lost = random.Random(seed), 0, 0
    index = quick / "spare/v1/index/data.mdb"
    assert not (index.parent / "digest").exists()
    size = index.stat().st_size
    bits = [
        *rng.sample(range(size * 8), 100),
        *rng.sample(range(160 * 8), 30),
        *rng.sample(range(4096 * 8, 4256 * 8), 30),
    ]
    for bit in bits:
        folder = Path(shutil.copytree(quick / "spare", quick / "cache"))
        flip(folder / "v1/index/data.mdb", bit)
        seen = survey(folder, book)
        del book.blocks[book.last]
        shutil.rmtree(folder)
        anew += any("made anew" in what for what in seen.problems)
        lost += seen.whole != ALL
        assert not seen.broken, bit
    assert anew > len(bits) // 5
    assert lost == 0


def test_a_sound_index_of_a_killed_process_is_used(quick: Path, book: Book) -> None:
    abandon(fill(quick / "cache", book))
    assert survey(quick / "cache", book) == Seen(ALL, set(), [])


def cut(length: int) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(min(length, path.stat().st_size - 1))

    return harm


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "empty": cut(0),
    "short": cut(100),
    "one page": cut(4096),
    "two pages": cut(8192),
    "odd": cut(20001),
    "one byte less": cut(1 << 40),
    "garbage": garbage,
    "longer": longer,
    "a folder": as_folder,
}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_spoiled_index_is_made_anew(quick: Path, book: Book, harm: str, closed: bool) -> None:
    tier = fill(quick / "cache", book)
    tier.close() if closed else abandon(tier)
    HARMS[harm](quick / "cache/v1/index/data.mdb")
    seen = survey(quick / "cache", book)
    assert seen.whole == ALL
    assert closed is False or "made anew" in seen.problems[0]


@pytest.mark.parametrize("harm", HARMS)
def test_a_spoiled_digest(folder: Path, book: Book, harm: str) -> None:
    HARMS[harm](folder / "v1/index/digest")
    assert survey(folder, book).whole == ALL


def test_the_whole_index_gone(folder: Path, book: Book) -> None:
    shutil.rmtree(folder / "v1/index")
    seen = survey(folder, book)
    assert seen.whole == ALL
    assert survey(folder, book).whole == ALL | {COUNT + 1}


def test_an_index_that_was_not_finished(folder: Path, book: Book) -> None:
    (folder / "v1/index/unfinished").touch()
    assert "not finished" in survey(folder, book).problems[0]


@pytest.mark.parametrize("harm", [name for name in HARMS if name not in ("longer", "a folder")])
def test_a_spoiled_extent_costs_its_own_blocks_only(folder: Path, book: Book, harm: str) -> None:
    HARMS[harm](folder / "v1/extent-000001.slab")
    seen = survey(folder, book)
    assert seen.broken == set()
    assert len(ALL - seen.whole) in range(1, 86)
    assert seen.problems
    again = survey(folder, book)
    assert (again.whole - {COUNT + 1}, again.problems) == (seen.whole, [])


def test_flips_in_extents(folder: Path, book: Book, seed: int) -> None:
    rng, slot = random.Random(seed), LAYOUT.full_slot_bytes
    spare = shutil.copytree(folder, folder.parent / "spare")
    payload = [LAYOUT.header_bytes + piece.offset for piece in LAYOUT.pieces(16)]
    for turn in range(60):
        shutil.rmtree(folder)
        shutil.copytree(spare, folder)
        number = rng.randrange(85)
        place = rng.choice([rng.randrange(64), 64 + rng.randrange(400), rng.choice(payload)])
        flip(folder / "v1/extent-000001.slab", (4096 + number * slot + place) * 8 + turn % 8)
        seen = survey(folder, book)
        del book.blocks[book.last]
        assert seen.whole == ALL - seen.broken
        assert len(seen.broken) == len(seen.problems) == 1, (number, place)


def test_swapped_slots_and_extents(folder: Path, book: Book) -> None:
    one, two = folder / "v1/extent-000001.slab", folder / "v1/extent-000002.slab"
    slot = LAYOUT.full_slot_bytes
    data = bytearray(one.read_bytes())
    first, second = slice(4096, 4096 + slot), slice(4096 + slot, 4096 + 2 * slot)
    data[first], data[second] = data[second], data[first]
    one.write_bytes(data)
    seen = survey(folder, book)
    assert (seen.broken, len(seen.problems)) == ({1, 2}, 2)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    seen = survey(folder, book)
    assert seen.broken == set()
    assert seen.problems


def test_a_rebuild_finds_what_the_index_lost(folder: Path, book: Book) -> None:
    """Of two copies of a key the younger counts, and the slot of the other is free."""
    tier = DiskTier(OsFiles(), folder, CAPACITY)
    list(tier.load())
    old = book.blocks[1]
    again = Book(random.Random(1), last=COUNT).make()
    again.header = replace(old.header, sequence=101)
    again.slot[:] = old.slot
    data = encode_header(again.header)
    again.slot[: len(data)] = data
    book.blocks[101], book.last = again, 101
    save(tier, again)
    tier.close()
    shutil.rmtree(folder / "v1/index")
    assert survey(folder, book).whole == ALL - {1} | {101}


def test_what_is_not_ours_is_left_alone(folder: Path, book: Book) -> None:
    (folder / "v2").mkdir()
    (folder / "v2/data").write_bytes(b"future")
    (folder / "notes.txt").write_bytes(b"mine")
    (folder / "v1/other").write_bytes(b"what")
    future = bytearray((folder / "v1/extent-000002.slab").read_bytes())
    future[8] = 2  # the version
    (folder / "v1/extent-000009.slab").write_bytes(future)
    before = {path: path.read_bytes() for path in (folder / "v1").glob("extent-000009*")}
    before |= {path: path.read_bytes() for path in (folder / "v2/data", folder / "notes.txt", folder / "v1/other")}
    assert survey(folder, book).whole == ALL
    tier = DiskTier(OsFiles(), folder, CAPACITY)
    list(tier.load())
    while tier.reserve(LAYOUT.full_slot_bytes):
        pass
    assert tier.used <= CAPACITY
    tier.close()
    assert all(path.read_bytes() == data for path, data in before.items())
    assert holds(folder, b"future") == [str(folder / "v2/data")]
