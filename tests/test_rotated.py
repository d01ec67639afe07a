"""Chains of which some blocks hold keys before rotation, and others keys that are turned: every tier tells which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from blocks import found, recount
from gates import MIB, PATIENCE
from hosted import hosted
from mixed import MIXED, TOKENS, WRITERS, daemon, mix, opened, stored, told
from outside import FarHostedClient, Papers, papers
from remotes import Fleet, settled
from servers import running
from vaults import sealed

import kvstore
from kvstore.bench.remote.server import Server
from kvstore.heading import heading


def test_memory_tells_which_keys_are_rotated() -> None:
    with kvstore.open(host="8MiB") as store:
        mix(store)
        assert told(store, TOKENS) == MIXED
        assert found(store, TOKENS).writers == ("alpha/1", "beta/2")
        assert found(store, TOKENS[:32]).forms == ("pre",) and found(store, TOKENS[:32]).writers == ("alpha/1",)


def test_blocks_before_rotation_are_what_they_always_were() -> None:
    with kvstore.open(host="8MiB") as store:
        mix(store)
        match, index = found(store, TOKENS), store._residency.index
        heads = [heading(index, number, 16) for number, _ in match.blocks]
        match.release()
    assert [(head.form, head.base) for head in heads] == list(zip(MIXED, [0, 0, 32, 48, 0], strict=True))
    assert [head.writer for head in heads] == [WRITERS[form] for form in MIXED]
    with kvstore.open(host="8MiB") as other:  # keys do not depend on the form
        stored(other, TOKENS, "rotated")
        match = found(other, TOKENS)
        assert [other._residency.index.key[number] for number, _ in match.blocks] == [head.key for head in heads]
        match.release()


@pytest.mark.parametrize("rebuilt", [False, True], ids=["index", "headers"])
def test_a_restart_tells_it(tmp_path: Path, rebuilt: bool) -> None:
    with opened(tmp_path / "cache") as store:
        mix(store)
    if rebuilt:  # as when the process was killed, and the index was lost
        for path in (tmp_path / "cache" / "v1" / "index").iterdir():
            path.unlink()
    with opened(tmp_path / "cache") as store:
        match = found(store, TOKENS)
        assert match.tiers == ["disk"] * 5 and match.writers == ()  # nobody has read them yet
        match.release()
        assert told(store, TOKENS) == MIXED
        assert found(store, TOKENS).writers == ("alpha/1", "beta/2")
        assert not [problem for problem in store.verify() if problem.key] and recount(store) == []


def test_a_load_tells_who_wrote_what_it_brings_from_disk(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as store:
        mix(store)
    with opened(tmp_path / "cache") as store:
        load = store.load(found(store, TOKENS))
        assert load.wait(0, PATIENCE)
        assert load.writers == ("alpha/1", "beta/2")
        load.release()


def test_encrypted_blocks_tell_it(tmp_path: Path) -> None:
    with sealed(tmp_path) as store:
        mix(store)
    with sealed(tmp_path) as store:
        assert told(store, TOKENS) == MIXED and list(store.verify()) == []


def test_a_daemon_tells_it_also_after_it_was_started_anew(quick: Path) -> None:
    with daemon(quick / "cache") as client:
        mix(client)
        assert told(client, TOKENS) == MIXED
        assert found(client, TOKENS).writers == ("alpha/1", "beta/2")
    with daemon(quick / "cache") as client:
        assert found(client, TOKENS).writers == ()
        assert told(client, TOKENS) == MIXED
        match = found(client, TOKENS)
        assert match.writers == ("alpha/1", "beta/2")
        load = client.load(match)
        assert load.writers == ("alpha/1", "beta/2")
        load.release()


def test_a_match_that_was_cut_tells_of_what_is_left(quick: Path) -> None:
    with daemon(quick / "cache") as client:
        mix(client)
        match = found(client, TOKENS)
        match.cut(40)
        assert match.forms == ("pre",) and len(match.origins) == len(match.blocks) == 2
        load = client.load(match)
        assert [place.rotated for place in load.places(0)] == [False, False]
        load.release()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("papers"))


def test_a_daemon_on_another_machine_tells_it(quick: Path, made: Papers) -> None:
    with hosted(quick / "cache", host=8 * MIB) as there, FarHostedClient(there, made, False) as client:
        mix(client)
        assert told(client, TOKENS) == MIXED
    with hosted(quick / "cache", host=8 * MIB) as there, FarHostedClient(there, made, False) as client:
        assert told(client, TOKENS) == MIXED


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as there:
        yield there


@pytest.fixture(params=["naive", "redis"])
def fleet(request: pytest.FixtureRequest, server: Server) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(request.param, server, stack)


def test_another_host_is_told_it(fleet: Fleet, tmp_path: Path) -> None:
    one, other = fleet.host(tmp_path / "one"), fleet.host(tmp_path / "other")
    mix(one)
    assert one.flush(PATIENCE)
    match = found(other, TOKENS[:64])
    assert match.tiers == ["remote"] * 4 and match.writers == ("alpha/1", "beta/2")
    match.release()
    assert told(other, TOKENS[:64]) == MIXED[:4]
    settled(other)
    assert found(other, TOKENS[:64]).tiers == ["host"] * 4 and told(other, TOKENS[:64]) == MIXED[:4]
