"""The daemon is short of descriptors, or fails inside: its clients miss, and all is well when it is over."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blocks import NS, SMALL, WIDE, found, ids, load_all, save
from daemons import PATIENCE, Daemon, daemon, until
from hosted import HostedClient, hosted
from processes import descriptors, idle

import kvstore
from kvstore.local import LocalStore

TOKENS = ids(1, 320)


@pytest.fixture
def here(place: Any) -> Iterator[Daemon]:
    with daemon(place, "--dir", place / "cache", "--host", "64MiB", "--disk", "256MiB") as started:
        yield started


def spare(pid: int, more: int | None) -> None:
    """Leaves a process so many descriptors beyond those it has; None: as many as before."""
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    free = [number for number in range(max(taken) + 10) if number not in taken]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most if more is None else free[more], most))


def test_a_daemon_without_descriptors_serves_whom_it_has(here: Daemon) -> None:
    idle(here.pid)
    with here.connect() as client, kvstore.connect(here.url, timeout=1.0) as other:
        assert save(client, TOKENS).wait().tokens == 320
        assert load_all(client, [*TOKENS, 0]) == 320 and other.ping() < PATIENCE
        before = descriptors(here.pid)
        for more in range(4):  # each leaves another of those that a client needs
            spare(here.pid, more)
            with pytest.raises(kvstore.Unreachable):
                kvstore.connect(here.url, timeout=0.3)
            assert load_all(client, [*TOKENS, 0]) == 320
        spare(here.pid, 0)
        match = found(other, TOKENS)  # its first: it needs the arena
        assert match.tokens == 320 and other.load(match).tokens == 0
        assert (other.drafts(WIDE, 1), save(other, ids(2, 16)).tokens) == ([], 0)
        spare(here.pid, None)
        until(lambda: load_all(other, [*TOKENS, 0]) == 320, "it misses for ever")
        assert save(other, ids(2, 16)).tokens == 16
        here.connect().close()
        until(lambda: client.stats()["leases"] == 0 == client.stats()["drafts"], "something is held for ever")
    here.connect().close()
    until(lambda: descriptors(here.pid)["socket"] <= before["socket"] - 4, "connections are left open")
    assert here.log.read_text().count("could not be taken") < 50, "it looks for connections all the while"
    assert "Traceback" not in here.log.read_text()


def raises(*arguments: object, **options: object) -> Any:
    raise RuntimeError("the test said so")


CALLS: dict[str, tuple[str, Callable[[HostedClient], object], object]] = {
    "match": ("match", lambda client: found(client, TOKENS).tokens, 0),
    "load": ("load", lambda client: client.load(found(client, TOKENS)).tokens, 0),
    "save": ("save", lambda client: save(client, ids(2, 16)).tokens, 0),
    "recall": ("recall", lambda client: client.recall("x"), None),
    "remember": ("remember", lambda client: client.remember("x", "y"), None),
    "flush": ("flush", lambda client: client.flush(), False),
    "pin": ("pin", lambda client: client.pin(found(client, TOKENS), seconds=1).tokens, 0),
    "retain": ("retain", lambda client: client.retain(found(client, TOKENS), 1).tokens, 0),
    "demote": ("demote", lambda client: client.demote(found(client, TOKENS)).bytes, 0),
    "expect": ("expect", lambda client: client.expect(SMALL), None),
    "schedule": (
        "schedule",
        lambda client: client.schedule([kvstore.Job("a", namespace=NS, layout=SMALL, token_ids=TOKENS)])[0].state,
        "unknown",
    ),
    "discover": ("discover", lambda client: len(client.discover(NS, SMALL, TOKENS, 32).parts), 1),
    "prospect": ("prospect", lambda client: list(client.prospect([found(client, TOKENS)]).rows[0]), []),
}
SAYS = {"stats": "stats", "verify": "verify", "segments": "segments", "forget": "forget"}


@pytest.mark.parametrize("name", CALLS)
def test_a_daemon_that_fails_inside_is_a_miss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verb, call, instead = CALLS[name]
    with hosted() as here, here.connect() as client:
        assert save(client, TOKENS).tokens == 320
        with monkeypatch.context() as patched:
            patched.setattr(LocalStore, verb, raises)
            assert call(client) == instead
        assert load_all(client, [*TOKENS, 0]) == 320
        assert client.stats()["leases"] == 0 == client.stats()["drafts"]


@pytest.mark.parametrize("name", SAYS)
def test_what_has_no_other_answer_says_that_the_daemon_failed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosted() as here, here.connect() as client:
        monkeypatch.setattr(LocalStore, SAYS[name], raises)
        arguments = {"owner": "x"} if name == "forget" else {}
        with pytest.raises(kvstore.Unreachable, match="log"):
            getattr(client, name)(**arguments)
        monkeypatch.undo()
        assert client.ping() < PATIENCE
