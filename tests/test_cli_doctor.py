"""``kvstore doctor``: each thing that can be wrong is found when it is planted, and not when it is not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from blocks import ids, save
from commands import Command, command
from daemons import daemon, start

import kvstore
from kvstore.cli import machine, place
from kvstore.cli.machine import Finding
from kvstore.files import Handle, OsFiles
from kvstore.tiers.host import memory_limit

__all__ = ["command"]  # a fixture
GIB = 1 << 30
NO_LIMIT = resource.RLIM_INFINITY


class Report(NamedTuple):
    """Exit code, and what was found by name."""

    code: int
    rows: dict[str, dict[str, str]]

    def state(self, name: str) -> str:
        return self.rows[name]["state"]


def examined(command: Command, *words: object) -> Report:
    said = command("doctor", *words, "--json")
    return Report(said.code, {row["name"]: row for row in json.loads(said.out)})


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A directory that was closed well."""
    with kvstore.open(tmp_path / "cache", disk="64MiB") as store:
        save(store, ids(1, 40)).wait()
    yield tmp_path / "cache"


def test_all_is_well(command: Command, tmp_path: Path) -> None:
    with daemon(tmp_path, "--dir", tmp_path / "cache", "--disk", "64MiB") as one:
        before = sorted(path for path in (tmp_path / "cache").rglob("*"))
        report = examined(command, tmp_path / "cache")
        assert report.code == 0
        for name in ("python", "shared memory", "memory", "directory", "disk space", "index", "socket", "daemon"):
            assert report.state(name) == "pass", report.rows[name]
        assert f"process {one.pid}" in report.rows["daemon"]["what"] and "64.0 MiB" in report.rows["memory"]["what"]
        assert "64.0 MiB is the budget" in report.rows["disk space"]["what"]
        assert report.rows["index"]["what"] == "in use by a process"
        assert sorted(path for path in (tmp_path / "cache").rglob("*")) == before
        text = command("doctor", one.url)
        assert text.code == 0 and " 0 fail" in text.out and "→" in text.out


def test_nothing_but_the_machine(command: Command) -> None:
    report = examined(command)
    assert report.code == 0 and not {"directory", "socket", "daemon", "redis"} & report.rows.keys()


def test_wrong_settings_and_what_they_ask_of_the_machine(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "kvstore.toml"
    file.write_text('hots = "1GiB"\n')
    report = examined(command, "--config", file)
    assert report.code == 1 and "host" in report.rows["settings"]["what"] and report.state("settings") == "fail"
    file.write_text(f'dir = "{tmp_path}/cache"\nhost = "900TiB"\ndisk = "900TiB"\n')
    report = examined(command, "--config", file)
    assert report.code == 1 and report.state("memory") == report.state("disk space") == "fail"
    assert "--host" in report.rows["memory"]["remedy"]


def test_a_redis_that_is_not_there_is_a_warning_that_tells_no_secret(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "kvstore.toml"
    file.touch(0o600)
    file.write_text('redis = "redis://user:hunter22@127.0.0.1:1/0"\n')
    said = command("doctor", "--config", file, "--json")
    rows = {row["name"]: row for row in json.loads(said.out)}
    assert said.code == 0 and rows["redis"]["state"] == "warn" and "127.0.0.1:1" in rows["redis"]["what"]
    assert "hunter22" not in said.out + said.err


def test_a_redis_that_is_there(command: Command, tmp_path: Path) -> None:
    servers = pytest.importorskip("servers")
    with servers.running() as server:
        (tmp_path / "kvstore.toml").write_text(f'redis = "{server.url}"\n')
        assert examined(command, "--config", tmp_path / "kvstore.toml").state("redis") == "pass"


def test_a_directory_that_others_can_read_or_that_is_somebody_elses(command: Command, closed: Path) -> None:
    assert examined(command, closed).state("directory") == "pass"
    closed.chmod(0o755)
    report = examined(command, closed)
    assert report.code == 0 and "chmod 700" in report.rows["directory"]["remedy"]
    mine = closed.parent / "mine"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    report = examined(command, mine)
    assert report.code == 1 and report.state("directory") == "fail"
    assert [path.name for path in mine.iterdir()] == ["letter"]
    report = examined(command, closed.parent / "not" / "yet")
    assert report.state("directory") == "pass" and not (closed.parent / "not").exists()


def test_the_index_of_a_directory(command: Command, closed: Path) -> None:
    assert examined(command, closed).rows["index"]["what"] == "it is bit for bit what was closed"
    assert examined(command, closed).state("index") == "pass", "looking took nothing away"
    digest, data = closed / "v1" / "index" / "digest", closed / "v1" / "index" / "data.mdb"
    text = digest.read_bytes()
    digest.unlink()
    report = examined(command, closed)
    assert report.state("index") == "warn" and "its pages are sound" in report.rows["index"]["what"]
    digest.write_bytes(text)
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    report = examined(command, closed)
    assert report.code == 0 and report.state("index") == "warn" and "made anew" in report.rows["index"]["remedy"]
    shutil.rmtree(digest.parent)
    assert examined(command, closed).state("index") == "pass"


def test_a_daemon_that_was_killed(command: Command, tmp_path: Path) -> None:
    one = start(tmp_path, "--dir", tmp_path / "cache", "--disk", "64MiB")
    assert one.kill() == -signal.SIGKILL
    report = examined(command, tmp_path / "cache")
    assert report.code == 0 and report.state("daemon") == "warn" and "none is running" in report.rows["daemon"]["what"]
    assert report.state("index") == "warn"


def test_a_daemon_that_does_not_answer(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.cli.place.PATIENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "kvstore.sock"))
        silent.listen()
        (tmp_path / "kvstore.sock").chmod(0o666)
        report = examined(command, f"unix:{tmp_path}/kvstore.sock")
    assert report.code == 1 and report.state("daemon") == "fail"
    assert report.state("socket") == "warn" and "everybody here may connect" in report.rows["socket"]["what"]
    assert "directory" not in report.rows


def test_what_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert place.socket(tmp_path / "file").state == "fail"
    assert place.socket(tmp_path / "none").state == "warn"
    assert place.socket(tmp_path / "file" / "below").state == "fail"


def test_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a filesystem has or not; nothing is left of the try."""
    opened = OsFiles.open

    def plain(self: OsFiles, path: str, *, create: bool = False, direct: bool = False) -> Handle:
        return opened(self, path, create=create)

    monkeypatch.setattr(OsFiles, "open", plain)
    assert place.direct(tmp_path).state == "warn"
    monkeypatch.undo()
    assert place.direct(tmp_path).state in ("pass", "warn")
    assert list(tmp_path.iterdir()) == []
    assert place.direct(tmp_path / "none").state == "fail"


def states(*found: Finding) -> list[str]:
    return [one.state for one in found]


def test_limits() -> None:
    limit = memory_limit()
    assert states(machine.memory(limit + 1), machine.memory(limit - 1), machine.memory(limit // 4)) == [
        "fail",
        "warn",
        "pass",
    ]
    files = [machine.open_files(*pair) for pair in ((1024, 1024), (1024, 1 << 20), (1024, NO_LIMIT))]
    assert states(*files) == ["warn", "pass", "pass"]
    locked = [machine.locked_memory(*pair) for pair in ((65536, True), (65536, False), (NO_LIMIT, True), (GIB, True))]
    assert states(*locked) == ["warn", "pass", "pass", "pass"]


def test_huge_pages_and_clock(tmp_path: Path) -> None:
    for text, state in (("always [advise] never", "pass"), ("always advise [never]", "warn"), ("[deny] x", "warn")):
        (tmp_path / "shmem").write_text(text)
        assert machine.huge_pages(tmp_path / "shmem").state == state
    assert machine.huge_pages(tmp_path / "none").state == "pass"
    now = time.time()
    clocks = [machine.clock(*pair) for pair in ((now, 0.0), (now, now + 30), (now, now + 3600), (1000.0, 0.0))]
    assert states(*clocks) == ["pass", "pass", "warn", "fail"]
    assert "1h behind" in clocks[2].what


def test_packages_that_are_old_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fail" not in states(*machine.packages())
    wanted = ["lmdb>=99.5", "redis[hiredis]>=99; extra == 'redis'", "nobody-has-this>=1", "torch>=99; extra == 'bench'"]
    monkeypatch.setattr(machine, "requires", lambda name: wanted)
    old, extra, missing, rest = machine.packages()
    assert states(old, extra, missing, rest) == ["fail", "warn", "fail", "pass"]
    assert "older than 99.5" in old.what and "kvstore-llm[redis]" in extra.remedy and "is not there" in missing.what
    assert machine.numbers("2.10.1rc1") > machine.numbers("2.9") and machine.numbers("3.0") >= machine.numbers("3.0")
