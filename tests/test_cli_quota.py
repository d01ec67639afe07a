"""Budgets of tenants: who sees and changes them, and what happens to what is over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from blocks import found, ids, load_all, save
from commands import Command, command
from daemons import TIMEOUT, Daemon, daemon, until

from kvstore import BadInput
from kvstore.daemon.operator import Operator

__all__ = ["command"]  # a fixture
MIB = 1 << 20
TOKEN = "the text of a token"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a tenant of a name, which is known by its token, beside everybody else."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "token").touch(0o600)
    (folder / "token").write_text(TOKEN)
    config = f'host = "48MiB"\ndisk = "256MiB"\n[tenants.acme]\ntoken_file = "{folder}/token"\nhost = "16MiB"\n'
    (folder / "kvstore.toml").write_text(config)
    with daemon(folder, "--config", folder / "kvstore.toml", "--dir", folder / "cache", "--host", "48MiB") as one:
        yield one


@pytest.fixture
def acme(serving: Daemon) -> Iterator[Operator]:
    with Operator(serving.socket, TIMEOUT, TOKEN) as one:
        yield one


def told(command: Command, *words: object) -> list[dict[str, Any]]:
    said = command("quota", *words, "--json")
    assert said.code == 0, said.err
    quotas: list[dict[str, Any]] = json.loads(said.out)
    return quotas


def test_who_runs_the_daemon_sees_all_and_a_tenant_itself(command: Command, serving: Daemon, acme: Operator) -> None:
    quotas = told(command, serving.url)
    assert [(one["tenant"], one["host"]["capacity"] // MIB) for one in quotas] == [("", 24), ("acme", 12)]
    assert [one["staging"]["capacity"] // MIB for one in quotas] == [8, 4]
    assert [one["sessions"] for one in quotas] == [1, 1]
    assert [one["tenant"] for one in told(command, serving.url, "acme")] == ["acme"]
    shown = command("quota", serving.url).out
    assert "acme" in shown and "24.0 MiB" in shown and "(everybody else)" in shown
    assert [one["tenant"] for one in acme.quotas()] == ["acme"]
    about = acme.about()
    assert (about.tenant, about.operator, about.settings) == ("acme", False, {})
    assert [one["own"] for one in about.sessions] == [True]


@pytest.mark.parametrize("name", ["acme", "", "nobody"])
def test_nobody_else_changes_budgets(acme: Operator, name: str) -> None:
    """Nor learns from the answer which tenants there are."""
    with pytest.raises(BadInput, match="only the daemon's own user"):
        acme.resize(name, 32 * MIB, 1.0)


def test_a_smaller_budget_holds_at_once_but_for_what_is_leased(
    command: Command, serving: Daemon, acme: Operator
) -> None:
    chains = [ids(seed, 64) for seed in range(250)]  # of four blocks of 12 KiB each
    for chain in chains:
        save(acme, chain).wait()
    assert acme.quotas()[0]["host"]["used"] > 11 * MIB
    (quota,) = told(command, serving.url, "acme", "--host", "8MiB")
    assert quota["host"]["used"] <= quota["host"]["capacity"] == 6 * MIB and quota["staging"]["capacity"] == 2 * MIB
    held = [acme.load(found(acme, chain)) for chain in chains[-40::4]]
    said = command("quota", serving.url, "acme", "--host", "2MiB", "--wait", "0")
    assert said.code == 0 and "goes when they end" in said.err
    for load in held:
        assert load.good_tokens() == 64
        load.release()
    until(lambda: acme.quotas()[0]["host"]["used"] <= 1.5 * MIB)
    assert all(load_all(acme, [*chain, 0]) == 64 for chain in chains[::50]), "it is on disk still"
    (quota,) = told(command, serving.url, "acme", "--host", "16MiB")
    assert quota["host"]["capacity"] == 12 * MIB
    assert told(command, serving.url, "")[0]["host"]["capacity"] == 24 * MIB, "others have what they had"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("acme", "--host", "many"), "is not a size"),
        (("acme", "--host", "1000TiB"), "bytes of memory here"),
        (("acme", "--host", "1MiB"), "are too few"),
        (("nobody", "--host", "8MiB"), "there is no tenant 'nobody'"),
    ],
)
def test_what_cannot_be(command: Command, serving: Daemon, words: tuple[str, ...], sentence: str) -> None:
    said = command("quota", serving.url, *words)
    assert said.code == 2 and sentence in said.err and len(said.err.splitlines()) == 1
    assert [one["host"]["capacity"] // MIB for one in told(command, serving.url)] == [24, 12]
