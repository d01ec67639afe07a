"""What SGLang's own file backend answers, ours answers: the same calls to both, on SGLang's own host pools."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

import sglang_pools as pools
from hosted import hosted
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang_both import names, ours, theirs, transfer
from sglang_interface import CONFIG, INTERFACE, POLICIES, RESULT, TRANSFER

from kvstore.adapters.sglang import KVStoreHiCache

MIB = 1 << 20
FLAT: dict[str, Callable[[], Any]] = {
    **{f"mha {each}": partial(pools.mha, each) for each in ("layer_first", "page_first", "page_first_direct")},
    **{f"mla {each}": partial(pools.mla, each) for each in ("layer_first", "page_first", "page_first_direct")},
    "mha page_head": partial(pools.mha, "page_head"),
    "mha bytes": lambda: pools.mha("page_first", torch.uint8),
    "mamba": pools.mamba,
    "logical": pools.logical,
}
PARTS: dict[str, Callable[[], Any]] = {
    "widths page_first": lambda: pools.mha("page_first", value_dim=4),
    "widths page_first_direct": lambda: pools.mha("page_first_direct", value_dim=4),
    "mla page_first_kv_split": lambda: pools.mla("page_first_kv_split"),
    "mla over two ranks": lambda: pools.mla("page_first", dcp=2),
}


def test_the_interface_is_what_it_was_written_for() -> None:
    """A release of SGLang that has changed it fails here, before it fails in a server."""
    there = {name: each for name, each in vars(HiCacheStorage).items() if not name.startswith("_") and callable(each)}
    abstract = HiCacheStorage.__abstractmethods__
    assert {
        name: (list(inspect.signature(each).parameters), name in abstract) for name, each in there.items()
    } == INTERFACE
    for kind, fields in (("HiCacheStorageConfig", CONFIG), ("PoolTransfer", TRANSFER), ("PoolTransferResult", RESULT)):
        assert [field.name for field in dataclasses.fields(getattr(hicache_storage, kind))] == fields
    assert [policy.value for policy in PoolHitPolicy] == POLICIES and hicache_storage.STORAGE_BATCH_SIZE == 128
    for name, (parameters, _) in INTERFACE.items():
        assert list(inspect.signature(getattr(KVStoreHiCache, name)).parameters) == parameters
    assert issubclass(KVStoreHiCache, HiCacheStorage) and not KVStoreHiCache.__abstractmethods__


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("seed", range(2))
def test_the_same_calls_have_the_same_answers(kind: str, seed: int, quick: Path) -> None:
    """Pages, tensors and questions in any order, from pools that hold the same bytes."""
    draw, both = random.Random(f"{kind} {seed}"), [FLAT[kind](), FLAT[kind]()]
    for pool in both:
        pools.fill(pool, seed)
    keys, made = names(12), [ours(quick / "ours", both[0]), theirs(quick / "theirs", both[1])]
    for _ in range(80):
        some = draw.sample(keys, draw.randrange(1, 8))
        where, call = draw.sample(range(pools.PAGES), len(some)), draw.choice("wWrRxee?")
        answers = [list(map(repr, act(call, made[at], both[at], some, where))) for at in (0, 1)]
        assert answers[0] == answers[1], (call, some, where)
        assert pools.content(both[0]) == pools.content(both[1])
    assert made[0].counts["written_pages"] >= 8
    assert {kind for kind in made[0].counts if ":" in kind} <= {"batch_get_v2: ValueError"}  # slots too few
    assert made[0].clear() and made[1].clear()
    assert [each.batch_exists(keys) for each in made] == [0, 0]
    made[0].close()


def act(call: str, backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[Any]:
    """One call of SGLang's; what it answers."""
    step = getattr(pool, "logical_page_size", pool.page_size)
    if call == "w":
        return list(backend.batch_set_v2([transfer(pool, keys, pages)])[PoolName.KV])
    if call == "r":
        return list(backend.batch_get_v2([transfer(pool, keys, pages)])[PoolName.KV])
    if call == "W":  # the older way, which SGLang's controller takes where it is not told of a newer one
        return [backend.batch_set(keys, [pool.get_data_page(page * step) for page in pages])]
    if call == "R":
        found = backend.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
        for page, tensor in zip(pages, found, strict=True):
            if tensor is not None:
                pool.set_from_flat_data_page(page * step, tensor)
        return [tensor is not None for tensor in found]
    if call == "x":
        short = PoolTransfer(name=PoolName.KV, host_indices=pools.slots(pool, pages)[:-1], keys=keys)
        return list(backend.batch_get_v2([short])[PoolName.KV])
    if call == "e":
        return [backend.batch_exists(keys), *(backend.exists(key) for key in keys)]
    return [backend.batch_exists_v2(keys)]


@pytest.mark.parametrize("kind", [*FLAT, *PARTS])
def test_every_layout_comes_back_in_place_without_a_detour(kind: str, quick: Path) -> None:
    """``batch_set_v1`` and ``batch_get_v1``, which the file backend has not; and what pools have in parts only."""
    pool, keys = (FLAT | PARTS)[kind](), names(10)
    pools.fill(pool, 1)
    made, wanted = ours(quick / "cache", pool), pools.content(pool)
    first, second = list(range(10)), list(range(10, 20))
    assert made.batch_set_v1(keys, pools.slots(pool, first)) == [True] * 10
    again = made.batch_get_v1([keys[1], "nothing", keys[0]], pools.slots(pool, [0, 1, 1]))
    assert again == [True, False, True]  # pages 0 and 1 have changed places
    assert (pools.content(pool) == wanted) == (kind == "logical")
    assert made.batch_get_v1(keys, pools.slots(pool, first)) == [True] * 10
    assert pools.content(pool) == wanted
    pools.fill(pool, 2)
    assert made.batch_get_v1(keys, pools.slots(pool, second)) == [True] * 10
    assert made.batch_set_v1(names(10, 1), pools.slots(pool, second)) == [True] * 10
    made.close()
    other = ours(quick / "cache", pool)  # from a cold disk
    pools.fill(pool, 3)
    assert other.batch_get_v1(names(10, 1), pools.slots(pool, first)) == [True] * 10
    assert (
        other.batch_get_v1(keys, pools.slots(pool, list(range(24)))[: 10 * len(pools.slots(pool, [0]))]) == [True] * 10
    )
    other.close()


RANKS: list[dict[str, Any]] = [
    *({"is_mla_model": mla} for mla in (False, True)),
    *({"is_mla_model": mla, "tp_size": 2, "tp_rank": rank} for mla, rank in product((False, True), (0, 1))),
    *({"is_mla_model": mla, "pp_size": 2, "pp_rank": rank} for mla, rank in product((False, True), (0, 1))),
    *({"is_mla_model": mla, "tp_size": 4, "tp_rank": 1} for mla in (False, True)),
    *({"is_mla_model": True, "attn_cp_size": 2, "attn_cp_rank": rank} for rank in (0, 1)),
    *(
        {
            "is_mla_model": True,
            "tp_size": 4,
            "tp_rank": rank,
            "dcp_size": 2,
            "dcp_rank": rank % 2,
            "logical_page_size": 8,
        }
        for rank in range(4)
    ),
    {"is_mla_model": True, "dp_rank": 1},
]


def test_ranks_share_what_the_reference_shares_and_nothing_else(quick: Path) -> None:
    """Each rank writes pages of its own, of two pools; all ranks then ask for all of them."""
    everyone: list[list[Any]] = []
    with hosted(quick / "cache", host=8 * MIB, disk=64 * MIB) as daemon:
        for rank in RANKS:
            mla, dcp = rank["is_mla_model"], rank.get("dcp_size", 1)
            pool, state = pools.mla("page_first", dcp=dcp) if mla else pools.mha("page_first"), pools.mamba()
            for each in (pool, state):
                pools.fill(each, 1)
            pair = [ours(f"unix:{daemon.path}", pool, **rank), theirs(quick / "theirs", pool, **rank)]
            for each in pair:
                each.register_mem_host_pool_v2(state, PoolName.MAMBA)
            everyone.append([*pair, pool, state])
        for number, (our, their, pool, state) in enumerate(everyone):
            keys = names(2, number)
            for each in (our, their):
                assert each.set(keys[0], pool.get_data_page(0)) and each.set(keys[1], pool.get_data_page(0))
                given = transfer(state, keys, [3, 4], PoolName.MAMBA)
                assert each.batch_set_v2([given]) == {PoolName.MAMBA: [True, True]}
        shared = 0
        for number, (our, their, _, _) in enumerate(everyone):
            for other in range(len(RANKS)):
                asked = [PoolTransfer(name=PoolName.MAMBA, keys=names(2, other))]
                answers = [each.batch_exists_v2(names(2, other), asked) for each in (our, their)]
                assert answers[0] == answers[1], (RANKS[number], RANKS[other])
                shared += answers[0].extra_pool_hit_pages.get(PoolName.KV, 0) > 0
        # Of MLA: TP ranks 0/1, 0/2, 1/2, 1/4 and the replica, all with each other; two DCP groups of two.
        mha = sum(not rank["is_mla_model"] for rank in RANKS)
        assert shared == mha + 5 * 5 + 2 + 2 + 2 * 4
        for our, *_ in everyone:
            our.close()


def test_other_salts_dtypes_layouts_and_shapes_miss(quick: Path) -> None:
    tokens = list(range(4 * pools.PAGE))
    salted = [get_storage_hash_str(Key(tokens, *space), None, page_size=pools.PAGE) for space in SALTS]
    assert len({tuple(each) for each in salted}) == len(SALTS) and all(len(each) == 4 for each in salted)
    with hosted(quick / "cache", host=8 * MIB, disk=64 * MIB) as daemon:
        url = f"unix:{daemon.path}"
        first = ours(url, pools.mha("page_first"))
        assert first.batch_set_v1(salted[0], pools.slots(first.mem_pool_host, [0, 1, 2, 3])) == [True] * 4
        assert [first.batch_exists(keys) for keys in salted] == [4, 0, 0, 0, 0]
        for pool in (
            pools.mha("page_first", torch.float16),
            pools.mha("page_first_direct"),
            pools.mha("page_first", heads=4),
            pools.mla("page_first"),
        ):
            other = ours(url, pool)
            assert other.batch_exists(salted[0]) == 0
            assert other.batch_get_v1(salted[0], pools.slots(pool, [0, 1, 2, 3])) == [False] * 4
            other.close()
        first.close()


class Key(list[int]):
    """Tokens with the namespace of their request, as SGLang's radix keys have it."""

    def __init__(self, tokens: list[int], extra_key: str | None, cache_salt: str | None) -> None:
        super().__init__(tokens)
        self.extra_key, self.cache_salt = extra_key, cache_salt


SALTS = [(None, None), (None, "a"), (None, "b"), ("a", None), ("a", "b")]


@pytest.fixture
def sparse(quick: Path) -> Iterator[list[Any]]:
    """Both backends, with three pools."""
    made = list[Any]()
    kv, swa, state = pools.mha("page_first"), pools.mha("page_first"), pools.mamba()
    for backend in (ours(quick / "ours", kv), theirs(quick / "theirs", kv)):
        backend.register_mem_host_pool_v2(swa, PoolName.SWA)
        backend.register_mem_host_pool_v2(state, PoolName.MAMBA)
        made.append(backend)
    made[0].registered = {PoolName.KV: kv, PoolName.SWA: swa, PoolName.MAMBA: state}
    yield made
    made[0].close()


@pytest.mark.parametrize("first", [0, 60])
def test_hit_policies_are_those_of_the_reference(first: int, sparse: list[Any]) -> None:
    """Any pages of three pools are there; any policies ask for them."""
    lengths = set()
    for seed in range(first, first + 60):
        draw, keys = random.Random(seed), names(10, seed)
        for name in (PoolName.KV, PoolName.SWA, PoolName.MAMBA):
            pool = sparse[0].registered[name]
            there = [key for key in keys if draw.random() < (0.95 if name == PoolName.KV else 0.7)]
            for backend in sparse:
                given = transfer(pool, there, range(len(there)), name)
                assert backend.batch_set_v2([given]) == {name: [True] * len(there)}
        asked = [
            PoolTransfer(
                name=name,
                keys=draw.choice([None, keys[-1:], keys[-2:], keys[-4:]]),
                hit_policy=draw.choice([PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES]),
            )
            for name in draw.sample([PoolName.SWA, PoolName.MAMBA], draw.randrange(3))
        ]
        answers = [backend.batch_exists_v2(keys, asked) for backend in sparse]
        assert answers[0] == answers[1] and isinstance(answers[0], PoolTransferResult)
        assert list(answers[0].extra_pool_hit_pages) == list(answers[1].extra_pool_hit_pages)
        lengths.add(answers[0].kv_hit_pages)
    assert len(lengths) > 5


def test_block_groups_have_a_verdict_of_their_own(sparse: list[Any]) -> None:
    """Which the file backend refuses: whole groups from the start, and never a bound for keys and values."""
    keys = names(12, 99)
    kv, swa = sparse[0].mem_pool_host, pools.mha("page_first")
    sparse[0].batch_set_v2([transfer(kv, keys[:6], range(6)), transfer(swa, [keys[3], keys[7]], [0, 1], PoolName.SWA)])
    groups = PoolTransfer(name=PoolName.SWA, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=4, group_pages=1)
    found = sparse[0].batch_exists_v2(keys, [groups])
    assert (found.kv_hit_pages, found.extra_pool_hit_pages) == (6, {PoolName.KV: 6, PoolName.SWA: 8})
    assert found.restorable_prefix_pages == [1, 2, 3, 4, 5, 6]
