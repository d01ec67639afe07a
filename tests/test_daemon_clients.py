"""Clients are killed, stopped and gone on with: what they held is let go, and they never read another block's bytes."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
from blocks import NS, SMALL, WIDE, fill, found, ids, load_all, marks, save
from daemons import Daemon, daemon, until
from processes import MIB, descriptors, idle, mappings, memory, named
from workers import workers

from kvstore.daemon.client import Client

TTL = 0.5
OF_CLIENTS = ("/memfd:kvstore-session", "/memfd:kvstore-staging", "socket", "anon_inode:[eventfd]")
FRESH = itertools.count(10_000)  # seeds of chains


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with little memory, that waits for silent clients only so long."""
    place = tmp_path_factory.mktemp("clients")
    flags = "--dir", place / "cache", "--disk", "256MiB", "--host", "24MiB", "--staging", "8MiB"
    with daemon(place, *flags, "--lease-ttl", f"{TTL * 1000:.0f}ms") as started:
        yield started


@pytest.fixture
def client(here: Daemon) -> Iterator[Client]:
    with here.connect() as client:
        yield client


def held(client: Client) -> tuple[int, int]:
    """Blocks under leases and drafts, of all clients."""
    stats = client.stats()
    return stats["leases"], stats["drafts"]


def holds(client: Client, leases: int, drafts: int) -> bool:
    """Whether so much is held."""
    return held(client) == (leases, drafts)


def flood(client: Client, chains: int = 60) -> None:
    """Saves so much that nobody has saved before that every slot that may be has been used anew."""
    for _ in range(chains):
        tokens = ids(next(FRESH), 16 * 32)
        made = dict(enumerate(client.drafts(SMALL, 32)))
        every = marks(NS, tokens)
        for block, draft in made.items():
            fill(draft, every[block * 16 : block * 16 + 16])
        if client.save(NS, SMALL, tokens, made).tokens < len(made) * 16:  # all that is in memory waits for the disk
            client.flush()


def killed_while_holding(here: Daemon, client: Client, kills: int) -> float:
    """The longest time that something was held for a client that was killed."""
    longest = 0.0
    for number in range(kills):
        save(client, ids(number, 400)).wait()
    with workers(kills, "holder", here.url) as some:
        for each in some:
            each.tell("hold")
        assert [each.answer() for each in some] == [[400, 12]] * kills
        for left in range(kills, 0, -1):
            assert held(client) == (25 * left, 12 * left)
            begin, rest = time.monotonic(), (25 * (left - 1), 12 * (left - 1))
            some[left - 1].process.kill()
            until(partial(holds, client, *rest), "something is held for ever")
            longest = max(longest, time.monotonic() - begin)
    assert load_all(client, [*ids(0, 400), 0]) == 400
    return longest


def test_clients_that_are_killed_hold_nothing(here: Daemon, client: Client) -> None:
    """Leases, and drafts that are half written; and what was half written is nothing."""
    killed_while_holding(here, client, 5)
    assert load_all(client, ids(1000, 100)) == 0
    assert client.stats()["counters"].get("failed_jobs", 0) == 0


@pytest.mark.soak
def test_fifty_clients_that_are_killed_hold_nothing(here: Daemon, client: Client) -> None:
    longest = max(killed_while_holding(here, client, 5) for _ in range(10))
    print(f"50 kills: nothing was held longer than {longest * 1000:.1f} ms")
    assert longest <= 0.1


def stopped_in_the_middle(here: Daemon, client: Client, *words: object) -> tuple[dict[str, int], int, float]:
    """A reader is stopped between two copies, and goes on when its slots hold other blocks: what the second copy says,
    what it reads when it asks once more, and how long the daemon kept its leases."""
    for number in range(5):
        save(client, ids(number, 16 * 32)).wait()
    with workers(1, "reader", here.url, 5.0, *words) as (reader,):
        assert reader.ask("load") == 512
        assert reader.ask("copy") == {
            "intact": True,
            "copied": 32 * SMALL.payload_bytes(16),
            "good": 512,
            "waited": True,
            "wrong": 0,
            "intact then": True,
        }
        begin = time.monotonic()
        reader.signal(signal.SIGSTOP)
        until(lambda: held(client) == (0, 0), "a client that is stopped is waited for")
        took = time.monotonic() - begin
        client.demote(found(client, ids(0, 512)))
        flood(client)
        reader.signal(signal.SIGCONT)
        return reader.ask("copy"), reader.ask("again"), took


def test_a_client_that_was_stopped_in_the_middle_of_a_copy_reads_a_miss(here: Daemon, client: Client) -> None:
    second, again, _ = stopped_in_the_middle(here, client)
    assert second["wrong"] > 0, "its slots were not used again: this test shows nothing"
    assert {**second, "wrong": 0} == {
        "intact": False,
        "copied": 0,
        "good": 0,
        "waited": False,
        "wrong": 0,
        "intact then": False,
    }
    assert again == 512, "it does not find its way back"


def test_a_client_that_does_not_look_whether_it_is_alive_reads_other_bytes(here: Daemon, client: Client) -> None:
    """The negative control of the test above."""
    second, _, _ = stopped_in_the_middle(here, client, 1)
    assert second["intact then"] and second["copied"] > 0 and second["wrong"] > 0


@pytest.mark.soak
def test_a_client_that_is_stopped_holds_nothing_after_twice_its_time(here: Daemon, client: Client) -> None:
    took = max(stopped_in_the_middle(here, client)[2] for _ in range(10))
    print(f"leases of stopped clients ended after {took / TTL:.2f} TTL at the latest")
    assert took <= 2 * TTL


def stopped_again_and_again(here: Daemon, client: Client, times: int, *words: object) -> list[int]:
    """Stops clients that copy all the while, at any moment: what they copied, missed, and got wrong."""
    with workers(2, "copier", here.url, 5.0, *words) as some:
        pause = threading.Event()
        for each in some:
            each.ask("go")
        for _ in range(times):
            for each in some:
                pause.wait(0.05)
                each.signal(signal.SIGSTOP)
            begin = time.monotonic()
            while time.monotonic() - begin < 1.5 * TTL:
                for seed in range(2):
                    client.demote(found(client, ids(seed, WIDE.block_tokens * 24), layout=WIDE))
                flood(client, 5)
            for each in some:
                each.signal(signal.SIGCONT)
        said = [each.ask("over") for each in some]
    return [sum(each) for each in zip(*said, strict=True)]


def test_clients_that_are_stopped_at_any_moment_copy_what_was_saved_or_nothing(here: Daemon, client: Client) -> None:
    copied, missed, wrong = stopped_again_and_again(here, client, 3)
    assert copied > 0 and missed > 0 and wrong == 0


@pytest.mark.soak
def test_clients_that_are_stopped_at_any_moment_for_long(here: Daemon, client: Client) -> None:
    copied, missed, wrong = stopped_again_and_again(here, client, 100)
    print(f"{copied} copies, {missed} misses, {wrong} wrong")
    assert copied > 0 and missed > 0 and wrong == 0
    tries = (stopped_again_and_again(here, client, 5, 1)[2] for _ in range(20))
    assert any(tries), "no stop came in the middle of a copy"


def footprint(pid: int) -> Counter[str]:
    """What a process has open and mapped for, or as, a client. Blocks of the daemon's have a budget of their own."""
    found = descriptors(pid) + mappings(pid)
    names = OF_CLIENTS + (("/memfd:kvstore",) if pid == os.getpid() else ())
    return Counter({name: count for name, count in found.items() if name.startswith(names)})


def test_nothing_is_left_open_or_mapped_by_clients_that_come_and_go(here: Daemon) -> None:
    def cycle(number: int) -> None:
        with here.connect() as client:
            tokens = ids(number % 3, 200)
            save(client, tokens).wait()
            assert load_all(client, [*tokens, 0]) == 200
            keep = [found(client, tokens), client.load(found(client, tokens)), client.drafts(SMALL, 3)]
            assert keep

    def settled() -> bool:
        gc.collect()
        return not (footprint(here.pid) - before[0] or footprint(os.getpid()) - before[1])

    for number in range(8):
        cycle(number)
    until(lambda: not descriptors(here.pid)["/memfd:kvstore-session"])
    idle(here.pid)
    gc.collect()
    before = footprint(here.pid), footprint(os.getpid())
    grown = memory(here.pid)
    for number in range(20):
        cycle(number)
    with workers(3, "holder", here.url) as some:
        for each in some:
            each.ask("hold")
            each.process.kill()
    until(settled, f"more is open than before: {before}")
    assert named(here.pid, here.socket.parent) == named(os.getpid(), here.socket.parent) == set()
    assert memory(here.pid) - grown <= 16 * MIB
