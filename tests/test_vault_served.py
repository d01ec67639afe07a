"""Encryption where others open the store: commands, and a daemon with several tenants."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import NS, ids, namespace, save
from commands import Command, command
from vaults import keys_of, leaks_of, sealed, secrets

from kvstore import settings
from kvstore.daemon.serve import tenants_of

OTHER = namespace("other")
__all__ = ["command"]  # a fixture


@pytest.mark.parametrize("verb", [("verify", "{}"), ("ls", "{}"), ("forget", "{}", "--tenant", "other", "--yes")])
def test_commands_take_the_key_folder(
    command: Command, tmp_path: Path, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with sealed(tmp_path) as store:
        save(store, ids(1, 40)).wait()
        save(store, ids(2, 40), OTHER).wait()
    words = [word.format(tmp_path / "cache") for word in verb]
    without = command(*words)
    assert without.code == (0 if verb[0] == "verify" else 2)
    assert "6 of them are encrypted" in without.out or "holds 6 encrypted blocks" in without.err
    monkeypatch.setenv("KVSTORE_ENCRYPTION__KEY_DIR", str(tmp_path / "keys"))
    said = command(*words)
    assert said.code == 0 and "encrypted" not in said.out
    assert len(keys_of(tmp_path)) == (1 if verb[0] == "forget" else 2)


def test_each_tenant_of_a_daemon_has_a_key_folder_of_its_own(tmp_path: Path) -> None:
    said = {"dir": "cache", "encryption.key_dir": "keys", "host": "32MiB", "disk": "64MiB", "tenants.ann.uids": "4242"}
    said |= {name: str(tmp_path / said[name]) for name in ("dir", "encryption.key_dir")}
    tenants = tenants_of(settings.load(None, said))
    try:
        for tenant in tenants.values():
            assert save(tenant.store, ids(1, 40)).wait().tokens == 40
        assert keys_of(tmp_path) == keys_of(tmp_path, "keys/tenants/ann") == [NS.digest.hex()]
        one, two = (tmp_path / folder / NS.digest.hex() for folder in ("keys", "keys/tenants/ann"))
        assert one.read_bytes() != two.read_bytes()
        tenants[""].store.forget(tenant="")
        assert keys_of(tmp_path) == [] and keys_of(tmp_path, "keys/tenants/ann")
        assert leaks_of(tmp_path / "cache", secrets(ids(1, 40))) == []
    finally:
        for tenant in tenants.values():
            tenant.store.close()
            tenant.arenas.close()
