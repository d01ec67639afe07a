"""Stores that share blocks, through Redis and its naive twin: what one saved, another finds, loads and keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from blocks import NS, SMALL, WIDE, drafts, fill, found, ids, load_all, marks, namespace, recount, save, wrong
from gates import PATIENCE
from remotes import MIB, TOKENS, Fleet, counters, settled, sharing, tiers
from servers import running

from kvstore import Layout, Namespace
from kvstore.bench.remote.server import Server, wait_until
from kvstore.local import LocalStore
from kvstore.tiers.base import Copy

SECRET = b"0123456789abcdef"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(params=["naive", "redis"])
def fleet(request: pytest.FixtureRequest, server: Server) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(request.param, server, stack)


def shared(store: LocalStore, tokens: list[int], space: Namespace = NS, layout: Layout = SMALL, **more: Any) -> None:
    """Saves a chain, which is in the remote tier when this returns."""
    save(store, tokens, space, layout, **more)
    assert store.flush(PATIENCE)


def key_of(store: LocalStore, block: int) -> bytes:
    """Key of a block of ``TOKENS``."""
    match = found(store, TOKENS)
    key = store._residency.index.key[match.blocks[block][0]]
    match.release()
    return key


def test_hosts_continue_each_others_conversations(fleet: Fleet, tmp_path: Path) -> None:
    one, other = fleet.host(tmp_path / "one"), fleet.host(tmp_path / "other")
    shared(one, TOKENS)
    assert tiers(one, TOKENS) == {"host": 64} and tiers(other, TOKENS) == {"remote": 64}
    assert load_all(other, [*TOKENS, 0]) == 64
    settled(other)
    assert tiers(other, TOKENS) == {"host": 64}
    longer = TOKENS + ids(2, 40)
    shared(other, longer)
    assert tiers(one, longer) == {"host": 64, "remote": 32}  # the last 8 tokens are no full block
    assert load_all(one, [*longer, 0]) == 96
    assert other.stats()["tiers"]["disk"]["blocks"] == 7  # what came from the other host is kept here, too
    said = counters(other)
    assert (said["remote_hit_tokens"], said["remote_read_blocks"], said["remote_written_blocks"]) == (128, 4, 2)


def test_parts_come_by_groups_of_layers(fleet: Fleet) -> None:
    part = WIDE.payload_bytes(32) // len(WIDE.layers)  # a layer
    one, other = fleet.host(part_bytes=2 * part), fleet.host()
    tokens = ids(1, 64)
    shared(one, tokens, layout=WIDE)
    assert set(fleet.there().values()) == {4}  # layer 0, and then two at a time
    load = other.load(found(other, tokens, layout=WIDE))
    assert load.wait(0) and wrong(load, tokens) == [] and load.good_tokens(5) == 64
    assert load.tokens_by_tier(64) == {"device": 0, "host": 0, "disk": 0, "remote": 64}
    load.release()


def test_a_layer_that_is_larger_than_a_part_is_in_several(fleet: Fleet) -> None:
    one, other = fleet.host(part_bytes=1024), fleet.host()
    shared(one, TOKENS[:32])
    assert set(fleet.there().values()) == {SMALL.payload_bytes(16) // 1024}
    assert load_all(other, [*TOKENS[:32], 0]) == 32


def test_another_tenant_misses_and_the_same_hits(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    ours, theirs = namespace("us"), namespace("them")
    shared(one, TOKENS, ours)
    assert tiers(other, TOKENS, theirs) == {} and tiers(other, TOKENS, namespace("us", dtype="bfloat16")) == {}
    assert tiers(other, TOKENS, ours) == {"remote": 64}
    assert load_all(other, [*TOKENS, 0], theirs) == 0 and load_all(other, [*TOKENS, 0], ours) == 64


def test_another_layout_and_other_tokens_miss(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS)
    flat = Layout(SMALL.layers, "bfloat16", block_tokens=16)
    assert tiers(other, TOKENS, layout=flat) == {}
    assert tiers(other, [*TOKENS[:40], *ids(7, 24)]) == {"remote": 32}
    assert tiers(other, TOKENS[:15]) == {}


def test_the_last_block_serves_a_prompt_that_ends_with_it(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS)
    match = other.match(NS, SMALL, TOKENS)
    assert match.tokens == 63 and match.tokens_by_tier["remote"] == 63
    match.release()


def test_what_is_only_elsewhere_is_known_as_long_as_somebody_holds_it(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS)
    match = found(other, TOKENS)
    assert len(other._residency.index.remote) == 4 and other.stats()["leases"] == 4
    match.release()
    assert other.stats()["leases"] == 0
    assert not other._residency.index.remote and not other._residency.index.number


def test_a_token_range_brings_only_its_blocks(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS)
    match = other.match(NS, SMALL, [*TOKENS, 0], first=32)
    assert (match.tokens, match.skipped, match.tokens_by_tier["remote"]) == (64, 32, 32)
    load = other.load(match)
    assert load.wait(len(SMALL.layers) - 1)
    load.release()
    settled(other)
    assert other.flush(PATIENCE) and recount(other) == []


def test_parts_that_went_meanwhile_are_a_miss(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS)
    match = found(other, TOKENS)
    fleet.drop_parts(key_of(one, 2))
    load = other.load(match)
    assert wrong(load, TOKENS) == [] and load.good_tokens(1) == 32
    load.release()
    settled(other)
    assert counters(other)["remote_missing_blocks"] == 1 and not other.stats()["gauges"]["remote_breaker_open"]
    assert tiers(other, TOKENS) == {"host": 32}  # the block is known to be gone, and what stands behind it unreachable
    shared(one, TOKENS)
    match = found(one, TOKENS)
    assert match.tokens == 64
    match.release()


def test_damaged_bytes_are_never_given(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS)
    fleet.damage(key_of(one, 1))
    assert load_all(other, [*TOKENS, 0]) == 16
    settled(other)
    assert counters(other)["remote_corrupt_blocks"] == 1


def test_damage_that_nobody_looks_for_is_found(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.intake.bad_pieces", lambda *arguments: iter(()))
    with pytest.raises(AssertionError, match="wrong bytes"):
        test_damaged_bytes_are_never_given(fleet)


def test_whoever_does_not_know_the_secret_misses(fleet: Fleet) -> None:
    one, same, nobody = fleet.host(key=SECRET), fleet.host(key=SECRET), fleet.host()
    shared(one, TOKENS)
    assert tiers(nobody, TOKENS) == {} and counters(nobody)["remote_refused_parts"] == 4
    assert load_all(same, [*TOKENS, 0]) == 64


def test_what_expires_is_not_found(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS, ttl=3600.0)
    match = found(other, TOKENS)
    assert match.tokens == 64
    load = other.load(match)
    assert load.wait(1)
    load.release()
    settled(other)
    later = other._residency.wall() + 4000.0
    other._residency.wall = lambda: later
    assert tiers(other, TOKENS) == {} and other.stats()["counters"]["expired_blocks"] == 4


def ask(one: LocalStore) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "owner": lambda: {"owner": "me"},
        "tenant": lambda: {"tenant": "", "owner": "me"},
        "age": lambda: {"owner": "me", "older_than": 0.0},
        "match": lambda: {"match": found(one, TOKENS)},
    }


@pytest.mark.parametrize("how", ["owner", "tenant", "age", "match"])
def test_what_is_forgotten_is_erased_there_too(fleet: Fleet, how: str) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS, owner="me")
    shared(one, ids(5, 32), owner="you")
    shared(one, ids(6, 32), namespace("else"), owner="you")
    longer = TOKENS + ids(2, 16)
    assert load_all(other, [*TOKENS, 0]) == 64
    settled(other)
    shared(other, longer, owner="me")  # a block that the first host does not know
    receipt = one.forget(**ask(one)[how]())
    assert (receipt.blocks, receipt.deferred, receipt.remote_blocks) == (4, 0, 5)
    assert len(fleet.there()) == 4
    assert tiers(one, TOKENS) == {} and tiers(fleet.host(), TOKENS) == {}
    assert tiers(one, ids(5, 32)) == {"host": 32}


def test_unfinished_parts_are_erased_whoever_they_are_of(fleet: Fleet) -> None:
    one = fleet.host()
    shared(one, TOKENS[:32], owner="me")
    remote, _ = fleet.remote()
    lost = key_of(one, 1)
    copy = Copy(lost, fleet.there()[lost], 1, 1.0)
    remote.drop([copy._replace(parts=0)], PATIENCE)  # its header only
    assert lost in fleet.there()
    one.forget(owner="me")
    assert fleet.there() == {}
    remote.close()


def test_a_block_that_was_computed_again_is_kept(fleet: Fleet) -> None:
    one, other = fleet.host(), fleet.host()
    shared(one, TOKENS)
    match = found(other, TOKENS)
    assert drafts(other, NS, SMALL, TOKENS) == {}  # all of it is stored, elsewhere
    made = dict(enumerate(other.drafts(SMALL, 4)))
    for block, draft in made.items():
        fill(draft, marks(NS, TOKENS)[block * 16 : block * 16 + 16])
    other.save(NS, SMALL, TOKENS, made)
    match.release()
    assert tiers(other, TOKENS) == {"host": 64} and load_all(other, [*TOKENS, 0]) == 64


def test_it_is_told_what_is_shared(fleet: Fleet) -> None:
    one = fleet.host(budget=MIB)
    shared(one, TOKENS)
    said = one.stats()["tiers"]["remote"]
    size = SMALL.token_payload * 64
    assert (said["blocks"], said["bytes"], said["capacity"]) == (4, size, MIB) and size < said["used"] < MIB
    shared(one, TOKENS)
    assert counters(one)["remote_written_blocks"] == 4  # none of them twice
    wait_until(lambda: one.stats()["gauges"]["remote_queued_write_bytes"] == 0)


def test_what_a_host_restarted_from_disk_uses_is_shared_again(fleet: Fleet, tmp_path: Path) -> None:
    remote, how = fleet.remote()
    with sharing(remote, how, tmp_path / "one") as one:
        shared(one, TOKENS)
    remote, _ = fleet.remote()
    remote.drop([Copy(key, parts, 1, 1.0) for key, parts in fleet.there().items()], PATIENCE)
    remote.close()
    one = fleet.host(tmp_path / "one")
    assert load_all(one, [*TOKENS, 0]) == 64  # reads it from disk
    assert load_all(one, [*TOKENS, 0]) == 64  # uses it in memory
    assert one.flush(PATIENCE) and len(fleet.there()) == 4
