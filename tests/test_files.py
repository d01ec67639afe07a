"""The door to the operating system, with and without what only Linux has."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from faulty_files import FaultyFiles
from slots import memory

from kvstore.files import TEMPORARY, Held, OsFiles


@pytest.fixture(params=[False, True], ids=["linux", "portable"])
def files(request: pytest.FixtureRequest) -> OsFiles:
    return OsFiles(portable=request.param)


@pytest.mark.parametrize("direct", [False, True])
def test_bytes_come_back(files: OsFiles, tmp_path: Path, seed: int, direct: bool) -> None:
    path, data = str(tmp_path / "file"), memory(1 << 20)
    data[:] = random.Random(seed).randbytes(1 << 20)
    handle = files.open(path, create=True, direct=direct)
    files.allocate(handle, 2 << 20)
    files.write(handle, data, 4096)
    files.sync(handle)
    back = memory(1 << 20)
    assert files.read(handle, back, 4096) == 1 << 20
    assert back == data
    assert files.read(handle, back, (2 << 20) - 8192) == 8192  # the end of the file
    assert not any(back[:8192])
    files.zero(handle, 8192, 4096)
    assert files.read(handle, back, 4096) == 1 << 20
    assert back[:4096] == data[:4096]
    assert not any(back[4096:8192])
    assert back[8192:] == data[8192:]
    assert files.size(path) == 2 << 20
    files.truncate(handle, 4096)
    assert files.size(path) == 4096
    files.close(handle)
    files.close(handle)
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_transfers_that_stop_half_way_go_on(tmp_path: Path, seed: int) -> None:
    files = FaultyFiles()
    files.short = True
    data, back = memory(100 * 512), memory(100 * 512)
    data[:] = random.Random(seed).randbytes(len(data))
    handle = files.open(str(tmp_path / "file"), create=True, direct=True)
    files.write(handle, data, 0)
    assert files.read(handle, back, 0) == len(back)
    assert back == data
    files.close(handle)


def test_odd_memory_falls_back_to_the_page_cache(tmp_path: Path) -> None:
    files = OsFiles()
    handle = files.open(str(tmp_path / "file"), create=True, direct=True)
    files.write(handle, memory(8192)[3 : 3 + 4096], 0)
    assert handle.direct is False
    files.close(handle)


def test_portable_has_no_direct_transfers(tmp_path: Path) -> None:
    files = OsFiles(portable=True)
    handle = files.open(str(tmp_path / "file"), create=True, direct=True)
    assert handle.direct is False
    files.close(handle)


def test_small_files_are_replaced_whole(files: OsFiles, tmp_path: Path) -> None:
    path = str(tmp_path / "small")
    files.write_small(path, b"one")
    files.write_small(path, b"two two")
    assert files.read_small(path) == b"two two"
    assert files.read_small(path, 3) == b"two"
    assert files.names(str(tmp_path)) == ["small"]


def test_a_small_file_is_old_or_new_at_every_fault(tmp_path: Path) -> None:
    path = str(tmp_path / "small")
    OsFiles().write_small(path, b"old")
    for n in range(1, 10):
        files = FaultyFiles()
        files.fail_at = n
        try:
            files.write_small(path, b"new")
        except OSError:
            assert Path(path).read_bytes() in (b"old", b"new")
        assert [name for name in os.listdir(tmp_path) if name.startswith(TEMPORARY)] == []
        OsFiles().write_small(path, b"old")


def test_folders(files: OsFiles, tmp_path: Path) -> None:
    path = str(tmp_path / "a/b/c")
    files.make_folder(path)
    files.make_folder(path)
    assert os.stat(path).st_mode & 0o777 == 0o700
    assert files.is_folder(path)
    files.sync_folder(path)
    files.remove(path)
    assert not files.exists(path)
    Path(path).write_text("x")
    assert not files.is_folder(path)
    with pytest.raises(FileExistsError):
        files.make_folder(path)


def test_a_lock_is_held_once(files: OsFiles, tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    lock = files.lock(path)
    with pytest.raises(Held, match=rf"pid {os.getpid()} \("):
        files.lock(path)
    files.close(lock)
    files.close(files.lock(path))


def test_space_and_clocks(files: OsFiles, tmp_path: Path) -> None:
    space = files.space(str(tmp_path))
    assert 0 < space.free <= space.total
    assert files.monotonic() <= files.monotonic()
    assert files.now() > 1.7e9
    assert len(files.random(16)) == 16
    assert files.random(16) != files.random(16)


def test_what_is_mapped_is_the_file(files: OsFiles, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    handle = files.open(str(path))
    with files.map(handle) as image:
        assert image[:] == b"hello"
    files.close(handle)


def test_errors_pass_through(files: OsFiles, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.open(str(tmp_path / "nothing"))
    handle = files.open(str(tmp_path / "file"), create=True)
    with pytest.raises(FileExistsError):
        files.open(str(tmp_path / "file"), create=True)
    files.close(handle)
    with pytest.raises(OSError):
        files.read(handle, memory(4096), 0)


@pytest.mark.parametrize("kept", [False, True])
def test_lost_power_takes_back_what_was_not_synced(tmp_path: Path, kept: bool) -> None:
    lost = 0
    for seed in range(20):
        files, path = FaultyFiles(), str(tmp_path / f"file {seed}")
        handle = files.open(path, create=True)
        files.write(handle, memoryview(b"a" * 4096), 0)
        files.sync(handle)
        files.sync_folder(str(tmp_path))
        files.write(handle, memoryview(b"b" * 4096), 0)
        if kept:
            files.sync(handle)
        files.close(handle)
        files.lose_power(random.Random(seed))
        found = Path(path).read_bytes()
        assert set(found) <= set(b"ab")
        lost += found != b"b" * 4096
    assert (lost == 0) is kept
