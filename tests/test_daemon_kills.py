"""The daemon is killed, stopped, started twice, told to end: clients see misses, never a wrong byte, and go on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import NS, SMALL, fill, found, ids, load_all, marks, save, wrong
from daemons import PATIENCE, Daemon, daemon, start, until
from workers import workers

import kvstore
from kvstore.daemon.client import Client
from kvstore.daemon.serve import let_go, listening
from kvstore.settings import load

BASE = 10_000  # seeds of chains that were durable before the first kill
DURABLE = 20


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """Where the daemon's socket and its directory are."""
    yield place


def started(folder: Path, *flags: object) -> Daemon:
    return start(folder, "--dir", folder / "cache", "--host", "64MiB", "--disk", "256MiB", *flags)


def put(client: Client) -> int:
    """Saves what must be there after all kills; its tokens."""
    total = 0
    for number in range(DURABLE):
        durable = save(client, ids(BASE + number, 100)).wait()
        total += durable.tokens
    return total


def kept(client: Client) -> int:
    """How much of it comes back, each byte checked."""
    return sum(load_all(client, [*ids(BASE + number, 100), 0]) for number in range(DURABLE))


def killed_under_traffic(folder: Path, seed: int, kills: int) -> dict[str, float]:
    """Kills the daemon again and again under four clients that save and load; what they saw."""
    draw, pause, url = random.Random(seed), threading.Event(), f"unix:{folder}/cache/kvstore.sock"
    running, shares = started(folder), list[float]()
    try:
        with kvstore.connect(url, timeout=PATIENCE) as client:
            total = put(client)
        with workers(4, "traffic", url, 1.0) as crowd:
            for _ in range(kills):
                pause.wait(0.1 + draw.random() * 0.5)
                running.kill()
                running = started(folder)
                with kvstore.connect(url, timeout=PATIENCE) as client:
                    shares.append(kept(client) / total)
                    assert client.verify() == []
            until(lambda: traffic_flows(url), "no client came back")
            said = [each.ask("over") for each in crowd]
    finally:
        if running.process.poll() is None:
            running.kill(signal.SIGTERM)
    assert [each["wrong"] for each in said] == [[]] * 4
    return {
        "calls": sum(each["calls"] for each in said),
        "tokens": sum(each["tokens"] for each in said),
        "late": max(each["late"] for each in said),
        "least": min(shares),
    }


def traffic_flows(url: str) -> bool:
    """Whether somebody else's loads hit."""
    with kvstore.connect(url, timeout=PATIENCE) as client:
        return bool(client.stats()["counters"].get("matched_tokens"))


def test_kills_of_the_daemon_under_four_clients(folder: Path, seed: int) -> None:
    seen = killed_under_traffic(folder, seed, 5)
    assert seen["least"] >= 0.95
    assert seen["tokens"] > 0
    assert seen["late"] < 2.0, "a call took seconds longer than it may"


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_fifty_kills_of_the_daemon_under_four_clients(folder: Path, seed: int) -> None:
    seen = killed_under_traffic(folder, seed, 50)
    print(f"50 kills, {seen['calls']} calls, {seen['tokens']} tokens checked")
    print(f"the latest call came {seen['late'] * 1000:.1f} ms behind its deadline, hits at least {seen['least']:.1%}")
    assert seen["least"] >= 0.95 and seen["late"] <= 0.05


def test_loads_under_way_when_the_daemon_is_killed_end(folder: Path) -> None:
    """What was copied before is right, what is held stays readable, and everything asked later is a miss."""
    running = started(folder)
    tokens = ids(1, 320)
    with running.connect() as client:
        save(client, tokens)
        load, match = client.load(found(client, tokens)), found(client, tokens)
        drafts = client.drafts(SMALL, 3)
        running.kill()
        assert wrong(load, tokens) == [] and load.intact()
        until(lambda: client._caller._connection is None or not client._caller._connection.usable)
        assert client.load(match).tokens == 0
        assert found(client, tokens).tokens == 0 and found(client, tokens).miss.kind == "refused"
        for draft in drafts:
            fill(draft, marks(NS, tokens)[:16])
        saved = client.save(NS, SMALL, tokens, dict(enumerate(drafts)))
        assert (saved.tokens, saved.wait().tokens) == (0, 0)
        assert client.drafts(SMALL, 1) == [] and not client.flush()
        with pytest.raises(kvstore.Unreachable, match="kvstore serve"):
            client.stats()
        load.release()
        running = started(folder)
        until(lambda: save(client, tokens).tokens == 320)
        assert load_all(client, [*tokens, 0]) == 320
        running.kill()


def test_saves_that_the_daemon_does_not_live_to_do(folder: Path) -> None:
    """A ticket that was handed out, or asked for, when all was over is answered, too."""
    running = started(folder)
    with running.connect() as client:
        connection = client._caller._connection
        assert connection is not None
        waiting = connection.ticket(1 << 30)
        running.kill()
        with pytest.raises(kvstore.Unreachable):
            waiting.wait(PATIENCE)
        connection._thread.join(PATIENCE)
        with pytest.raises(kvstore.Unreachable):
            connection.ticket(1 << 31).wait(PATIENCE)


def test_a_daemon_that_is_stopped_costs_each_call_its_deadline(folder: Path) -> None:
    running, tokens = started(folder), ids(1, 320)
    with running.connect() as client, kvstore.connect(running.url, timeout=0.2) as hasty:
        assert save(client, tokens).tokens == 320
        assert load_all(hasty, [*tokens, 0]) == 320
        running.process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        for _ in range(3):
            assert found(hasty, tokens).tokens == 0
            assert hasty.drafts(SMALL, 2) == [] and hasty.recall("x") is None
        took = time.monotonic() - begin
        running.process.send_signal(signal.SIGCONT)
        assert took < 9 * 0.2 + 2.0
        until(lambda: load_all(hasty, [*tokens, 0]) == 320, "it is not found again")
        until(lambda: not client.stats()["leases"] and not client.stats()["drafts"], "late answers are held")
    running.kill(signal.SIGTERM)


@pytest.mark.parametrize("where", ["dir", "socket"])
def test_a_second_daemon_refuses(folder: Path, where: str) -> None:
    place = folder / "cache" if where == "dir" else folder / "a.sock"
    flags: tuple[object, ...] = ("--dir" if where == "dir" else "--socket", place)
    flags += "--host", "64MiB", "--disk", "256MiB"
    with daemon(folder, *flags) as first, first.connect() as client:
        second = subprocess.run(
            [sys.executable, "-m", "kvstore.cli", "serve", *map(str, flags)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert second.returncode == 2, second.stderr
        assert "Traceback" not in second.stderr and len(second.stderr.strip().splitlines()) <= 3
        assert str(place) in second.stderr.replace("\n", "") or str(first.pid) in second.stderr
        assert client.ping() < PATIENCE, "the first one suffered"


def test_a_socket_that_a_killed_daemon_left_is_replaced(folder: Path) -> None:
    running = started(folder)
    running.kill()
    assert running.socket.is_socket()
    running = started(folder)
    with running.connect() as client:
        assert client.ping() < PATIENCE
    assert running.kill(signal.SIGTERM) == 0
    assert not running.socket.exists()
    assert f"serving {running.socket}" in running.log.read_text()
    assert [path.name for path in (folder / "cache").iterdir() if path.is_socket()] == []


def test_what_was_saved_before_the_end_is_durable(folder: Path) -> None:
    """SIGTERM right behind saves that nobody waited for."""
    running = started(folder)
    chains = [ids(number, 160) for number in range(30)]
    with running.connect() as client:
        saved = [save(client, tokens) for tokens in chains]
        assert running.kill(signal.SIGTERM) == 0
        assert all(each.tokens in (0, 160) for each in saved), "an answer is lost, or whole"
    running = started(folder)
    with running.connect() as client:
        assert [load_all(client, [*tokens, 0]) for tokens in chains] == [160] * 30
    running.kill()


def test_a_daemon_that_ends_late_leaves_the_socket_of_the_next_one(folder: Path) -> None:
    settings = load(None, {"socket": str(folder / "a.sock")})
    first, places = listening(settings)
    own = {place: place.stat().st_ino for place in places}
    first[0].close()
    second, again = listening(settings)
    let_go(own)
    assert [place.is_socket() for place in again] == [True]
    let_go({place: place.stat().st_ino for place in again})
    assert not again[0].exists()
    second[0].close()
