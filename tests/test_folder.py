"""The directory of a disk tier: one process at a time, what is no cache, what is left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slots import Book, abandon, fetch, fill, on_disk, opened, save, stored

from kvstore.errors import BadInput, StoreBusy
from kvstore.files import OsFiles
from kvstore.tiers.disk import DiskTier

MIB = 1 << 20


@pytest.fixture
def book(seed: int) -> Book:
    return Book(random.Random(seed))


def test_a_killed_process_that_holds_the_lock_is_no_obstacle(quick: Path, book: Book) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from slots import *
tier = DiskTier(OsFiles(), {str(quick)!r}, 16 << 20)
list(tier.load())
book = Book(random.Random(5))
save(tier, book.make(), book.make())
print("ready", flush=True)
sys.stdin.read()
""".replace("from slots import *", "from slots import *\nfrom kvstore.files import OsFiles")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(StoreBusy, match=rf"pid {child.pid} \(python"):
            opened(quick)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        child.stdin.close()
    tier = opened(quick)
    theirs = Book(random.Random(5))
    theirs.make(), theirs.make()
    for block, ours in zip(stored(tier, theirs), theirs.blocks.values(), strict=True):
        assert block is ours
        assert tier.tokens(block.sequence) == block.header.tokens
    tier.close()


def test_a_fork_neither_keeps_the_lock_nor_spoils_the_index(quick: Path, book: Book) -> None:
    tier = opened(quick)
    block = book.make()
    save(tier, block)
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there)
        tier.close()
        os.read(here, 1)  # until the parent is done
        os._exit(0)
    os.close(here)
    assert book.check(fetch(tier, block.address)) == block.sequence
    tier.close()
    again = opened(quick)  # while the child lives
    assert again.tokens(1) == block.header.tokens
    again.close()
    os.close(there)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("what", "says"),
    [("a file", "is a file"), ("strangers", "not a kvstore cache"), ("foreign tag", "not a kvstore cache")],
)
def test_directories_that_are_no_cache(tmp_path: Path, what: str, says: str) -> None:
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("x")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("x")
        if what == "foreign tag":
            (place / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=says):
        opened(place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_looking_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a kvstore cache"):
        DiskTier(OsFiles(), tmp_path / "nothing", None, create=False)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_make_no_sense(tmp_path: Path) -> None:
    for capacity, says in ((MIB, "at least 4 MiB"), (1 << 60, "bytes in all")):
        with pytest.raises(BadInput, match=says):
            opened(tmp_path / "cache", capacity)


def test_looking_shrinks_nothing(quick: Path, book: Book) -> None:
    tier = opened(quick / "cache")
    blocks = fill(tier, book)
    tier.close()
    before = on_disk(quick)
    tier = DiskTier(OsFiles(), quick / "cache", None, create=False)
    assert len(list(tier.load())) == len(blocks)
    assert list(tier.verify()) == []
    tier.close()
    assert on_disk(quick) == before


def test_the_directory_says_what_it_is(tmp_path: Path, book: Book) -> None:
    tier = opened(tmp_path / "a/b/cache")
    save(tier, book.make())
    tier.close()
    cache = tmp_path / "a/b/cache"
    assert (cache / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert (cache / ".gitignore").read_text() == "*\n"
    assert sorted(path.name for path in cache.iterdir()) == [".gitignore", "CACHEDIR.TAG", "v1"]
    (cache / "CACHEDIR.TAG").unlink()  # and it is known without
    opened(cache).close()


def test_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".kvstore-CACHEDIR.TAG-0123").write_text("half")
    tier = opened(cache)
    (cache / "v1/.kvstore-x-0123").write_text("half")
    abandon(tier)
    opened(cache).close()
    assert not list(cache.rglob(".kvstore-*"))
