"""Opening, sharing, closing, forks; other processes and other versions on one directory; sizes and paths."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from blocks import NS, SMALL, found, ids, load_all, recount, save, wrong
from gates import Task

import kvstore
from kvstore import BadInput, ForkError, StoreBusy, StoreClosed
from kvstore.files import OsFiles
from kvstore.local import LocalStore

TOKENS = ids(1, 40)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore]:
    path = tmp_path / "cache" if request.param == "disk" else None
    with kvstore.open(path, host="8MiB", disk="64MiB") as opened:
        yield opened
        opened.flush()
        assert recount(opened) == []


def test_after_close_every_call_says_so(tmp_path: Path) -> None:
    tokens = ids(1, 20)
    for path in (None, tmp_path / "cache"):
        store = kvstore.open(path, host="1MiB", disk="8MiB")
        saved, match = save(store, tokens), found(store, tokens)
        load = store.load(match)
        store.close()
        store.close()
        calls: list[Callable[[], object]] = [
            partial(store.match, NS, SMALL, TOKENS),
            partial(store.load, match),
            partial(store.draft, SMALL),
            partial(store.save, NS, SMALL, TOKENS, {}),
            partial(store.forget, owner="x"),
            store.stats,
            store.verify,
            store.flush,
        ]
        for call in calls:
            with pytest.raises(StoreClosed, match=r"kvstore\.open"):
                call()
        assert saved.wait().tokens == (0 if path is None else 20)
        assert load.wait(0) and wrong(load, tokens) == []  # its memory is there as long as it is
        load.release()


def test_a_child_of_a_fork_is_told_to_open_its_own(store: LocalStore) -> None:
    save(store, ids(1, 40))
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            store.close()
            store.match(NS, SMALL, [1, 2])
        except ForkError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert b"kvstore.open in the child" in pipe.read()
    os.waitpid(child, 0)
    assert load_all(store, ids(1, 40)) == 39


def test_two_opens_of_one_directory_share_and_close_apart(tmp_path: Path) -> None:
    first = kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB")
    second = kvstore.open(tmp_path / "x" / ".." / "cache", host="4MiB", disk="16MiB")
    save(first, TOKENS)
    assert load_all(second, TOKENS) == 39
    first.close()
    first.close()  # does not take the other's away
    with pytest.raises(StoreClosed):
        first.stats()
    assert save(second, ids(2, 40)).wait().tokens == 40
    second.remember("name", "value")
    second.close()
    with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB") as third:
        assert third.recall("name") == "value"
        assert load_all(third, TOKENS) == load_all(third, ids(2, 40)) == 39


def test_opening_waits_for_whom_it_meets_closing(tmp_path: Path) -> None:
    for _ in range(10):
        store = kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB")
        save(store, TOKENS)
        closer = Task(store.close)
        with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB") as again:
            assert load_all(again, TOKENS) in (0, 39)
        closer.result()


HOLDER = """
import sys, kvstore
with kvstore.open(sys.argv[1], host="2MiB", disk="8MiB") as store:
    print("open", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreBusy, match=f"pid {holder.pid}"):
            kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB")
        with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB", on_busy="memory") as store:
            assert list(store.stats()["tiers"]) == ["host"]
            save(store, TOKENS)
            assert load_all(store, TOKENS) == 39
        holder.communicate("")
    with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB") as store:
        assert "disk" in store.stats()["tiers"]


def test_data_of_another_version_is_left_alone(tmp_path: Path) -> None:
    with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB") as store:
        save(store, TOKENS)
    for version in ("v0", "v2"):
        folder = tmp_path / "cache" / version
        folder.mkdir()
        (folder / "extent-000001.slab").write_bytes(b"from the future" * 1000)
    with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB") as store:
        assert load_all(store, TOKENS) == 39
        store.forget(older_than=0)
    for version in ("v0", "v2"):
        assert (tmp_path / "cache" / version / "extent-000001.slab").read_bytes() == b"from the future" * 1000


@pytest.mark.parametrize("size", ["", "lots", "-1GiB", "0", "1e3", "1 XiB", 0, -5, True, None, 1.5, "1KiB"])
@pytest.mark.parametrize("which", ["host", "disk"])
def test_sizes_that_make_no_sense(tmp_path: Path, which: str, size: object) -> None:
    with pytest.raises(BadInput, match=which):
        kvstore.open(tmp_path / "cache", **{which: size})  # type: ignore[call-overload]
    assert not (tmp_path / "cache" / "v1").exists()


@pytest.mark.parametrize(("which", "size"), [("host", "100TiB"), ("disk", "1000000TiB"), ("disk", "9" * 400)])
def test_sizes_beyond_the_machine(tmp_path: Path, which: str, size: str) -> None:
    with pytest.raises(BadInput, match="bytes"):
        kvstore.open(tmp_path / "cache", **{which: size})  # type: ignore[call-overload]


def test_sizes_as_people_write_them() -> None:
    from kvstore.sizes import size_bytes

    for text, size in (("1GiB", 1 << 30), ("1.5 MiB", 3 << 19), ("2MB", 2_000_000), ("4k", 4096), (7, 7), ("9", 9)):
        assert size_bytes(text) == size


@pytest.mark.parametrize("what", ["", "\0", "file", "full", "loop", "below a file"])
def test_a_directory_that_is_no_cache_is_refused_and_nothing_is_touched(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    odd: dict[str, str | Path] = {"": "", "\0": "a\0b", "below a file": tmp_path / "file" / "x"}
    place = odd[what] if what in odd else tmp_path / what
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(BadInput):
        kvstore.open(place, host="2MiB", disk="8MiB")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


def test_memos_that_are_damaged_cost_an_explanation_and_nothing_else(tmp_path: Path) -> None:
    with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB") as store:
        save(store, TOKENS)
        for text in ("[", "7", '["zz"]', '{"a": 1}'):
            store.remember("namespaces", text)
        store.remember("namespaces", '["zz", "00"]')
        store.remember("namespace/zz", '{"fingerprint": 3}')
    with kvstore.open(tmp_path / "cache", host="2MiB", disk="8MiB") as store:
        assert load_all(store, TOKENS) == 39


class NoMore(OsFiles):
    """A door through which nothing can be made."""

    def make_folder(self, path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def test_a_place_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give a directory"):
        kvstore.open(tmp_path / "cache", files=NoMore())
