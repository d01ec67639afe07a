"""Crashes, failing calls, loss of power and any order of verbs, on an encrypted disk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import NS, ids, load_all, save
from faulty_files import FaultyFiles
from hardship import calls_of_the_script
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from test_crash import CODES, fault, killed_and_reopened, survives
from test_power import powerless
from test_state_machine import Machine, owners, run, tenants, tokens_of_a_chain
from vaults import keys_of, leaks_of, secrets

import kvstore
from kvstore.local import LocalStore
from kvstore.vault import NoKey, Vault

PLAIN = kvstore.open
KILLS, POINTS, FAULTS = 15, 40, 40


def encrypted(path: Path, **options: Any) -> LocalStore:
    """Opens with keys beside the cache."""
    made: LocalStore = PLAIN(path, encryption=path.with_name(f"{path.name}-keys"), **options)
    return made


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever opens a cache has it encrypted."""
    monkeypatch.setattr(kvstore, "open", encrypted)
    yield


def test_kills_of_a_process_that_is_saving(everywhere: None, place: Path, seed: int) -> None:
    assert killed_and_reopened(place / "cache", seed, KILLS) == []
    chains = secrets(ids(0, 80)) | secrets(ids(500_000, 60))
    assert keys_of(place, "cache-keys") == [NS.digest.hex()]
    assert leaks_of(place / "cache", chains) == []


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for good"])
def test_the_nth_call_fails(everywhere: None, place: Path, forever: bool, seed: int) -> None:
    calls = calls_of_the_script(place / "all")
    for number in range(FAULTS):
        n = 1 + (number * calls + seed % calls) // FAULTS
        survives(place / f"cache{n}", fault(n, CODES[(n + seed) % 3], forever))


def test_power_is_lost(everywhere: None, place: Path, seed: int) -> None:
    calls = calls_of_the_script(place / "all")
    for number in range(POINTS):
        point = 1 + number * calls // POINTS
        assert powerless(place / f"cache{number}", seed + number, point) == [], f"call {point}, seed {seed + number}"


def test_a_key_that_is_not_durable_is_found(
    everywhere: None, place: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out: the key is written, and neither it nor its name is synced."""

    class Hasty(FaultyFiles):
        def write_small(self, path: str, data: bytes) -> None:
            handle = self.open(path, create=True)
            self.write(handle, memoryview(data), 0)
            self.close(handle)

    def lost(number: int) -> bool:
        files, folder = Hasty(), place / f"cache{number}"
        with kvstore.open(folder, host="2MiB", disk="8MiB", files=files) as store:
            assert save(store, ids(1, 40)).wait().tokens == 40
            files.fail_at, files.code = files.calls + 1, None
            files.lose_power(random.Random(seed + number))
            files.heal()
        with kvstore.open(folder, host="2MiB", disk="8MiB") as store:
            return load_all(store, [*ids(1, 40), 0]) < 40

    assert any(lost(number) for number in range(10))


class SealedMachine(Machine):
    """Keys are beside the cache, and stay when it crashes."""

    @initialize(exact=st.sampled_from([True, True, True, False]), disk=st.just(True), portable=st.booleans())
    def begin(self, exact: bool, disk: bool, portable: bool) -> None:
        super().begin(exact, disk, portable)

    def opened(self) -> LocalStore:
        host, disk = ("4MiB", "32MiB") if self.exact else ("1MiB", "6MiB")
        place, keys = self.root / f"cache{self.crashes}", self.root / "keys"
        return kvstore.open(place, host=host, disk=disk, files=self.files, encryption=keys)

    @rule(tenant=tenants, tokens=tokens_of_a_chain, owner=owners, reopened=st.booleans())
    def read_back(self, tenant: str, tokens: list[int], owner: str, reopened: bool) -> None:
        """What the other rules do in this order too seldom."""
        self.save(tenant, tokens, owner, True)
        if reopened:
            self.reopen()
        self.evict()
        self.load(tenant, tokens)


def test_the_store_is_a_dict(seed: int) -> None:
    run(seed, examples=20, steps=25, machine=SealedMachine)


@pytest.mark.parametrize("planted", ["known", "open"])
def test_a_vault_without_its_keys_is_found(planted: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(vault: Vault, asked: object) -> None:
        if planted == "open":
            raise NoKey("planted")

    monkeypatch.setattr(Vault, planted, nothing)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run(seed, examples=60, steps=20, phases=[Phase.generate], machine=SealedMachine)
