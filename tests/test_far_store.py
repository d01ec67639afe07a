"""A client from another machine keeps what a store promises: the stores' own tests, and their state machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from blocks import recount
from gates import MIB
from hosted import Hosted, hosted, tenant
from outside import FarHostedClient, Papers, papers
from test_client_store import ALIKE
from test_state_machine import Machine, run

from kvstore.local import LocalStore

MADE: list[Papers] = []


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Papers]:
    """For machines, too, which have no fixtures."""
    MADE.append(papers(tmp_path_factory.mktemp("papers")))
    yield MADE[0]
    MADE.clear()


@pytest.fixture
def store(request: pytest.FixtureRequest, quick: Path, made: Papers) -> Iterator[FarHostedClient]:
    """A client of a daemon with a disk, whose accounts must be right at the end."""
    host = MIB if request.function.__module__.startswith("test_keeping") else 8 * MIB
    with hosted(quick / "cache", host=host, disk=64 * MIB) as daemon, FarHostedClient(daemon, made, False) as client:
        yield client
        if not client._closed:
            client.flush()
            assert recount(cast(LocalStore, client)) == []


for each in ALIKE:
    globals()[each.__name__] = each


class FarMachine(Machine):
    """Every store is a client's from outside, whose daemon ends with it."""

    def opened(self) -> LocalStore:
        host, disk = (4 * MIB, 32 * MIB) if self.exact else (MIB, 6 * MIB)
        path = self.root / f"cache{self.crashes}" if self.disk else None
        daemon = Hosted({"": tenant("", path, host, disk, files=self.files)}, lambda peer, token: "")
        return cast(LocalStore, FarHostedClient(daemon, MADE[0], True))


def test_a_client_from_outside_is_a_dict(seed: int) -> None:
    run(seed, examples=10, steps=25, machine=FarMachine)


@pytest.mark.soak
def test_a_client_from_outside_is_a_dict_for_long(seed: int) -> None:
    run(seed, examples=1000, steps=100, machine=FarMachine)
