"""The commands of a daemon's operators: what they show is what is there, and what they do is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import NS, SMALL, found, ids, load_all, namespace, save
from commands import Command, Said, command
from daemons import Daemon, daemon, until

import kvstore
from kvstore.cli.top import rates
from kvstore.daemon.client import Client

__all__ = ["command"]  # a fixture
TRUNK = ids(1, 4 * SMALL.block_tokens)
CHAINS = [TRUNK + ids(10 + place, 3 * SMALL.block_tokens) for place in range(4)]
HOSTILE = "\x1b[31m[bold]o"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a directory, that the tests of this module share."""
    folder = tmp_path_factory.mktemp("serving")
    with daemon(folder, "--dir", folder / "cache", "--disk", "256MiB") as one:
        yield one


@pytest.fixture
def client(serving: Daemon) -> Iterator[Client]:
    """One with a few conversations that begin with the same tokens; nothing is left afterwards."""
    with serving.connect() as one:
        for place, chain in enumerate(CHAINS):
            save(one, chain, owner=f"owner-{place % 2}").wait()
        load_all(one, [*CHAINS[0], 0])
        yield one
        one.forget(older_than=-60.0)
        assert one.stats()["tiers"]["host"]["blocks"] == one.stats()["tiers"]["disk"]["blocks"] == 0


def told(said: Said) -> Any:
    """What a command printed for machines."""
    assert said.code == 0, said.err
    return json.loads(said.out)


def test_ping(command: Command, serving: Daemon, tmp_path: Path) -> None:
    said = command("ping", serving.url)
    assert said.code == 0 and said.out.startswith("10 answers, p50 ")
    numbers = told(command("ping", serving.socket.parent, "--count", 3, "--json"))
    assert numbers["count"] == 3 and 0 < numbers["p50_seconds"] <= numbers["p99_seconds"] < 10
    nobody = command("ping", tmp_path)
    assert nobody.code == 1 and f"kvstore serve --dir {tmp_path}" in nobody.err and nobody.out == ""
    assert command("ping", serving.url, "--count", 0).code == 2


@pytest.mark.parametrize(
    "verb", ["status", "top", "ls", "quota", "verify", "ping", "forget --owner x", "pin x --seconds 1"]
)
def test_without_a_target_it_says_how_to_name_one(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    for name in ("KVSTORE_SOCKET", "KVSTORE_DIR"):
        monkeypatch.delenv(name, raising=False)
    said = command(*verb.split())
    assert said.code == 2 and "KVSTORE_SOCKET" in said.err and len(said.err.splitlines()) == 1
    monkeypatch.setenv("KVSTORE_SOCKET", str(tmp_path / "none.sock"))
    said = command(*verb.split())
    assert said.code in (1, 2) and str(tmp_path / "none.sock") in said.err and len(said.err.splitlines()) == 1


def test_status_shows_what_stats_say_and_who_is_there(command: Command, serving: Daemon, client: Client) -> None:
    match = found(client, CHAINS[1])
    said = told(command("status", serving.url, "--json"))
    assert said["stats"]["tiers"] == client.stats()["tiers"]
    assert said["stats"]["counters"]["host_hit_tokens"] == client.stats()["counters"]["host_hit_tokens"] > 0
    about = said["daemon"]
    assert (about["version"], about["pid"], about["operator"]) == (kvstore.__version__, serving.pid, True)
    assert about["settings"]["disk"] == '"256MiB"' and about["uptime"] > 0
    sessions = {one["own"]: one for one in about["sessions"]}
    assert sessions[False]["pid"] == os.getpid() and sessions[False]["leases"] == 1
    shown = command("status", serving.url).out
    blocks = client.stats()["tiers"]["host"]["blocks"]
    for part in ("kvstore 0.1.0", f"process {serving.pid}", f"{blocks}", "48.0 MiB", "this one", "1 matches"):
        assert part in shown
    match.release()


def test_ls_lists_segments_in_any_order(command: Command, serving: Daemon, client: Client) -> None:
    save(client, ids(50, 40), namespace("acme"), owner=HOSTILE).wait()
    there = told(command("ls", serving.url, "--json"))
    assert [one["id"] for one in there] == [one.id for one in client.segments()]
    assert len(there) == 6 and there[0]["start"] == 0 and there[0]["tokens"] == len(TRUNK)
    assert [one["tenant"] for one in told(command("ls", serving.url, "--tenant", "acme", "--json"))] == ["acme"]
    ages = [one["created"] for one in told(command("ls", serving.url, "--sort", "created", "--json"))]
    assert ages == sorted(ages, reverse=True) and len(ages) == 6
    assert len(told(command("ls", serving.url, "--sort", "tokens", "--limit", 2, "--json"))) == 2
    shown = command("ls", serving.url).out
    assert all(one["id"] in shown for one in there) and "host 4 disk 4" in shown
    assert "\x1b" not in shown and "\\x1b[31m[bold]o" in shown, "what others choose is shown, not obeyed"


def test_pin_by_the_id_that_ls_shows(
    command: Command, serving: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = next(one for one in client.segments() if one.start)
    said = told(command("pin", serving.url, segment.id[:10], "--seconds", 60, "--json"))
    assert (said["tokens"], said["tier"], said["why"]) == (len(CHAINS[0]), "host", "")
    pinned = {one.id for one in client.segments() if one.pinned}
    assert segment.id in pinned and len(pinned) == 2, "and what stands before it"
    assert client.stats()["kept"]["pinned_bytes"]["host"] == 7 * SMALL.full_slot_bytes
    monkeypatch.setenv("KVSTORE_DIR", str(serving.socket.parent))
    assert "stay in disk" in command("pin", segment.id, "--seconds", 60, "--tier", "disk").out
    assert client.stats()["kept"]["pinned_bytes"]["disk"] == 7 * SMALL.full_slot_bytes
    for words, sentence in (
        (("zz",), "no segment begins with 'zz'"),
        (("",), "no segment begins"),
        (("a", "b", "c"), "one id at a time"),
    ):
        refused = command("pin", *words, "--seconds", 1)
        assert refused.code == 2 and sentence in refused.err


def test_forget_says_what_it_erased(command: Command, serving: Daemon, client: Client) -> None:
    before = client.stats()["tiers"]["disk"]["blocks"]
    refused = command("forget", serving.url)
    assert refused.code == 2 and "would erase everything" in refused.err
    refused = command("forget", serving.url, "--owner", "owner-1")
    assert refused.code == 2 and "--yes" in refused.err
    refused = command("forget", serving.url, "--older-than", "yesterday", "--yes")
    assert refused.code == 2 and "--older-than='yesterday'" in refused.err
    assert command("forget", serving.url, "--older-than", "1h", "--yes").out.startswith("0 blocks")
    assert client.stats()["tiers"]["disk"]["blocks"] == before
    receipt = told(command("forget", serving.url, "--owner", "owner-1", "--yes", "--json"))
    assert receipt["blocks"] == before - client.stats()["tiers"]["disk"]["blocks"] == 6
    assert load_all(client, [*CHAINS[1], 0]) == len(TRUNK)
    assert load_all(client, [*CHAINS[0], 0]) == len(CHAINS[0])


def test_forget_a_segment_and_what_stands_behind_it(command: Command, serving: Daemon, client: Client) -> None:
    segment = next(one for one in client.segments() if one.start)
    said = command("forget", serving.url, "--id", segment.id, "--yes")
    assert said.code == 0 and said.out.startswith("3 blocks")
    assert sorted(load_all(client, [*chain, 0]) for chain in CHAINS) == [len(TRUNK)] + [len(CHAINS[0])] * 3
    trunk = next(one for one in client.segments() if not one.start)
    assert command("forget", serving.url, "--id", trunk.id, "--owner", "nobody", "--yes").out.startswith("0 blocks")
    assert command("forget", serving.url, "--id", trunk.id, "--yes").out.startswith("13 blocks")
    assert client.segments() == []


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 13), (b"y\n", 0)], ids=["no", "yes"])
def test_forget_asks_at_a_terminal(serving: Daemon, client: Client, answer: bytes, left: int) -> None:
    own, theirs = os.openpty()
    words = (sys.executable, "-m", "kvstore.cli", "forget", serving.url, "--older-than", "0.001s")
    before = client.stats()["tiers"]["disk"]["blocks"]
    with subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        asked = b""
        while b"[y/N]" not in asked:
            asked += os.read(own, 4096)
        os.write(own, answer)
        out, _ = process.communicate(timeout=60)
    os.close(own)
    assert b"older than" in asked and (process.returncode == 0) == (not left)
    assert (b"16 blocks" in out) == (not left) and before == 16
    assert client.stats()["tiers"]["disk"]["blocks"] == (16 if left else 0)


def test_top_once(command: Command, serving: Daemon, client: Client) -> None:
    said = command("top", serving.url, "--once", "--interval", "100ms")
    assert said.code == 0 and f"process {serving.pid}" in said.out and client.segments(1)[0].id in said.out
    look = told(command("top", serving.url, "--once", "--interval", "100ms", "--json"))
    assert look["tiers"] == client.stats()["tiers"] and len(look["segments"]) == 5
    assert look["rates"]["saved_tokens"] == 0 and [one["own"] for one in look["sessions"]] == [False, True]
    refused = command("top", serving.url, "--once", "--interval", "1ms")
    assert refused.code == 2 and "too short" in refused.err


def test_rates_are_what_counters_gained() -> None:
    before = {"counters": {"saved_bytes": 100, "disk_read_bytes": 50}}
    now = {"counters": {"saved_bytes": 500, "disk_read_bytes": 50, "asked_tokens": 8}}
    assert rates(before, now, 4.0) == {"saved_bytes": 100.0, "disk_read_bytes": 0.0, "asked_tokens": 2.0}
    assert rates(None, now, 4.0) == {}


def test_top_shows_traffic_outlives_a_restart_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    flags = ("--dir", tmp_path / "cache", "--disk", "64MiB")
    words = (sys.executable, "-m", "kvstore.cli", "top", str(tmp_path / "cache"), "--interval", "100ms")
    seen, stop = bytearray(), threading.Event()
    with daemon(tmp_path, *flags) as one:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        reader = threading.Thread(target=collect, args=(process, seen))
        reader.start()

        def traffic() -> None:
            with one.connect() as client:
                save(client, TRUNK).wait()
                while not stop.is_set():
                    load_all(client, [*TRUNK, 0])

        busy = threading.Thread(target=traffic)
        busy.start()
        until(lambda: b"host             0" not in bytes(seen)[-4000:] and b"used most" in seen, "no rates are shown")
        stop.set()
        busy.join()
        one.kill()
    until(lambda: b"looking again" in seen, "it does not say that the daemon is gone")
    with daemon(tmp_path, *flags) as other:
        until(lambda: f"process {other.pid}".encode() in seen, "it does not find the new daemon")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    reader.join()
    assert b"Traceback" not in seen and b"the daemon is gone\n" not in seen


def collect(process: subprocess.Popen[bytes], seen: bytearray) -> None:
    """Takes in what a process says, to its end."""
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            seen.extend(line)


def test_verify_through_a_daemon(command: Command, serving: Daemon, client: Client) -> None:
    assert command("verify", serving.url).out == "16 blocks read, all as written\n"
    assert told(command("verify", serving.url, "--json")) == {"blocks": 16, "problems": []}
    extent = min((serving.socket.parent / "v1").glob("extent-*"))
    where = extent.read_bytes().index(bytes(client_payload(client, CHAINS[0])[:64]))
    with extent.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 8)
    said = command("verify", serving.socket.parent)
    assert (
        said.code == 1
        and "16 blocks read, 1 with problems" in said.out
        and "layers are not what was written" in said.out
    )


def client_payload(client: Client, tokens: list[int]) -> memoryview:
    """The bytes of a chain's first block, as they lie in its slot."""
    load = client.load(client.match(NS, SMALL, [*tokens, 0]))
    load.wait(0)
    keys = bytes(next(iter(load.pieces(0))).keys)
    load.release()
    return memoryview(keys)
