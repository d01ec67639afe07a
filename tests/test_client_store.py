"""A client keeps what a store promises: the stores' own tests, with a daemon between."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import test_discovery
import test_keeping
import test_keeping_verbs
import test_shards
import test_store
from blocks import NS, SMALL, fill, found, ids, load_all, marks, recount, save, wrong
from gates import MIB
from hosted import HostedClient, hosted

from kvstore.local import LocalStore

# A client returns from a save before the daemon looks at its clock, and its drafts are no part of the store's memory.
OTHERS = {
    "test_a_chain_lives_for_its_ttl",
    "test_with_half_pinned_and_the_rest_leased_saves_are_short_and_nothing_fails",
}
ALIKE = [
    test
    for module in (test_store, test_shards, test_discovery, test_keeping, test_keeping_verbs)
    for name, test in vars(module).items()
    if name.startswith("test_") and "store" in inspect.signature(test).parameters and name not in OTHERS
]


@pytest.fixture
def store(request: pytest.FixtureRequest, quick: Path) -> Iterator[HostedClient]:
    """A client of a daemon with a disk, whose accounts must be right at the end."""
    host = MIB if request.function.__module__.startswith("test_keeping") else 8 * MIB
    with hosted(quick / "cache", host=host, disk=64 * MIB) as daemon, daemon.connect() as client:
        yield client
        if not client._closed:
            client.flush()
            assert recount(cast(LocalStore, client)) == []


for each in ALIKE:
    globals()[each.__name__] = each


def test_a_match_that_was_cut_loads_what_is_left(store: HostedClient) -> None:
    tokens = ids(1, 70)
    save(store, tokens)
    match = found(store, tokens)
    match.cut(40)
    load = store.load(match)
    assert (match.tokens, load.tokens, len(load.pieces(0))) == (32, 32, 2)
    assert wrong(load, tokens) == [] and store.flush() and store.stats()["leases"] == 2
    load.release()


def test_a_chain_lives_as_long_as_its_last_save_says(store: HostedClient) -> None:
    now = [1000.0]
    store._residency.wall = lambda: now[0]
    tokens = ids(1, 40)
    assert save(store, tokens, ttl=10).tokens == 40
    now[0] = 1009.9
    assert save(store, tokens, ttl=10).tokens == 40
    now[0] = 1019.8
    assert found(store, tokens).tokens == 40
    now[0] = 1019.9
    assert found(store, tokens).tokens == 0


def test_when_memory_is_short_a_save_is_shorter(quick: Path) -> None:
    with hosted(host=4 * MIB) as daemon, daemon.connect() as client:
        held = []
        for number in range(100):
            save(client, ids(number, 128))
            held.append(found(client, ids(number, 128)))
        tokens = ids(1000, 128)
        assert save(client, tokens).tokens < 128
        held.clear()
        client.settle()
        assert save(client, tokens).tokens == 128 and load_all(client, [*tokens, 0]) == 128
        assert "failed_jobs" not in client.stats()["counters"]


def test_what_is_written_last_is_what_is_saved(store: HostedClient) -> None:
    """Whether a draft is filled in one go, which the daemon hears of, or written piece by piece, before or after."""
    tokens = ids(1, 64)
    every = marks(NS, tokens)
    wanted = [bytearray(SMALL.payload_bytes(16)) for _ in range(4)]
    for block, draft in enumerate(store.drafts(SMALL, 4)):
        fill(draft, every[block * 16 : block * 16 + 16])
        wanted[block][:] = draft.payload
        draft.discard()
    junk = memoryview(bytearray(b"j" * SMALL.payload_bytes(16)))
    made = store.drafts(SMALL, 4)
    assert len(made) == 4
    early = made[0].payload
    made[0].fill(junk)
    early[:] = wanted[0]
    made[1].fill(junk)
    made[1].payload[:] = wanted[1]
    made[2].fill(junk)
    made[2].fill(memoryview(wanted[2]))
    made[3].fill(memoryview(wanted[3]))
    assert store.save(NS, SMALL, tokens, dict(enumerate(made))).tokens == 64
    assert load_all(store, [*tokens, 0]) == 64
