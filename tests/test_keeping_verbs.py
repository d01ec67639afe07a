"""What is retained, demoted and forgotten of what a match found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from blocks import NS, SMALL, found, ids, load_all, recount, save
from gates import MIB, PATIENCE, gated
from kept import BLOCK, CHAIN, OTHER, clock, flood, kept
from queues import SLOTS, counter, flags
from test_forget import traces
from test_keeping import on_disk, small, store

import kvstore
from kvstore import BadInput
from kvstore.erasure import Eraser
from kvstore.keeping import Keeping
from kvstore.local import LocalStore

__all__ = ["on_disk", "small", "store"]  # fixtures


def test_what_is_retained_stays_on_disk_and_may_leave_memory(small: LocalStore) -> None:
    now = clock(small)
    for tokens in (CHAIN, OTHER):
        save(small, tokens)
    retained = small.retain(found(small, CHAIN), 60)
    assert (retained.asked, retained.tokens, retained.until, retained.why) == (64, 64, 1060.0, "")
    assert str(retained) == "64 of 64 tokens are retained until 1060"
    flood(small, 200)
    assert flags(small, [CHAIN]) == [False] * 4
    assert load_all(small, [*CHAIN, 0]) == 64
    assert found(small, OTHER).tokens == 0
    now[0] = 1060.0  # that it was used adds nothing
    assert kept(small)["retained"] == 0 and counter(small, "expired_pins") == 0
    flood(small, 200, first=2000)
    assert found(small, CHAIN).tokens == 0


def test_without_a_disk_what_is_retained_stays_in_memory() -> None:
    with kvstore.open(host=MIB) as store:
        save(store, CHAIN)
        long = ids(3, 40 * 16)
        save(store, long)
        assert store.retain(found(store, CHAIN), 60).tokens == 64
        retained = store.retain(found(store, long), 60)
        assert retained.tokens == (SLOTS // 4 - 4) * 16
        assert str(retained).endswith("but no more: what is retained may take 262144 bytes of host memory")
        flood(store)
        assert flags(store, [CHAIN]) == [True] * 4


def test_what_the_disk_has_evicted_is_written_anew_when_it_is_retained(quick: Path) -> None:
    with gated(quick / "cache", host=4 * MIB, disk=6 * MIB) as (store, _):
        save(store, CHAIN).wait()
        pinned = store.pin(found(store, CHAIN), seconds=60)
        flood(store, 150)
        index = store._residency.index
        numbers = [number for number, _ in found(store, CHAIN).blocks]
        assert [index.disk[number] for number in numbers] == [-1] * 4
        store.retain(found(store, CHAIN), 60)
        pinned.release()
        flood(store, 150, first=2000)
        assert load_all(store, [*CHAIN, 0]) == 64
        assert list(store.verify()) == [] and recount(store) == []
    with kvstore.open(quick / "cache", host=4 * MIB, disk="6MiB") as store:
        assert load_all(store, [*CHAIN, 0]) == 64


def test_what_is_demoted_frees_memory_now(on_disk: LocalStore) -> None:
    save(on_disk, CHAIN).wait()
    on_disk.pin(found(on_disk, CHAIN), seconds=60)
    demoted = on_disk.demote(found(on_disk, CHAIN))
    assert (demoted.asked, demoted.bytes, demoted.later) == (64, 4 * BLOCK, 0)
    assert str(demoted) == f"{4 * BLOCK} bytes of 64 tokens are free now, and 0 blocks follow"
    assert kept(on_disk)["host"] == 0
    assert on_disk.stats()["tiers"]["host"]["blocks"] == 0
    assert load_all(on_disk, [*CHAIN, 0]) == 64


def test_what_is_not_written_yet_follows_when_it_is(on_disk: LocalStore) -> None:
    gate = cast(Any, on_disk._residency.disk).gate("write", 3)
    save(on_disk, CHAIN[:40])
    reader = found(on_disk, CHAIN[:16])
    demoted = on_disk.demote(found(on_disk, CHAIN[:40]))
    assert (demoted.bytes, demoted.later) == (0, 3)
    assert on_disk._writer.queued == 3  # the partial block, too
    gate.open()
    assert on_disk.flush(PATIENCE)
    assert flags(on_disk, [CHAIN]) == [True, False, False]  # somebody reads the first
    reader.release()
    flood(on_disk, 21)
    assert flags(on_disk, [CHAIN])[:1] == [False]


def test_without_a_disk_what_is_demoted_goes_first_and_what_others_share_stays() -> None:
    with kvstore.open(host=MIB) as store:
        shared = ids(5, 32)
        save(store, [*shared, *ids(6, 64)])
        demoted = [*shared, *ids(7, 64)]
        save(store, demoted)
        for seed in range(100, 118):
            save(store, ids(seed, 64))
        store.retain(found(store, demoted), 60)
        answer = store.demote(found(store, demoted))
        assert (answer.bytes, answer.later) == (0, 4) and kept(store)["retained"] == 0
        save(store, ids(200, 80))  # two blocks go for it, and two more that memory is kept free of
        assert found(store, demoted).tokens == 32
        assert found(store, [*shared, *ids(6, 64)]).tokens == 96


def test_what_a_match_found_is_erased_with_what_stands_behind_it(store: LocalStore, quick: Path) -> None:
    stem, branches = CHAIN[:32], [[*CHAIN[:32], *ids(seed, 40)] for seed in (11, 12)]
    for tokens in [*branches, OTHER]:
        save(store, tokens, owner="me").wait()
    store.pin(found(store, branches[0]), seconds=60)
    part = store.match(NS, SMALL, [*branches[0], 0], first=32)
    receipt = store.forget(match=part)
    assert (receipt.blocks, receipt.bytes, receipt.deferred) == (3, 40 * SMALL.token_payload, 0)
    assert kept(store)["host"] == 2
    assert found(store, branches[0]).tokens == 32 and found(store, branches[1]).tokens == 72
    assert store.forget(match=found(store, branches[1]), owner="you").blocks == 0
    assert store.forget(match=found(store, stem[:20])).blocks == 5
    assert found(store, branches[1]).tokens == 0 and found(store, OTHER).tokens == 64
    if store._residency.disk is not None:
        assert traces(quick / "cache", OTHER) and traces(quick / "cache", *(each[32:] for each in branches)) == []


def test_what_a_load_reads_is_erased_when_it_ends(store: LocalStore) -> None:
    save(store, CHAIN).wait()
    match = found(store, CHAIN)
    load = store.load(match)
    assert store.forget(match=match).deferred == 4
    assert found(store, CHAIN).tokens == 0 and load.wait(0)
    load.release()


def test_what_cannot_be_is_said(store: LocalStore) -> None:
    save(store, CHAIN).wait()
    match = found(store, CHAIN)
    wrong: list[Any] = [0, -1, float("inf"), float("nan"), "60", None]
    for seconds in wrong:
        with pytest.raises(BadInput, match="seconds"):
            store.pin(match, seconds=seconds)
        with pytest.raises(BadInput, match="seconds"):
            store.retain(match, seconds)
    with pytest.raises(BadInput, match="device, host, disk"):
        store.pin(match, cast(Any, "gpu"), seconds=60)
    assert store.pin(match, "device", seconds=60).why == "this store has no device memory"
    if store._residency.disk is None:
        pinned = store.pin(match, "disk", seconds=60)
        assert (pinned.tokens, pinned.why) == (0, "this store has no disk")
    assert set(kept(store).values()) == {0}
    match.release()
    for verb in (store.demote, lambda it: store.retain(it, 60), lambda it: store.pin(it, seconds=60)):
        with pytest.raises(BadInput, match="match again"):
            verb(match)
    with pytest.raises(BadInput, match="match again"):
        store.forget(match=match)
    nothing = found(store, OTHER)
    assert str(store.pin(nothing, seconds=60)).startswith("0 of 0 tokens") and store.demote(nothing).bytes == 0


def _blocks_only(eraser: Eraser, match: Any) -> list[int]:
    numbers = [number for number, _ in match.blocks]
    match.release()
    return numbers


def test_children_that_are_left_behind_are_found(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Eraser, "_of", _blocks_only)
    with gated(quick / "cache", host=MIB) as (store, _), pytest.raises(AssertionError):
        test_what_a_match_found_is_erased_with_what_stands_behind_it(store, quick)


def test_demoted_blocks_that_stay_pinned_are_found(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeping, "let_go", lambda *arguments: None)
    with gated(quick / "cache", host=MIB) as (store, _), pytest.raises(AssertionError):
        test_what_is_demoted_frees_memory_now(store)
