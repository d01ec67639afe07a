"""What a restart finds: blocks in any order of writing, and the order in which they will be evicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks import found, ids, load_all, recount, save

import kvstore

TOKENS = ids(1, 64)


def test_a_parent_that_is_saved_anew_after_its_child_is_found_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):  # the second time round from the first one's files
        with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
            save(store, TOKENS[:16], owner="a")
            save(store, TOKENS, owner="b")
            store.forget(owner="a")
            assert found(store, TOKENS).tokens == 0
            assert save(store, TOKENS[:16], owner="a").tokens == 16
            assert load_all(store, [*TOKENS, 0]) == 64
        with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
            assert load_all(store, [*TOKENS, 0]) == 64
            assert recount(store) == []


def test_blocks_that_nothing_can_reach_give_their_room_back_at_open(tmp_path: Path) -> None:
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
        save(store, TOKENS[:16], owner="a")
        save(store, TOKENS, owner="b")
        store.forget(owner="a")
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
        assert store.stats()["tiers"]["disk"]["blocks"] == 0
        disk: Any = store._residency.disk
        disk.commit(())  # ends the rest of what was freed
        assert [extent.live for extent in disk._slots.slab.extents.values() if extent.live] == []
        save(store, TOKENS)
        assert load_all(store, [*TOKENS, 0]) == 64


def test_after_a_restart_children_are_still_evicted_before_parents(tmp_path: Path) -> None:
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
        ticks = iter(range(1000, 2000))
        store._residency.wall = lambda: float(next(ticks))
        for length in range(16, 65, 16):
            save(store, TOKENS[:length]).wait()
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
        index = store._residency.index
        order = list(store._residency.disk_policy.victims())
        assert [index.parent[n] for n in order[:-1]] == order[1:]
