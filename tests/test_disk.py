"""The disk tier's own promises: budget, shrinking, erasing, a full filesystem."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from faulty_files import FaultyFiles
from slots import (
    LAYOUT,
    OTHER,
    Block,
    Book,
    drop,
    fetch,
    fill,
    holds,
    memory,
    on_disk,
    opened,
    put,
    save,
    stored,
)

from kvstore.errors import TierError
from kvstore.files import OsFiles
from kvstore.layout import LayerShape, Layout
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.slots import BACK_OFF_SECONDS

MIB = 1 << 20
FULL = LAYOUT.full_slot_bytes


@pytest.fixture
def book(seed: int) -> Book:
    return Book(random.Random(seed))


@pytest.mark.parametrize("portable", [False, True], ids=["linux", "portable"])
def test_the_budget_holds_whatever_is_written(quick: Path, book: Book, seed: int, portable: bool) -> None:
    rng, live = random.Random(seed), dict[int, Block]()
    tier = opened(quick, files=OsFiles(portable))
    for _ in range(600):
        layout = rng.choice((LAYOUT, OTHER))
        block = book.make(tokens=rng.randint(1, layout.block_tokens), layout=layout)
        while not put(tier, block):
            some = live[rng.choice(list(live))]
            for address in tier.neighbours(some.address) if rng.random() < 0.3 else [some.address]:
                drop(tier, live.pop(address))
        tier.commit([(block.address, block.header)])
        live[block.address] = block
        assert tier.used <= 16 * MIB
    assert on_disk(quick) <= 16 * MIB
    for block in live.values():
        assert book.check(fetch(tier, block.address, block.header.layout, block.header.stride)) == block.sequence
    tier.close()
    assert on_disk(quick) <= 16 * MIB


def test_a_full_index_sheds_and_recovers(quick: Path, book: Book) -> None:
    tier = DiskTier(OsFiles(), quick, 64 * MIB, index_bytes=MIB)
    list(tier.load())
    try:
        blocks = fill(tier, book)
        assert 500 < len(blocks) < 4000  # the index was full, not the disk
        for _ in range(4):  # all can be replaced, again and again, by larger ones too
            for start in range(0, len(blocks), 32):
                drop(tier, *blocks[start : start + 32])
                fresh = [book.make(layout=OTHER) for _ in range(8)]
                save(tier, *fresh)
                blocks[start : start + 32] = fresh
            assert tier._catalog.size <= MIB // 2
    finally:
        tier.close()


def test_an_index_that_is_fuller_than_it_thinks(quick: Path, book: Book) -> None:
    """Small blocks taught it that blocks are small; then large ones come."""
    wide = Layout((LayerShape(1, 1, 1),), "uint8", block_tokens=400)
    tier = DiskTier(OsFiles(), quick, 64 * MIB, index_bytes=MIB)
    list(tier.load())
    try:
        blocks = fill(tier, book, tokens=1)
        failed = 0
        for _ in range(300):
            block = book.make(layout=wide)
            while not put(tier, block):
                drop(tier, blocks.pop(0))
            try:
                tier.commit([(block.address, block.header)])
                blocks.append(block)
            except TierError:
                failed += 1
                tier.free(block.address)
        assert failed < 20
        for block in blocks:
            assert tier.tokens(block.sequence) == block.header.tokens
    finally:
        tier.close()


@pytest.mark.parametrize("left", [4 * MIB, 6 * MIB, 10 * MIB])
def test_a_smaller_budget_gives_back_what_was_used_longest_ago(quick: Path, book: Book, left: int) -> None:
    tier = opened(quick)
    blocks = fill(tier, book)
    recent = [block.sequence for block in blocks[85 * 3 : 85 * 4]]  # a whole extent
    tier.touch(recent, 1e9)
    tier.close()
    tier = DiskTier(OsFiles(), quick, left)
    entries = list(tier.load())
    assert on_disk(quick) <= left
    assert tier.used <= left
    assert {*recent} <= {entry.sequence for entry in entries}
    assert len(entries) * FULL > 0.5 * left
    for entry in entries:
        assert book.check(fetch(tier, entry.address)) == entry.sequence
    assert list(tier.verify()) == []
    tier.close()
    tier = opened(quick, left)
    assert len(stored(tier, book)) == len(entries)
    tier.close()


@pytest.mark.parametrize("portable", [False, True], ids=["linux", "portable"])
def test_erased_bytes_are_found_nowhere(quick: Path, book: Book, portable: bool) -> None:
    tier = opened(quick, files=OsFiles(portable))
    blocks = [book.make(owner="ann" if n % 3 else "secret-owner") for n in range(120)]
    blocks += [book.make(tokens=5, owner="secret-owner"), book.make(layout=OTHER, owner="secret-owner")]
    save(tier, *blocks)
    evicted = blocks[1:40:3]
    drop(tier, *evicted)
    save(tier, *[book.make(tokens=12, owner="ann") for _ in range(3)])  # shorter than what lay there
    gone = [block for block in blocks if block.header.owner == "secret-owner"]
    assert all(needles_found(quick, block) for block in gone)
    assert holds(quick, b"secret-owner")
    tier.forget([block.sequence for block in gone])
    tier.erase([block.address for block in gone])
    for block in gone:
        tier.free(block.address)
    for block in [*gone, *evicted]:
        assert needles_found(quick, block) == [], block.sequence
    assert not holds(quick, b"secret-owner")
    kept = [block for block in blocks if block not in gone and block not in evicted]
    for block in kept:
        assert book.check(fetch(tier, block.address)) == block.sequence
        assert tier.tokens(block.sequence) == block.header.tokens
    tier.close()
    tier = opened(quick)
    assert {block.sequence for block in kept} <= {block.sequence for block in stored(tier, book)}
    tier.close()


def needles_found(folder: Path, block: Block) -> list[str]:
    header = block.header
    piece = header.layout.pieces(header.stride)[1]
    start = header.layout.header_bytes + piece.offset
    tail = header.layout.header_bytes + header.layout.pieces(header.stride)[-1].offset
    needles = header.tokens[:12], bytes(block.slot[start : start + 16]), bytes(block.slot[tail : tail + 16])
    return [name for needle in needles for name in holds(folder, needle)]


def test_erasing_while_others_write(quick: Path, book: Book) -> None:
    tier = opened(quick)
    blocks = fill(tier, book)
    drop(tier, *blocks[:20])
    waiting = [book.make() for _ in range(10)]
    for block in waiting[:5]:
        assert put(tier, block)
    tier.erase([])
    for block in waiting[5:]:
        assert put(tier, block)
    tier.commit([(block.address, block.header) for block in waiting])
    for block in [*waiting, *blocks[20:]]:
        assert book.check(fetch(tier, block.address)) == block.sequence
    tier.close()


def test_a_filesystem_that_others_fill(quick: Path, book: Book) -> None:
    files = FaultyFiles()
    tier = opened(quick, files=files)
    save(tier, book.make())
    files.stolen = 1 << 60
    rest = 0
    while put(tier, book.make()):
        rest += 1
    assert rest < 85  # the extent that is there, and no other
    files.stolen = 0
    assert put(tier, book.make())
    tier.close()


def test_a_full_filesystem_that_said_it_had_room(quick: Path, book: Book) -> None:
    files = FaultyFiles()
    tier = opened(quick, files=files)
    files.fail_at, files.forever, files.code = files.calls + 1, True, errno.ENOSPC
    files.fail_at += 1  # statvfs works
    block = book.make()
    with pytest.raises(TierError):
        put(tier, block)
    tier.free(block.address)
    used = tier.used
    assert tier.reserve(FULL) is None  # backs off
    assert tier.used < used
    files.heal()
    files.skew = 2 * BACK_OFF_SECONDS
    save(tier, block)
    assert book.check(fetch(tier, block.address)) == block.sequence
    tier.close()


def test_unaligned_memory_is_served_all_the_same(tmp_path: Path, book: Book) -> None:
    tier = opened(tmp_path / "cache")
    block = book.make()
    save(tier, block)
    odd = memory(FULL + 4096)[8 : 8 + FULL]
    tier.read(block.address, 0, odd)
    assert book.check(odd) == block.sequence
    tier.close()


def test_few_files_are_open_at_a_time(quick: Path, book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.extents._MAX_OPEN", 3)
    tier = opened(quick)
    blocks = fill(tier, book)
    for block in random.Random(1).sample(blocks, 60):
        assert book.check(fetch(tier, block.address)) == block.sequence
        assert len(tier._extents._open) <= 3
    tier.close()
