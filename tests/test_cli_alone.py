"""The same commands on a directory that no daemon serves, and what they say when somebody else has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import found, ids, load_all, namespace, save
from commands import Command, command

import kvstore
from kvstore import BadInput
from kvstore.segments import ID_DIGITS

__all__ = ["command"]  # a fixture


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A directory with two conversations of alice's and one of bob's, of tenant acme."""
    with kvstore.open(tmp_path / "cache", disk="64MiB") as store:
        for seed, owner in ((1, "alice"), (2, "alice"), (3, "bob")):
            save(store, ids(seed, 40), namespace("acme" if owner == "bob" else ""), owner=owner).wait()
    return tmp_path / "cache"


def test_what_is_stored_is_shown_and_nothing_goes(command: Command, cache: Path) -> None:
    for _ in range(2):
        said = command("ls", cache, "--json")
        assert said.code == 0 and "no daemon serves" in said.err
        assert sorted(one["owner"] for one in json.loads(said.out)) == ["alice", "alice", "bob"]
    stats = json.loads(command("status", cache, "--json").out)
    assert stats["daemon"] is None and stats["stats"]["tiers"]["disk"]["blocks"] == 9
    assert "disk" in command("status", cache).out
    assert command("verify", cache).out == "9 blocks read, all as written\n"


def test_forget_without_a_daemon(command: Command, cache: Path) -> None:
    ids_of = {one["owner"]: one["id"] for one in json.loads(command("ls", cache, "--json").out)}
    assert command("forget", cache, "--id", ids_of["bob"], "--yes").out.startswith("3 blocks")
    assert command("forget", cache, "--tenant", "acme", "--yes").out.startswith("0 blocks")
    assert command("forget", cache, "--owner", "alice", "--yes").out.startswith("6 blocks")
    assert command("ls", cache).out == "nothing is stored\n"


@pytest.mark.parametrize("verb", ["ping", "top", "quota", "pin"])
def test_what_needs_a_daemon_says_how_to_start_one(command: Command, cache: Path, verb: str) -> None:
    words = ("pin", cache, "00", "--seconds", 1) if verb == "pin" else (verb, cache)
    said = command(*words)
    assert said.code == (1 if verb == "ping" else 2) and f"start one with: kvstore serve --dir {cache}" in said.err


def test_a_directory_that_another_process_has(command: Command, cache: Path) -> None:
    code = f"import kvstore; s = kvstore.open({str(cache)!r}); print('open', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == "open\n"
        for verb in ("ls", "status", "verify"):
            said = command(verb, cache)
            assert said.code == 2 and str(holder.pid) in said.err
        holder.communicate("\n", timeout=60)
    assert command("ls", cache).code == 0


@pytest.mark.parametrize("verb", ["ls", "status", "forget --owner x --yes"])
def test_what_is_no_cache_is_left_alone(command: Command, tmp_path: Path, verb: str) -> None:
    name, *rest = verb.split()
    (tmp_path / "mine").write_text("mine")
    said = command(name, tmp_path, *rest)
    assert said.code == 2 and "no daemon is at" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_segments_by_leading_digits(tmp_path: Path) -> None:
    """Only ids of segments count, not of the blocks inside; a match of one holds its own blocks and no others."""
    trunk = ids(1, 64)
    with kvstore.open(host="16MiB") as store:
        for seed in range(300):
            save(store, trunk + ids(10 + seed, 40))
        known = sorted(one.id for one in store.segments(1000))
        shared = next(one.id for one in store.segments(1000) if not one.start)
        assert len(known) == 301
        for id in known[::30]:
            shortest = next(
                id[:size] for size in range(1, ID_DIGITS + 1) if sum(k.startswith(id[:size]) for k in known) == 1
            )
            match = store.segment(shortest.upper())
            assert (match.tokens, match.skipped, len(match.blocks)) == ((64, 0, 4) if id == shared else (104, 64, 3))
            assert store.stats()["leases"] == len(match.blocks)
            match.release()
        first = known[0][0]
        count = sum(id.startswith(first) for id in known)
        with pytest.raises(BadInput, match=f"{count} segments begin with '{first}'; give more digits"):
            store.segment(first)
        for wrong in ("", "xyz", "0" * ID_DIGITS):
            with pytest.raises(BadInput, match="no segment begins"):
                store.segment(wrong)
        assert store.stats()["leases"] == 0
        store.pin(store.segment(shared), seconds=60.0)
        pinned = [one for one in store.segments(1000) if one.pinned]
        assert [one.id for one in pinned] == [shared]
        one = store.segment(next(id for id in known if id != shared))
        assert store.forget(match=one).blocks == 3
        assert len(store.segments(1000)) == 300 and load_all(store, [*trunk, 0]) == 64
        assert found(store, trunk).tokens == 64
