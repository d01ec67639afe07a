"""What match, load, save and draft promise, one sentence each; deletion has a file of its own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import NS, ODD, SMALL, WIDE, drafts, fill, found, ids, load_all, marks, namespace, recount, save, wrong

import kvstore
from kvstore import BadInput, Layout
from kvstore.local import LocalStore


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore]:
    """A store in memory, and one with a disk; its accounts must be right at the end."""
    path = tmp_path / "cache" if request.param == "disk" else None
    with kvstore.open(path, host="8MiB", disk="64MiB") as opened:
        yield opened
        if not opened._closed:
            opened.flush()
            assert recount(opened) == []


@pytest.mark.parametrize("layout", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
def test_a_match_is_exact_to_the_token(store: LocalStore, layout: Layout) -> None:
    size = layout.block_tokens
    tokens = ids(1, 5 * size + 3)
    save(store, tokens, layout=layout)
    other = ids(2, len(tokens))
    for parted in (0, 1, size - 1, size, size + 1, 3 * size + 2, 5 * size, 5 * size + 2, 5 * size + 3):
        match = found(store, tokens[:parted] + other[parted:], layout=layout)
        assert match.tokens == parted
        assert match.miss.position == parted
        load = store.load(match)
        assert load.tokens == parted
        assert wrong(load, tokens[:parted]) == []
        assert load.good_tokens(len(layout.layers) - 1) == parted
        load.release()


def test_at_least_one_token_is_left_to_compute(store: LocalStore) -> None:
    tokens = ids(1, 40)
    save(store, tokens)
    assert [store.match(NS, SMALL, tokens[:n]).tokens for n in (0, 1, 2, 16, 17, 32, 40)] == [0, 0, 1, 15, 16, 31, 39]
    assert found(store, tokens).tokens == 40


def test_what_is_stored_is_not_stored_again(store: LocalStore) -> None:
    tokens = ids(1, 64)
    assert save(store, tokens[:32]).new_tokens == 32
    before = store.stats()["tiers"]["host"]["blocks"]
    every = {i: store.draft(SMALL) for i in range(4)}
    given = {i: draft for i, draft in every.items() if draft is not None}
    for i, draft in given.items():
        fill(draft, marks(NS, tokens)[i * 16 : i * 16 + 16])
    saved = store.save(NS, SMALL, tokens, given)
    assert (saved.tokens, saved.new_tokens) == (64, 32)
    assert store.stats()["tiers"]["host"]["blocks"] == before + 2
    assert load_all(store, [*tokens, 0]) == 64


def test_a_longer_sibling_supersedes_a_partial_tail(store: LocalStore) -> None:
    tokens = ids(1, 60)
    for length in (20, 21, 29, 31, 47, 48, 50):
        save(store, tokens[:length])
        assert found(store, tokens).tokens == length
        assert store.stats()["tiers"]["host"]["blocks"] == -(-length // 16)
        assert load_all(store, tokens) == length
    assert store.stats()["counters"]["superseded_blocks"] == 5


def test_a_tail_that_a_sibling_covers_is_not_stored(store: LocalStore) -> None:
    tokens = ids(1, 30)
    save(store, tokens)
    saved = save(store, tokens[:20])
    assert (saved.tokens, saved.new_tokens) == (20, 0)
    assert store.stats()["tiers"]["host"]["blocks"] == 2
    assert saved.wait().tokens == (20 if "disk" in store.stats()["tiers"] else 0)


def test_siblings_that_part_are_both_kept(store: LocalStore) -> None:
    tokens = ids(1, 30)
    forks = [tokens[:20] + ids(n, 9) for n in range(2, 12)]
    for fork in forks:
        save(store, fork)
    for fork in forks:
        assert load_all(store, [*fork, 0]) == 29


def test_a_save_ends_before_the_first_block_that_nobody_has(store: LocalStore) -> None:
    tokens = ids(1, 64)
    made = drafts(store, NS, SMALL, tokens)
    made.pop(1).discard()
    assert store.save(NS, SMALL, tokens, made).tokens == 16
    assert load_all(store, tokens) == 16
    assert store.stats()["drafts"] == 0


def test_drafts_that_were_dropped_give_their_room_back(store: LocalStore) -> None:
    def abandon() -> None:
        held = [store.draft(SMALL) for _ in range(20)]
        assert all(held) and store.stats()["drafts"] == 20
        cycle: list[object] = [held]
        cycle.append(cycle)

    for _ in range(40):
        thread = threading.Thread(target=abandon)
        thread.start()
        thread.join()
        gc.collect()
    assert store.stats()["drafts"] == 0


def test_a_draft_that_was_given_away_is_refused(store: LocalStore) -> None:
    tokens = ids(1, 32)
    draft = store.draft(SMALL)
    assert draft is not None
    with pytest.raises(BadInput, match="draft"):
        store.save(NS, SMALL, tokens, {0: draft, 1: draft})
    store.save(NS, SMALL, tokens, {0: draft})
    with pytest.raises(BadInput, match="draft"):
        store.save(NS, SMALL, tokens, {1: draft})
    with kvstore.open(host="1MiB") as elsewhere:
        foreign = elsewhere.draft(SMALL)
        assert foreign is not None
        with pytest.raises(BadInput, match="draft"):
            store.save(NS, SMALL, tokens, {1: foreign})


def test_abandoned_matches_and_loads_leave_no_lease(store: LocalStore) -> None:
    tokens = ids(1, 100)
    save(store, tokens)

    def abandon(number: int) -> None:
        match = found(store, tokens[: number % 101])
        if number % 3:
            load = store.load(match)
            load.wait(0)
            if number % 3 == 1:
                cycle: list[object] = [load]
                cycle.append(cycle)

    for number in range(300):
        thread = threading.Thread(target=abandon, args=(number,))
        thread.start()
        thread.join()
    gc.collect()
    assert store.stats()["leases"] == 0


def test_what_a_lease_holds_is_not_evicted(store: LocalStore) -> None:
    tokens = ids(1, 160)
    save(store, tokens)
    load = store.load(found(store, tokens))
    for other in range(2, 200):
        save(store, ids(other, 64)).wait()
    assert store.stats()["counters"]["host_evicted_blocks"] > 0
    assert wrong(load, tokens) == []
    assert load.good_tokens() == 160
    load.release()


def test_a_load_outlives_the_release_of_its_match(store: LocalStore) -> None:
    tokens = ids(1, 64)
    save(store, tokens)
    match = found(store, tokens)
    load = store.load(match)
    match.release()
    assert load.wait(0) and wrong(load, tokens) == []
    load.release()


def test_a_match_that_was_released_loads_nothing(store: LocalStore) -> None:
    tokens = ids(1, 64)
    save(store, tokens)
    match = found(store, tokens)
    match.release()
    load = store.load(match)
    assert (load.tokens, load.good_tokens(), load.wait(0)) == (0, 0, False)


def test_a_load_that_was_released_gives_nothing(store: LocalStore) -> None:
    tokens = ids(1, 64)
    save(store, tokens)
    load = store.load(found(store, tokens))
    load.release()
    assert not load.wait(0)
    assert load.pieces(0) == [] and load.read_into(memoryview(bytearray(1 << 16))) == 0


def test_two_layouts_in_one_namespace_share_nothing(store: LocalStore) -> None:
    tokens = ids(1, 8)
    twin = Layout(SMALL.layers, SMALL.dtype, block_tokens=32)
    save(store, tokens)
    assert found(store, tokens, layout=twin).tokens == 0
    assert save(store, tokens, layout=twin).tokens in (0, 8)
    for layout in (SMALL, twin):
        assert load_all(store, [*tokens, 0], layout=layout) in (0, 8)
    longer = ids(1, 8) + ids(3, 30)
    save(store, longer, layout=twin)
    assert load_all(store, [*longer, 0]) in (0, 8)
    assert load_all(store, [*longer, 0], layout=twin) in (0, 38)


def test_a_draft_of_another_layout_is_refused(store: LocalStore) -> None:
    with pytest.raises(BadInput, match="layout"):
        store.save(NS, SMALL, ids(1, 16), drafts(store, NS, WIDE, ids(1, 16)))


@pytest.mark.parametrize("bad", [[-1, 2], [2**32, 1], [1.5], ["a"], None, [[1, 2]], b"123", "text", 7])
def test_ids_that_cannot_be_are_refused(store: LocalStore, bad: object) -> None:
    with pytest.raises(BadInput, match="token"):
        store.match(NS, SMALL, bad)
    with pytest.raises(BadInput, match="token"):
        store.save(NS, SMALL, bad, {})


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("-inf")])
def test_a_ttl_that_makes_no_sense_is_refused(store: LocalStore, ttl: float) -> None:
    with pytest.raises(BadInput, match="ttl"):
        save(store, ids(1, 16), ttl=ttl)


def test_the_extreme_ids_are_served(store: LocalStore) -> None:
    tokens = [0, 2**32 - 1] * 20
    save(store, tokens)
    assert load_all(store, [*tokens, 0]) == 40


def test_a_miss_says_why(store: LocalStore) -> None:
    tokens = ids(1, 40)
    assert found(store, tokens).miss.kind == "empty"
    save(store, tokens)
    assert store.match(NS, SMALL, tokens).miss.kind == "complete"
    parts = found(store, tokens[:20] + ids(2, 20)).miss
    assert (parts.kind, parts.position) == ("parts", 20) and "token 20" in str(parts)
    assert found(store, ids(2, 20)).miss.kind == "parts"
    tenant = found(store, tokens, namespace("other")).miss
    assert (tenant.kind, tenant.field, tenant.position) == ("tenant", "tenant", 0)
    model = found(store, tokens, namespace(dtype="bfloat16")).miss
    assert (model.kind, model.field) == ("fingerprint", "dtype") and "dtype" in str(model)
    assert found(store, tokens, namespace(lora="abc")).miss.field == "lora"


def test_nothing_is_shared_across_tenants_and_models(store: LocalStore) -> None:
    tokens = ids(1, 40)
    spaces = [NS, namespace("a"), namespace("b"), namespace("a", checkpoint="other"), namespace(tenant="", x="a")]
    for number, space in enumerate(spaces):
        assert all(found(store, tokens, other).tokens == 0 for other in spaces[number:])
        save(store, tokens, space)
        assert all(load_all(store, [*tokens, 0], other) == 40 for other in spaces[: number + 1])


def test_a_chain_lives_for_its_ttl(store: LocalStore) -> None:
    now = [1000.0]
    store._residency.wall = lambda: now[0]
    tokens, other = ids(1, 40), ids(2, 40)
    save(store, tokens, ttl=10)
    save(store, other, ttl=10).wait()
    now[0] = 1009.9
    assert found(store, tokens).tokens == found(store, other).tokens == 40
    save(store, other, ttl=10)  # once more: it lives longer
    now[0] = 1010.0
    assert (found(store, tokens).tokens, found(store, other).tokens) == (0, 40)
    now[0] = 1020.0
    assert found(store, other).tokens == 0
    assert store.stats()["counters"]["expired_blocks"] == 6
    assert store.stats()["tiers"]["host"]["blocks"] == 0


def test_names_that_cannot_be_written_are_refused(store: LocalStore) -> None:
    with pytest.raises(BadInput, match="tenant"):
        namespace("\ud800")
    with pytest.raises(BadInput, match="owner"):
        save(store, ids(1, 20), owner="\ud800")


def test_a_match_of_strangers_leaves_nothing_behind(store: LocalStore) -> None:
    before = len(store._residency.index._roots)
    for number in range(20):
        assert store.match(namespace(f"stranger {number}"), SMALL, ids(1, 20)).tokens == 0
    assert len(store._residency.index._roots) == before
