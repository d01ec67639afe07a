"""The state machine of stores, with a daemon between: a client is the same dict."""

from __future__ import annotations

from typing import cast

import pytest
from gates import MIB
from hosted import Hosted, tenant
from hypothesis import Phase
from test_state_machine import Machine, run

from kvstore.daemon.session import Session
from kvstore.local import LocalStore


class ClientMachine(Machine):
    """Every store is a client's, whose daemon ends with it."""

    def opened(self) -> LocalStore:
        host, disk = (4 * MIB, 32 * MIB) if self.exact else (MIB, 6 * MIB)
        path = self.root / f"cache{self.crashes}" if self.disk else None
        daemon = Hosted({"": tenant("", path, host, disk, files=self.files)}, lambda peer, token: "")
        return cast(LocalStore, daemon.connect(owns=True))


def test_a_client_is_a_dict(seed: int) -> None:
    run(seed, examples=25, steps=25, machine=ClientMachine)


@pytest.mark.soak
def test_a_client_is_a_dict_for_long(seed: int) -> None:
    run(seed, examples=2000, steps=100, machine=ClientMachine)


def _nothing(session: Session, number: int, start: int) -> None:
    return None


def test_leases_that_are_never_let_go_are_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "release", _nothing)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run(seed, examples=20, steps=20, phases=[Phase.generate], machine=ClientMachine)
