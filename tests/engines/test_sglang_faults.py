"""Pages that are damaged, removed or too many; disks that are full; restarts: a miss, and never other bytes."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

import sglang_pools as pools
from daemons import daemon
from faulty_files import FaultyFiles
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageFailureInjector
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang_both import OURS, config, names, ours, theirs

import kvstore
from kvstore import BadInput
from kvstore.keys import APART

COUNT = 8


def filled(seed: int = 1, layout: str = "page_first") -> Any:
    pool = pools.mha(layout)
    pools.fill(pool, seed)
    return pool


def page(pool: Any, number: int) -> bytes:
    data: bytes = pool.get_data_page(number * pools.PAGE).view(torch.uint8).numpy().tobytes()
    return data


def slots(count: int = COUNT, first: int = 0) -> Any:
    return pools.slots(pools.mha("page_first"), list(range(first, first + count)))


def damage(folder: Path, data: bytes) -> int:
    """Turns a bit in the middle of these bytes, wherever they lie in the folder's files; how often they lay there."""
    found = 0
    for path in [each for each in folder.rglob("*") if each.is_file()]:
        whole = path.read_bytes()
        at = whole.find(data)
        if at >= 0:
            found += 1
            with path.open("r+b") as file:
                file.seek(at + len(data) // 2)
                file.write(bytes([whole[at + len(data) // 2] ^ 4]))
    return found


def test_a_damaged_page_is_missed_where_the_reference_gives_it_back(quick: Path) -> None:
    pool, keys = filled(), names(COUNT)
    mine, their = ours(quick / "ours", pool), theirs(quick / "theirs", pool)
    wanted = [page(pool, number) for number in range(COUNT)]
    assert mine.batch_set_v1(keys, slots()) == [True] * COUNT
    assert their.batch_set(keys, [pool.get_data_page(number * pools.PAGE) for number in range(COUNT)])
    mine.close()
    assert damage(quick / "ours", wanted[3]) == damage(quick / "theirs", wanted[3]) == 1
    mine = ours(quick / "ours", pool)
    assert [each.batch_exists(keys) for each in (mine, their)] == [COUNT, COUNT]  # nobody has read it yet
    pools.fill(pool, 2)
    good = [True] * 3 + [False] + [True] * 4
    assert mine.batch_get_v1(keys, slots()) == good
    assert [page(pool, number) == wanted[number] for number in range(COUNT)] == good
    assert (mine.batch_exists(keys), mine.batch_exists(keys[4:])) == (3, 4)
    got = their.get(keys[3], pool.get_dummy_flat_data_page())
    assert got is not None and got.view(torch.uint8).numpy().tobytes() != wanted[3]
    pools.fill(pool, 1)
    assert mine.batch_set_v1(keys, slots()) == [True] * COUNT == mine.batch_get_v1(keys, slots(COUNT, 8))
    assert [page(pool, 8 + number) for number in range(COUNT)] == wanted
    mine.close()


def test_a_page_that_is_gone_ends_the_prefix_and_nothing_else(quick: Path) -> None:
    pool, keys = filled(), names(COUNT)
    mine, their = ours(quick / "ours", pool), theirs(quick / "theirs", pool)
    values = [pool.get_data_page(number * pools.PAGE) for number in range(COUNT)]
    assert mine.batch_set(keys, values) and their.batch_set(keys, values)
    (gone,) = [each for each in (quick / "theirs").iterdir() if each.name.startswith(keys[2])]
    gone.unlink()
    with kvstore.open(quick / "ours") as store:  # the same one, which this process has open
        space, layout = mine._pools["kv"][1].namespace, mine._pools["kv"][1].layout
        store.forget(match=store.match(space, layout, bytes.fromhex(keys[2]), root=APART, whole=True))
    for each in (mine, their):
        assert (each.batch_exists(keys), each.batch_exists(keys[3:]), each.exists(keys[2])) == (2, COUNT - 3, False)
        targets = [pool.get_dummy_flat_data_page() for _ in keys]
        assert [found is not None for found in each.batch_get(keys, targets)] == [True, True, False] + [True] * 5
    mine.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_nothing_more_leaves_what_memory_has(code: int, quick: Path) -> None:
    pool, keys = filled(), names(2 * COUNT)
    files = FaultyFiles()
    with kvstore.open(quick / "cache", host="8MiB", disk="64MiB", files=files) as store:
        made = ours(quick / "cache", pool)
        assert made.batch_set_v1(keys[:COUNT], slots()) == [True] * COUNT and store.flush(20)
        files.fail_at, files.code, files.forever = files.calls + 1, code, True
        assert made.batch_set_v1(keys[COUNT:], slots(COUNT, COUNT)) == [True] * COUNT
        store.flush(20)
        wanted = pools.content(pool)
        assert made.batch_exists(keys) == 2 * COUNT
        assert made.batch_get_v1(keys, slots(2 * COUNT)) == [True] * 2 * COUNT and pools.content(pool) == wanted
        files.heal()
        made.close()
    made = ours(quick / "cache", pool)
    there = made.batch_exists(keys)
    assert there >= COUNT
    assert made.batch_get_v1(keys, slots(2 * COUNT)) == [True] * there + [False] * (2 * COUNT - there)
    assert pools.content(pool) == wanted
    made.close()


def test_a_small_disk_keeps_the_last_pages_whole(quick: Path) -> None:
    pool, rounds = filled(), 40
    sizes = {"host": "1MiB", "disk": "4MiB", "timeout": 60}
    made = ours(quick / "cache", pool, sizes)
    for number in range(rounds):
        assert made.batch_set_v1(names(24, number), slots(24)) == [True] * 24
    assert sum(os.path.getsize(path) for path in (quick / "cache").rglob("*.slab")) <= 4 << 20
    wanted, there = pools.content(pool), []
    for number in range(rounds):
        pools.fill(pool, 5)
        found = made.batch_get_v1(names(24, number), slots(24))
        there.append(all(found))
        assert made.batch_exists(names(24, number)) == (found.index(False) if False in found else 24)
        if all(found):
            assert pools.content(pool) == wanted
    assert there[-1] and not there[0] and there == sorted(there)
    made.close()


def test_a_restart_finds_every_page_on_a_cold_disk(quick: Path) -> None:
    pool, keys = filled(1, "layer_first"), names(24)
    wanted = pools.content(pool)
    made = ours(quick / "cache", pool)
    assert made.batch_set_v1(keys, slots(24)) == [True] * 24
    made.close()
    made.close()
    made = ours(quick / "cache", pool)
    pools.fill(pool, 2)
    assert made.batch_exists(keys) == 24 and made.batch_get_v1(keys, slots(24)) == [True] * 24
    assert pools.content(pool) == wanted
    made.close()


def test_two_engines_share_a_daemon_that_is_killed_and_comes_back(quick: Path) -> None:
    one, other, keys = filled(), filled(2), names(24)
    wanted = pools.content(one)
    flags = ["--dir", quick / "cache", "--disk", "64MiB"]
    with daemon(quick, *flags) as process:
        writer, reader = (ours(process.url, pool, {"timeout": 10}) for pool in (one, other))
        assert writer.batch_set_v1(keys[:12], slots(12)) == [True] * 12
        assert writer.batch_set(keys[12:], [one.get_data_page(number * pools.PAGE) for number in range(12, 24)])
        assert reader.batch_exists(keys) == 24 and reader.batch_get_v1(keys, slots(24)) == [True] * 24
        assert pools.content(other) == wanted
        with kvstore.connect(process.url) as client:
            assert client.flush(20)
        process.kill()
        pools.fill(other, 3)
        before = pools.content(other)
        assert reader.batch_exists(keys) == 0 and reader.batch_get_v1(keys, slots(24)) == [False] * 24
        assert writer.batch_set_v1(keys, slots(24)) == [False] * 24 and pools.content(other) == before
    with daemon(quick, *flags) as process:
        assert reader.batch_exists(keys) == 24 and reader.batch_get_v1(keys, slots(24)) == [True] * 24
        assert pools.content(other) == wanted
        for each in (writer, reader):
            each.close()


def test_its_threads_do_not_mind_each_other(quick: Path) -> None:
    """Prefetches, backups and questions at once, in memory that holds a part of it all."""
    pool = filled()
    made, wanted = ours(quick / "cache", pool, {"host": "1MiB", "timeout": 60}), pools.content(pool)

    def work(number: int) -> int:
        draw, hits = random.Random(number), 0
        for _ in range(40):
            start = draw.randrange(21)
            keys, where = names(24)[start : start + 4], slots(4, start)
            hits += sum(made.batch_get_v1(keys, where)) if draw.random() < 0.5 else 0
            assert made.batch_set_v1(keys, where) == [True] * 4 and made.batch_exists(keys) == 4
        return hits

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) > 100
    assert pools.content(pool) == wanted
    assert made.batch_get_v1(names(24), slots(24)) == [True] * 24 and pools.content(pool) == wanted
    assert not [kind for kind in made.counts if ":" in kind]
    made.close()


def test_sglangs_own_fault_injector_takes_it(quick: Path) -> None:
    """The proxy that SGLang puts before a backend to try its callers: what it passes on is right."""
    pool, keys = filled(), names(24)
    wanted = pools.content(pool)
    made = HiCacheStorageFailureInjector(ours(quick / "cache", pool), 0.0, 0.3)
    made._thread_local.random = random.Random(1)
    answers = [made.batch_set_v1(keys, slots(24)) for _ in range(12)]
    assert {tuple(set(answer)) for answer in answers} == {(True,), (False,)}
    counts = {made.batch_exists(keys) for _ in range(12)}
    assert counts == {0, 24}
    answers = [made.batch_get_v1(keys, slots(24)) for _ in range(12)]
    assert {tuple(set(answer)) for answer in answers} == {(True,), (False,)} and pools.content(pool) == wanted
    made.close()


def test_the_factory_says_what_is_wrong(quick: Path) -> None:
    with pytest.raises(BadInput, match='give "dir" or "socket"'):
        StorageBackendFactory.create_backend("dynamic", config(dict(OURS)), filled())
    made = ours(quick / "cache", filled())
    with pytest.raises(BadInput, match="page_unified"):
        made.register_mem_pool_host(pools.mha("page_unified"))
    made.close()


def test_metrics_are_sglangs_own(quick: Path) -> None:
    made = ours(quick / "cache", filled(), enable_storage_metrics=True)
    assert made.batch_set_v1(names(4), slots(4)) == made.batch_get_v1(names(4), slots(4)) == [True] * 4
    stats = made.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([4], [4]) and stats.prefetch_bandwidth[0] > 0
    assert made.get_stats().prefetch_pgs == []
    made.close()
