"""The disk tier when the system below it fails: every call in turn, once and for good; power cut at any point."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from faulty_files import FaultyFiles, PowerLoss
from slots import OTHER, Block, Book, abandon, fetch, on_disk, put, save

from kvstore.errors import TierError
from kvstore.files import Files, OsFiles
from kvstore.tiers.base import Entry
from kvstore.tiers.disk import DiskTier

CAPACITY = 4 << 20


@dataclass
class Play:
    """A life of a disk tier in two sessions, and what it was promised on the way."""

    files: FaultyFiles
    folder: Path
    book: Book
    promised: dict[int, Block] = field(default_factory=dict)  # committed, and not forgotten
    erased: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    tier: DiskTier | None = None

    def run(self) -> None:
        """Both sessions; what fails is passed over, as the store does."""
        for session in (self._first, self._second):
            self._try(self._open)
            if self.tier is not None:
                session(self.tier)
                self._try(self.tier.close)
                self.tier = None

    def _try(self, action: Callable[[], object]) -> bool:
        try:
            action()
            return True
        except TierError as error:
            self.errors.append(str(error))
            return False

    def _open(self) -> None:
        tier = DiskTier(self.files, self.folder, CAPACITY)
        self.tier = tier
        for entry in tier.load():
            self.book.blocks[entry.sequence].address = entry.address

    def _first(self, tier: DiskTier) -> None:
        make = self.book.make
        one, two = make(), make()
        self._save(tier, one, two, make(two, tokens=3))
        self._save(tier, make(one), make(layout=OTHER))
        self._drop(tier, two)
        self._save(tier, make(one))  # into the slot of the one before
        self._erase(tier, one)
        tier.remember("name", "value")

    def _second(self, tier: DiskTier) -> None:
        for sequence, block in self.promised.items():
            self._try(partial(self._read, tier, block, sequence))
        tier.touch(list(self.promised)[:2], 99.0)
        if self.promised:
            self._drop(tier, next(iter(self.promised.values())))
        self._save(tier, self.book.make(tokens=2), self.book.make())
        self._try(lambda: list(tier.verify()))

    def _read(self, tier: DiskTier, block: Block, sequence: int) -> None:
        layout = block.header.layout
        assert self.book.check(fetch(tier, block.address, layout, block.header.stride)) == sequence

    def _save(self, tier: DiskTier, *blocks: Block) -> None:
        written = []
        for block in blocks:
            block.address = 0
            if self._try(partial(put, tier, block)) and block.address:
                written.append(block)
            elif block.address:
                tier.free(block.address)
        if self._try(lambda: tier.commit([(block.address, block.header) for block in written])):
            self.promised.update({block.sequence: block for block in written})
        else:
            for block in written:
                tier.free(block.address)

    def _drop(self, tier: DiskTier, block: Block) -> None:
        if self.promised.pop(block.sequence, None):
            tier.forget([block.sequence])
            tier.free(block.address)

    def _erase(self, tier: DiskTier, block: Block) -> None:
        if self.promised.pop(block.sequence, None):
            tier.forget([block.sequence])
            if self._try(lambda: tier.erase([block.address])):
                self.erased.add(block.sequence)
            tier.free(block.address)


def examine(files: Files, folder: Path, book: Book) -> tuple[dict[int, Entry], list[str]]:
    """Opens with sound files and checks everything: each indexed block is whole. Then the tier works."""
    tier = DiskTier(files, folder, CAPACITY)
    try:
        entries = {entry.sequence: entry for entry in tier.load()}
        for entry in entries.values():
            data = fetch(tier, entry.address, entry.layout, entry.stride)
            assert book.check(data) == entry.sequence
            assert tier.tokens(entry.sequence) == book.blocks[entry.sequence].header.tokens
        notes = [problem.what for problem in tier.verify()]
        assert tier.used <= CAPACITY
        assert on_disk(folder) <= CAPACITY
        fresh = book.make()
        save(tier, fresh)
        assert book.check(fetch(tier, fresh.address)) == fresh.sequence
        return entries, notes
    finally:
        tier.close()


def play(folder: Path, seed: int, portable: bool = False) -> Play:
    return Play(FaultyFiles(portable), folder, Book(random.Random(seed)))


@pytest.mark.parametrize("portable", [False, True], ids=["linux", "portable"])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-good"])
def test_any_call_may_fail(quick: Path, seed: int, forever: bool, portable: bool) -> None:
    clean = play(quick / "clean", seed, portable)
    clean.run()
    assert clean.errors == []
    assert examine(OsFiles(), quick / "clean", clean.book)[0].keys() == clean.promised.keys()
    failed = 0
    for n in range(1, clean.files.calls + 1):
        run = play(quick / f"{n}", seed, portable)
        run.files.fail_at, run.files.forever = n, forever
        run.files.code = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EINTR)[(n + seed) % 4]
        run.run()
        failed += bool(run.errors)
        what = f"call {n}: {run.files.log[n - 1] if n <= len(run.files.log) else ''}, {run.files.code}"
        run.files.let_go()
        entries, notes = examine(OsFiles(portable), quick / f"{n}", run.book)
        assert not run.erased & entries.keys(), what
        if not notes and not any("made anew" in note for note in notes):
            assert run.promised.keys() <= entries.keys(), what
    assert failed > clean.files.calls // 3  # most calls matter, or the faults are none


def test_short_transfers_are_taken_up_again(quick: Path, seed: int) -> None:
    run = play(quick / "short", seed)
    run.files.short = True
    run.run()
    assert run.errors == []
    assert examine(OsFiles(), quick / "short", run.book)[0].keys() == run.promised.keys()


def cut(folder: Path, seed: int, n: int) -> Play:
    """A life that ends with the power at call ``n``, and what a new start may find."""
    run = play(folder, seed)
    run.files.fail_at, run.files.code = n, None
    with contextlib.suppress(PowerLoss):
        run.run()
    if run.tier is not None:
        abandon(run.tier)
    run.files.let_go()
    run.files.lose_power(random.Random(seed + n))
    return run


def test_power_may_go_at_any_point(quick: Path, seed: int) -> None:
    clean = play(quick / "clean", seed)
    clean.run()
    points = random.Random(seed).choices(range(1, clean.files.calls + 1), k=200)
    for number, n in enumerate(points):
        run = cut(quick / f"{number}", seed + number, n)
        entries, notes = examine(OsFiles(), quick / f"{number}", run.book)
        assert run.promised.keys() <= entries.keys(), f"{run.files.log[n - 1]} {notes}"
        assert not run.erased & entries.keys(), f"{run.files.log[n - 1]} {notes}"


class Careless(FaultyFiles):
    """Says that it synced, and did not: what the test of lost power must notice."""

    def sync(self, handle: object) -> None:
        """Nothing."""
        self._call("sync", "")


def test_a_missing_sync_is_noticed(quick: Path, seed: int) -> None:
    noticed = 0
    for number in range(30):
        run = Play(Careless(), quick / f"{number}", Book(random.Random(seed)))
        run.run()
        run.files.lose_power(random.Random(seed + number))
        try:
            entries, _ = examine(OsFiles(), quick / f"{number}", run.book)
            noticed += not run.promised.keys() <= entries.keys()
        except AssertionError:
            noticed += 1
    assert noticed > 10
