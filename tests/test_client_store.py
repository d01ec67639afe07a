"""A client keeps what a store promises: the stores' own tests, with a daemon between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import test_store
from blocks import found, ids, recount, save, wrong
from hosted import HostedClient, hosted

from kvstore.local import LocalStore

# A client returns from a save before the daemon looks at its clock.
TIMED = {"test_a_chain_lives_for_its_ttl"}
ALIKE = [test for name, test in vars(test_store).items() if name.startswith("test_") and name not in TIMED]


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HostedClient]:
    """A client of a daemon in memory, and of one with a disk; the daemon's accounts must be right at the end."""
    path = tmp_path / "cache" if request.param == "disk" else None
    with hosted(path, host=8 << 20, disk=64 << 20) as daemon, daemon.connect() as client:
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
