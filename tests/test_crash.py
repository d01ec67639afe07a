"""Kills, failing calls, a full disk: what comes back is what was saved, or a miss. Loss of power: test_power.py."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import ODD, SMALL, WIDE, ids, load_all, recount, save
from faulty_files import FaultyFiles
from gates import fetches_are_over
from hardship import calls_of_the_script, script

import kvstore
from kvstore import KVStoreError
from kvstore.files import Handle, OsFiles

KILLS = 100


def bytes_on_disk(folder: Path) -> int:
    """All bytes of all files, however they are counted."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return max(sum(s.st_size for s in found), sum(s.st_blocks * 512 for s in found))


# -- SIGKILL ---------------------------------------------------------------------------------------------------


def saving(folder: Path, base: int, pipe: int) -> None:
    """The child: saves, forgets and reopens until it is killed; says what is durable and what is gone."""
    draw = random.Random(base)
    while True:
        with kvstore.open(folder, host="2MiB", disk="16MiB") as store:
            for number in range(base, base + 5):
                tokens = ids(number, draw.randrange(1, 80))
                durable = save(store, tokens, owner=str(number)).wait()
                os.write(pipe, b"+%d %d\n" % (number, durable.tokens))
                if draw.random() < 0.3:
                    os.write(pipe, b"?%d 0\n" % number)
                    store.forget(owner=str(number))
                    os.write(pipe, b"-%d 0\n" % number)
                save(store, ids(number + 500_000, 60))  # one that nobody waits for
        base += 5


def killed(folder: Path, base: int, delay: float) -> dict[int, int]:
    """Kills a child after ``delay`` seconds; what it had said was durable, by chain (forgotten: 0, asked: absent)."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            saving(folder, base, writer)
        finally:
            os._exit(1)
    os.close(writer)
    timer = threading.Timer(delay, os.kill, (child, signal.SIGKILL))
    timer.start()
    with open(reader, "rb") as pipe:
        lines = pipe.read().split(b"\n")[:-1]
    timer.join()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself: it raised"
    said: dict[int, int] = {}
    for line in lines:
        number, tokens = map(int, line[1:].split())
        if line[:1] == b"?":
            del said[number]
        else:
            said[number] = tokens
    return said


def killed_and_reopened(folder: Path, seed: int, kills: int) -> list[str]:
    """Faults seen over many kills: promises broken, wrong bytes, budgets."""
    draw = random.Random(seed)
    faults: list[str] = []
    for kill in range(kills):
        base = kill * 1000
        said = killed(folder, base, draw.random() * 0.06)
        with kvstore.open(folder, host="2MiB", disk="16MiB") as store:
            for number in range(base, base + 60):
                have = load_all(store, [*ids(number, 80), 0])
                if number in said and (have > 0 if said[number] == 0 else have < said[number]):
                    faults.append(f"kill {kill} chain {number}: {said[number]} were promised, {have} are there")
                load_all(store, ids(number + 500_000, 60))
            faults += [problem.what for problem in store.verify() if problem.key] + recount(store)  # of blocks
        if bytes_on_disk(folder) > 16 << 20:
            faults.append(f"kill {kill}: {bytes_on_disk(folder)} bytes on disk")
    return faults


def test_a_hundred_kills_of_a_process_that_is_saving(place: Path, seed: int) -> None:
    assert killed_and_reopened(place / "cache", seed, KILLS) == []


@pytest.mark.soak
def test_ten_thousand_kills(place: Path, seed: int) -> None:
    assert killed_and_reopened(place / "cache", seed, 10_000) == []


# -- failing calls ---------------------------------------------------------------------------------------------


class ShortFiles(FaultyFiles):
    """Its n-th call, if it is a read, gives half of what is there, as at the end of a file that was cut."""

    cut_at = 0

    def read(self, handle: Handle, buffer: memoryview, offset: int) -> int:
        got = super().read(handle, buffer, offset)
        return got // 2 if self.calls == self.cut_at else got


def survives(folder: Path, files: FaultyFiles) -> None:
    """The script under faults: clean errors at open, none after; all is well when the faults are over."""
    print(folder.name, "call", files.fail_at, "code", files.code)
    tokens = ids(77, 40)
    try:
        store = kvstore.open(folder, host="2MiB", disk="8MiB", files=files)
    except KVStoreError as error:
        assert str(error)
    else:
        with store:
            script(store, {})
            save(store, tokens).wait()
            assert load_all(store, [*tokens, 0]) == 40  # from memory, if need be
            files.heal()
            store.flush()
            assert recount(store) == []
            assert "failed_jobs" not in store.stats()["counters"]
    files.heal()
    with kvstore.open(folder, host="2MiB", disk="8MiB", files=files) as store:
        for number in range(6):
            load_all(store, ids(number, 60), layout=(SMALL, ODD)[number % 2])
        for _ in range(3):  # a load may find torn blocks that an index made anew from headers took for whole
            save(store, tokens).wait()
            if load_all(store, [*tokens, 0]) == 40:
                break
            fetches_are_over(store)
        else:
            raise AssertionError("it does not come to itself")
    shutil.rmtree(folder)


def fault(n: int, code: int, forever: bool) -> FaultyFiles:
    files = FaultyFiles()
    files.fail_at, files.code, files.forever = n, code, forever
    return files


CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE)


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for good"])
def test_the_nth_call_fails(place: Path, forever: bool, seed: int) -> None:
    """Every call, each with one of the codes in turn; the long variant has all of them."""
    for n in range(1, calls_of_the_script(place / "all") + 1):
        survives(place / f"cache{n}", fault(n, CODES[(n + seed) % 3], forever))


@pytest.mark.soak
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.__getitem__)
def test_the_nth_call_fails_with_every_code(place: Path, code: int, forever: bool) -> None:
    for n in range(1, calls_of_the_script(place / "all") + 20):
        survives(place / f"cache{n}", fault(n, code, forever))


def test_the_nth_read_is_short(place: Path) -> None:
    for n in range(1, calls_of_the_script(place / "all") + 1, 3):
        files = ShortFiles()
        files.cut_at = n
        survives(place / f"cache{n}", files)


@pytest.mark.parametrize("portable", [False, True])
def test_every_transfer_moves_only_half(tmp_path: Path, portable: bool) -> None:
    files = FaultyFiles(portable)
    files.short = True
    survives(tmp_path / "cache", files)


# -- a full disk -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["linux", "portable"])
def files(request: pytest.FixtureRequest) -> Iterator[OsFiles]:
    yield OsFiles(portable=request.param == "portable")


def test_sixty_four_mebibytes_into_sixteen(tmp_path: Path, files: OsFiles, seed: int) -> None:
    draw, written, number = random.Random(seed), 0, 0
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="16MiB", files=files) as store:
        while written < 64 << 20:
            number += 1
            layout = draw.choice((SMALL, WIDE, WIDE, ODD))
            tokens = ids(number, draw.randrange(1, 3 * layout.block_tokens))
            save(store, tokens, layout=layout).wait()
            written = store.stats()["counters"]["disk_written_bytes"]
            if number % 20 == 0:
                assert bytes_on_disk(tmp_path / "cache") <= 16 << 20
                load_all(store, ids(number - draw.randrange(20), 90), layout=draw.choice((SMALL, WIDE, ODD)))
        assert recount(store) == [] and store.verify() == []
    assert bytes_on_disk(tmp_path / "cache") <= 16 << 20


def test_others_take_the_disk_and_give_it_back(tmp_path: Path) -> None:
    files = FaultyFiles()
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="16MiB", files=files) as store:
        save(store, ids(1, 40)).wait()
        files.stolen = 1 << 60
        for number in range(2, 200):
            save(store, ids(number, 70)).wait()
        assert load_all(store, ids(1, 41)[:40]) <= 40
        files.heal()
        files.skew = 3600
        assert save(store, ids(999, 70)).wait().tokens == 70
        store.flush()
        assert recount(store) == []
