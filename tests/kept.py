"""Stores of 85 blocks whose pins and retentions are counted, floods that evict what nothing keeps, a clock to turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocks import SMALL, ids, recount, save
from gates import MIB, PATIENCE, gated
from queues import SLOTS, nobody_waits

import kvstore
from kvstore.local import LocalStore

CHAIN, OTHER = ids(1, 64), ids(2, 64)  # of four blocks each
BLOCK = SMALL.full_slot_bytes
HALF = SLOTS // 2  # blocks that pins may take of a MiB


def kept(store: LocalStore) -> dict[str, int]:
    """Blocks that are kept, by tier and in all."""
    said = store.stats()["kept"]
    return {name: size // BLOCK for name, size in {**said["pinned_bytes"], "retained": said["retained_bytes"]}.items()}


def kept_faults(store: LocalStore) -> list[str]:
    """Where the accounts of what is kept differ from the keeps themselves."""
    faults, keeping = [], store._residency.keeping
    keeps = {keep for keeps in keeping._of.values() for keep in keeps}
    for account in [*keeping.pins.values(), keeping.retained]:
        blocks = {number for keep in keeps if account in keep.accounts for number in keep.until}
        if set(account.sizes) != blocks or account.bytes != sum(account.sizes.values()):
            faults.append(f"{account.tier}: {account.sizes} but {blocks}")
        if account.bytes > account.limit:
            faults.append(f"{account.tier} is over its bound")
    if any(list(keep.until.values()) != sorted(keep.until.values(), reverse=True) for keep in keeps):
        faults.append("a block is kept longer than what stands before it")
    return faults


def flood(store: LocalStore, chains: int = 60, first: int = 1000) -> None:
    """Saves more than memory holds; what can go has gone."""
    for seed in range(first, first + chains):
        save(store, ids(seed, 64)).wait(PATIENCE)


def clock(store: LocalStore, start: float = 1000.0) -> list[float]:
    """The store's wall clock from now on."""
    now = [start]
    store._residency.wall = lambda: now[0]
    return now


@contextmanager
def counted(path: Path | None, disk: int = 64 * MIB) -> Iterator[LocalStore]:
    """A store as users open it; its accounts must be right at the end."""
    with kvstore.open(None if path is None else path / "cache", host=MIB, disk=disk) as store:
        yield store
        check(store)


@contextmanager
def counted_behind_gates(path: Path, host: int = MIB, disk: int = 64 * MIB) -> Iterator[LocalStore]:
    """One with a disk, and gates before it; the oldest goes first."""
    with gated(path / "cache", host, disk) as (store, _):
        yield store
        check(store)


def check(store: LocalStore) -> None:
    """Nothing is held, and every account is right."""
    nobody_waits(store)
    assert recount(store) == [] and kept_faults(store) == []
