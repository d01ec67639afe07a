"""Deletion: what was forgotten is invisible at once, and afterwards nowhere in the directory, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from blocks import NS, ODD, SMALL, WIDE, found, ids, load_all, marks, namespace, recount, rows, save
from gates import GatedTier, Task, gated, only_on_disk

import kvstore
from kvstore import BadInput, Layout, Namespace
from kvstore.files import OsFiles
from kvstore.keys import token_bytes
from kvstore.local import LocalStore
from kvstore.residency import Residency


def images(folder: Path) -> dict[str, bytes]:
    """The files of a folder without their pages of zeros."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            pages = [data[start : start + 4096] for start in range(0, len(data), 4096)]
            found[path.name] = b"".join(page for page in pages if page.count(0) < len(page))
    return found


def traces(
    folder: Path, *chains: Sequence[int], space: Namespace = NS, layout: Layout = SMALL, run: int = 4
) -> list[str]:
    """Where token ids (any ``run`` in a row) or rows of KV of chains stand in the files of a folder."""
    present = []
    held = images(folder)
    for tokens in chains:
        step = max(len(chains) // 10, 1)
        wanted = {token_bytes(tokens[at : at + run]): f"tokens {at}" for at in range(0, len(tokens) - run + 1, step)}
        for at, mark in list(enumerate(marks(space, tokens)))[::step]:
            rarest = max(range(len(layout.layers)), key=lambda layer: layout.layers[layer].key_dim)
            wanted[rows(layout, rarest, 0, 0, [mark])] = f"KV of token {at}"
        present += [f"{what} in {name}" for what, name in _search(wanted, held)]
    return present


def _search(wanted: dict[bytes, str], held: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for pattern, what in wanted.items():
        for name, data in held.items():
            if pattern in data:
                yield what, name


@pytest.fixture(params=["linux", "portable"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LocalStore, Path]]:
    files = OsFiles(portable=request.param == "portable")
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB", files=files) as store:
        yield store, tmp_path / "cache"
        store.flush()
        assert recount(store) == []


@pytest.mark.parametrize("layout", [SMALL, WIDE], ids=["small", "wide"])
def test_what_is_forgotten_is_nowhere(opened: tuple[LocalStore, Path], layout: Layout) -> None:
    store, folder = opened
    mine, other = ids(1, 4 * layout.block_tokens + 5), ids(2, 4 * layout.block_tokens + 5)
    save(store, mine, layout=layout, owner="me").wait()
    save(store, other, layout=layout, owner="other").wait()
    assert traces(folder, mine, layout=layout)  # the search finds what is there
    receipt = store.forget(owner="me")
    payload = layout.token_payload * len(mine)
    assert (receipt.blocks, receipt.bytes, receipt.deferred) == (5, payload, 0)
    assert traces(folder, mine, layout=layout) == []
    assert found(store, mine, layout=layout).tokens == 0
    assert load_all(store, [*other, 0], layout=layout) == len(other)


def test_slots_of_evicted_blocks_hold_nothing_either(tmp_path: Path) -> None:
    with kvstore.open(tmp_path / "cache", host="2MiB", disk="6MiB") as store:
        mine = [ids(n, 64) for n in range(80)]
        for tokens in mine:
            save(store, tokens, owner="me").wait()
        for n in range(1000, 1030):
            save(store, ids(n, 64), owner="other").wait()
        assert store.stats()["counters"]["disk_evicted_blocks"] > 0
        store.forget(owner="me")
        assert traces(tmp_path / "cache", *mine) == []


def test_a_recycled_slot_holds_nothing_of_whom_it_held_before(tmp_path: Path) -> None:
    """Its header area, its padding and its rest: the old block's tokens are in its header."""
    with kvstore.open(tmp_path / "cache", host="1MiB", disk="32MiB") as store:
        space = namespace("a tenant with a long name" * 8)
        mine = [ids(n, 16) for n in range(100)]
        for tokens in mine:
            save(store, tokens, space, owner="me" * 100).wait()
        only_on_disk(store)
        for tokens in mine[:80]:
            load_all(store, [*tokens, 0], space)  # headers come back into host slots
        for n in range(1000, 1100):
            save(store, ids(n, 9 if n % 2 else 16), owner="o").wait()
        for n in range(2000, 2050):
            save(store, ids(n, 9), layout=ODD, owner="o").wait()
        store.forget(owner="me" * 100)
        assert traces(tmp_path / "cache", *mine, space=space) == []


def test_superseded_tails_and_blocks_in_memory_only(opened: tuple[LocalStore, Path]) -> None:
    store, folder = opened
    tokens = ids(1, 60)
    for length in range(1, 60, 3):
        saved = save(store, tokens[:length], owner="me")
        if length % 2:
            saved.wait()
    store.forget(owner="me")
    assert traces(folder, tokens, run=1) == []


@pytest.mark.parametrize("where", ["write", "commit"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_that_is_being_written(tmp_path: Path, where: str, fails: bool) -> None:
    with gated(tmp_path / "cache") as (store, tier):
        tokens = ids(1, 16)
        gate = tier.gate(where, after=True, error=fails)
        save(store, tokens, owner="me")
        gate.reached()
        assert store.forget(owner="me").deferred == 1
        gate.open()
        store.flush()
        store.forget(owner="nobody")  # comes behind the erasing of what was deferred
        assert traces(tmp_path / "cache", tokens) == []
        assert recount(store) == []


@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_superseded_tail_that_is_being_written(tmp_path: Path, where: str) -> None:
    with gated(tmp_path / "cache") as (store, tier):
        tokens = ids(1, 16)
        gate = tier.gate(where, after=True)
        saved = save(store, tokens[:9], owner="me")
        waiter = Task(saved.wait)
        gate.reached()
        save(store, [*tokens[:9], *ids(2, 3)], owner="other")
        assert store.forget(owner="me").deferred == 1
        gate.open()
        waiter.result()
        store.flush()
        store.forget(owner="nobody")
        assert found(store, tokens).tokens == 9
        assert sum(data.count(b"KVBLOCK1") for data in images(tmp_path / "cache").values()) == 1


def test_a_leased_block_goes_with_its_last_lease(tmp_path: Path) -> None:
    with gated(tmp_path / "cache") as (store, tier):
        tokens = ids(1, 40)
        save(store, tokens, owner="me").wait()
        match = found(store, tokens)
        load = store.load(found(store, tokens[:16]))
        receipt = store.forget(owner="me")
        assert (receipt.blocks, receipt.deferred) == (3, 3)
        assert found(store, tokens).tokens == 0
        assert load.wait(0)
        gate = tier.gate("erase", after=True)
        load.release()
        match.release()
        store.stats()  # ends leases that were let go
        gate.reached()
        assert traces(tmp_path / "cache", tokens) == []
        gate.open()


def test_a_crash_does_not_bring_back_what_waits_for_its_last_lease(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from blocks import found, ids, save
import kvstore
store = kvstore.open({str(folder)!r}, host="4MiB", disk="32MiB")
save(store, ids(1, 40), owner="me").wait()
match = found(store, ids(1, 40))
assert store.forget(owner="me").deferred == 3
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with kvstore.open(folder, host="4MiB", disk="32MiB") as store:
        assert found(store, ids(1, 40)).tokens == 0


def test_when_the_disk_refuses_the_receipt_says_so_and_close_tries_again(tmp_path: Path) -> None:
    tokens = ids(1, 40)
    with gated(tmp_path / "cache") as (store, tier):
        save(store, tokens, owner="me").wait()
        tier.fail("erase", 1000)
        assert store.forget(owner="me").deferred == 3
        assert found(store, tokens).tokens == 0
        assert store.stats()["counters"]["failed_erases"] > 0
        assert traces(tmp_path / "cache", tokens)
        tier.heal()
    assert traces(tmp_path / "cache", tokens) == []


def test_tenants_owners_and_ages_are_conditions_that_all_hold(opened: tuple[LocalStore, Path]) -> None:
    store, _ = opened
    now = [1000.0]
    store._residency.wall = lambda: now[0]
    chains = {}
    for n, (tenant, owner, when) in enumerate((t, o, w) for t in "ab" for o in "xy" for w in (1000.0, 1100.0)):
        now[0] = when
        chains[tenant, owner, when] = ids(n, 20)
        save(store, ids(n, 20), namespace(tenant), owner=owner)
    now[0] = 1200.0
    with pytest.raises(BadInput, match="everything"):
        store.forget()
    assert store.forget(tenant="a", owner="x", older_than=150).blocks == 2
    assert store.forget(tenant="b", older_than=150).blocks == 4
    assert store.forget(owner="x", older_than=300).blocks == 0
    left = [key for key, tokens in chains.items() if found(store, tokens, namespace(key[0])).tokens]
    assert left == [("a", "x", 1100.0), ("a", "y", 1000.0), ("a", "y", 1100.0), ("b", "x", 1100.0), ("b", "y", 1100.0)]
    assert store.forget(tenant="a").blocks == 6 and store.forget(older_than=0).blocks == 4
    assert store.stats()["tiers"]["disk"]["blocks"] == 0


def test_the_middle_of_a_chain_cuts_it_there_until_it_is_saved_anew(opened: tuple[LocalStore, Path]) -> None:
    store, _ = opened
    tokens = ids(1, 80)
    for length, owner in ((32, "a"), (48, "b"), (80, "c")):
        save(store, tokens[:length], owner=owner).wait()
    assert store.forget(owner="b").blocks == 1
    assert load_all(store, [*tokens, 0]) == 32
    assert save(store, tokens[:48], owner="d").new_tokens == 16
    assert load_all(store, [*tokens, 0]) == 80


class NoErase(GatedTier):
    """A planted fault: a tier that says it has erased."""

    def __getattr__(self, name: str) -> object:
        return (lambda addresses: None) if name == "erase" else super().__getattr__(name)


def test_a_tier_that_does_not_erase_is_found(tmp_path: Path) -> None:
    with gated(tmp_path / "cache") as (store, tier):
        tokens = ids(1, 40)
        save(store, tokens, owner="me").wait()
        store._residency.disk = NoErase(tier)
        store.forget(owner="me")
        assert traces(tmp_path / "cache", tokens)


def test_padding_that_is_not_blanked_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.writer._blank", lambda *arguments: None)
    with pytest.raises(AssertionError, match="tokens"):
        test_a_recycled_slot_holds_nothing_of_whom_it_held_before(tmp_path)


def test_a_doomed_block_that_stays_in_the_index_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residency, "doom", lambda self, number, erase: False)
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB") as store:
        save(store, ids(1, 40), owner="me")
        store.forget(owner="me")
        assert found(store, ids(1, 40)).tokens == 40
