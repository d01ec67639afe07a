"""What is stored, as people look at it: segments, uses of blocks, and what is counted of both."""

from __future__ import annotations

import random
import threading
from array import array
from pathlib import Path

import pytest
from blocks import NS, SMALL, found, ids, namespace, save

import kvstore
from kvstore import BadInput, segments
from kvstore.histogram import BOUNDS, Histogram
from kvstore.index import Index
from kvstore.keys import block_key, token_bytes
from kvstore.kinds import Kind, Origin
from kvstore.local import LocalStore
from kvstore.uses import Uses

BLOCK = SMALL.block_tokens


def use(store: LocalStore, tokens: list[int], times: int = 1, tenant: str = "") -> None:
    """So many matches that find all of a chain."""
    for _ in range(times):
        match = found(store, tokens, namespace(tenant))
        assert match.tokens == len(tokens)
        match.release()


def last_key(tokens: list[int]) -> str:
    """Hex of the key of a chain's last block."""
    key = NS.root
    for start in range(0, len(tokens), BLOCK):
        key = block_key(NS, key, token_bytes(tokens[start : start + BLOCK]))
    return key.hex()


def test_what_chains_share_is_one_segment_and_what_each_goes_on_with_another() -> None:
    trunk, one, other = ids(1, 4 * BLOCK), ids(2, 3 * BLOCK), ids(3, 2 * BLOCK + 5)
    with kvstore.open(host="4MiB") as store:
        for tokens in (trunk + one, trunk + other):
            save(store, tokens)
        before = {segment.id: segment.uses for segment in store.segments()}
        use(store, trunk + one, 3)
        use(store, trunk)
        all_of = {segment.start: segment for segment in store.segments() if segment.tokens != len(other)}
        tail = next(segment for segment in store.segments() if segment.tokens == len(other))
        shared, first = all_of[0], all_of[len(trunk)]
        assert len(store.segments()) == 3
        assert [shared.tokens, first.tokens, tail.start] == [len(trunk), len(one), len(trunk)]
        assert [shared.uses - before[shared.id], first.uses, tail.uses] == [4, 3, 0]
        assert first.served == 3 * len(one) and shared.served == shared.uses * len(trunk)
        assert (shared.blocks, tail.blocks) == ({"host": 4}, {"host": 3})
        assert sum(segment.bytes for segment in store.segments()) == store.stats()["tiers"]["host"]["bytes"]
        keys = [last_key(trunk), last_key(trunk + one), last_key(trunk + other)]
        assert [shared.id, first.id, tail.id] == [key[: segments.ID_DIGITS] for key in keys]
        assert store.segments()[0] == shared and store.segments(1) == [shared]
        assert shared.created <= first.created <= first.last_use and tail.last_use == tail.created


def test_tenants_and_owners_have_segments_of_their_own() -> None:
    start, more = ids(4, 2 * BLOCK), ids(5, 2 * BLOCK)
    with kvstore.open(host="4MiB") as store:
        save(store, start, namespace("a"), owner="ann")
        save(store, start + more, namespace("a"), owner="bob")
        save(store, start, namespace("b"), owner="ann")
        one = [(segment.owner, segment.start, segment.tokens) for segment in store.segments(tenant="a")]
        assert sorted(one) == [("ann", 0, len(start)), ("bob", len(start), len(more))]
        other = store.segments(tenant="b")
        assert [(segment.tenant, segment.tokens) for segment in other] == [("b", len(start))]
        assert len(store.segments()) == 3 and store.segments(tenant="nobody") == []


def test_tiers_pins_and_times_of_segments(tmp_path: Path) -> None:
    kept, written, short = ids(6, 2 * BLOCK), ids(7, 3 * BLOCK), ids(8, BLOCK)
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="8MiB") as store:
        save(store, kept)
        save(store, written).wait()
        save(store, short, ttl=1000.0)
        store.pin(found(store, kept), seconds=100.0)
        store.demote(found(store, written))
        by_tokens = {segment.tokens: segment for segment in store.segments()}
        assert by_tokens[len(written)].blocks == {"disk": 3}
        assert by_tokens[len(kept)].blocks["host"] == 2
        assert [by_tokens[len(each)].pinned for each in (kept, written, short)] == [True, False, False]
        lasts = by_tokens[len(short)]
        assert lasts.expires == pytest.approx(lasts.created + 1000.0) and by_tokens[len(kept)].expires == 0
        use(store, written)
        used = {segment.id: segment.last_use for segment in store.segments()}
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="8MiB") as store:
        again = {segment.id: segment for segment in store.segments()}
        assert again.keys() == used.keys()
        assert {segment.uses for segment in again.values()} == {0}
        assert again[by_tokens[len(written)].id].last_use == pytest.approx(used[by_tokens[len(written)].id])
        use(store, written)
        assert [segment.uses for segment in store.segments(1)] == [1]


def test_segments_are_all_that_is_stored(seed: int, tmp_path: Path) -> None:
    draw, chains = random.Random(seed), [ids(seed, 3 * BLOCK)]
    with kvstore.open(tmp_path / "cache", host="1MiB", disk="4MiB") as store:
        for turn in range(150):
            start = draw.choice(chains)
            start = start[: draw.randrange(len(start) + 1)]
            chains.append(start + ids(seed + turn, draw.randrange(1, 4 * BLOCK)))
            save(store, chains[-1], owner=draw.choice(["ann", "bob"]))
            if turn % 40 == 20:
                store.forget(match=found(store, draw.choice(chains)))
        assert store.flush()
        listed, index = store.segments(10**6), store._residency.index
        stored = [number for number in index.number.values() if index.present(number)]
        assert sum(segment.tokens for segment in listed) == sum(index.count[number] for number in stored)
        for tier in ("host", "disk"):
            blocks = sum(segment.blocks.get(tier, 0) for segment in listed)
            assert blocks == store.stats()["tiers"][tier]["blocks"] > 0
        ranks = [(segment.served, segment.last_use, segment.tokens) for segment in listed]
        assert ranks == sorted(ranks, reverse=True)
        assert store.segments(7) == listed[:7]


def test_what_changes_while_it_is_looked_at_is_no_error(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SLICE", 4)
    over = threading.Event()
    with kvstore.open(host="1MiB") as store:

        def change(tenant: str) -> None:
            for turn in range(60):
                save(store, ids(seed + turn % 7, BLOCK * (1 + turn % 9)), namespace(tenant), owner=tenant)
                if turn % 5 == 4:
                    store.forget(tenant=tenant)
            over.set()

        threads = [threading.Thread(target=change, args=(tenant,)) for tenant in ("a", "b")]
        for thread in threads:
            thread.start()
        while not over.is_set():
            assert all(segment.owner == segment.tenant and segment.tokens for segment in store.segments())
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("limit", [0, -1, True, 2.5, "many"])
def test_a_limit_that_is_none_is_refused(limit: object) -> None:
    with kvstore.open(host="1MiB") as store, pytest.raises(BadInput, match="no number of segments"):
        store.segments(limit)  # type: ignore[arg-type]


# -- uses -------------------------------------------------------------------------------------------------------------


def test_gaps_between_uses_and_idle_times_are_counted_once_a_block() -> None:
    index, now = Index(lambda _: None), [0.0]
    uses = Uses(index, lambda: now[0])
    kind = index.intern(Kind(b"", b"", "", "", SMALL, Origin()))
    blocks = [index.insert(bytes([n]), -2, kind, BLOCK, n + 1, 100.0, 0.0) for n in range(4)]
    uses.use(blocks[:2], 103.0)  # 3 seconds after they were saved
    uses.use(blocks[:3], 110.0)  # 7, 7 and 10 seconds
    now[0] = 111.0
    uses.evicted("host", blocks[2:])  # 1 and 11 seconds
    told = uses.histograms()
    gaps, idle = told["reuse_gap_seconds"], told["idle_before_evict_seconds"]["host"]
    assert gaps["bounds"][:3] == [1.0, 5.0, 15.0]
    assert (gaps["counts"][:4], gaps["sum"]) == ([0, 2, 3, 0], 3 + 3 + 7 + 7 + 10)
    assert (idle["counts"][:4], idle["sum"]) == ([1, 0, 1, 0], 12.0)
    assert sum(told["idle_before_evict_seconds"]["disk"]["counts"]) == 0
    assert [uses.times(number) for number in blocks] == [2, 2, 1, 0]
    assert [uses.last(number) for number in blocks] == [110.0, 110.0, 110.0, 100.0]


def test_a_number_that_stands_for_another_block_begins_anew() -> None:
    index = Index(lambda _: None)
    uses = Uses(index, lambda: 0.0)
    kind = index.intern(Kind(b"", b"", "", "", SMALL, Origin()))
    number = index.insert(b"one", -2, kind, BLOCK, 1, 100.0, 0.0)
    uses.use([number], 150.0)
    index.sweep(number)
    assert index.insert(b"other", -2, kind, BLOCK, 2, 200.0, 0.0) == number
    assert (uses.times(number), uses.last(number)) == (0, 200.0)
    uses.use([number], 201.0)
    assert (uses.times(number), uses.histograms()["reuse_gap_seconds"]["sum"]) == (1, 51.0)


def test_uses_of_an_index_that_was_restored() -> None:
    index = Index(lambda _: None)
    uses = Uses(index, lambda: 0.0)
    index.sequence.extend([5, 9])
    index.created.extend([1.0, 2.0])
    uses.restore(array("d", [30.0, 40.0]))
    assert [(uses.last(number), uses.times(number)) for number in (0, 1)] == [(30.0, 0), (40.0, 0)]


def test_a_clock_that_goes_back_and_times_beyond_all_bounds() -> None:
    histogram = Histogram()
    histogram.add(-5.0)
    histogram.add(BOUNDS[-1] + 1, times=2)
    counts = histogram.snapshot()["counts"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 2, 3)


def test_evictions_are_in_the_histograms(tmp_path: Path, seed: int) -> None:
    with kvstore.open(tmp_path / "cache", host="1MiB", disk="4MiB") as store:
        for turn in range(80):
            save(store, ids(seed + turn, 6 * BLOCK)).wait()
        counters, histograms = store.stats()["counters"], store.stats()["histograms"]
        for tier in ("host", "disk"):
            counted = sum(histograms["idle_before_evict_seconds"][tier]["counts"])
            assert counted == counters[f"{tier}_evicted_blocks"] > 0


def test_hit_tokens_are_counted_by_tier(tmp_path: Path) -> None:
    near, far = ids(20, 2 * BLOCK + 3), ids(21, 3 * BLOCK)
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="8MiB") as store:
        save(store, near)
        save(store, far).wait()
        store.demote(found(store, far))
        before = store.stats()["counters"]
        use(store, near)
        use(store, far)
        after = store.stats()["counters"]
        gained = {tier: after[f"{tier}_hit_tokens"] - before.get(f"{tier}_hit_tokens", 0) for tier in ("host", "disk")}
        assert gained == {"host": len(near), "disk": len(far)}
        assert "device_hit_tokens" not in after


def test_saved_prefill_seconds_add_up() -> None:
    with kvstore.open(host="1MiB") as store:
        assert store.stats()["counters"]["saved_prefill_seconds"] == 0
        store.saved(1.5)
        store.saved(0)
        assert store.stats()["counters"]["saved_prefill_seconds"] == 1.5
        for wrong in (-1.0, float("nan"), float("inf"), "2"):
            with pytest.raises(BadInput, match="no time that was saved"):
                store.saved(wrong)  # type: ignore[arg-type]
