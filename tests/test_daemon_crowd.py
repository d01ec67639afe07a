"""Many at once: on one block that is only on disk, and across forks."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from blocks import NS, SMALL, found, ids, load_all, save, wrong
from daemons import PATIENCE, daemon, start
from hosted import hosted
from workers import workers

import kvstore
from kvstore.daemon.client import Client

FLAGS = "--host", "64MiB", "--disk", "256MiB"


def test_sixty_four_threads_of_four_processes_on_one_cold_block_read_it_once(place: Path) -> None:
    running = start(place, "--dir", place / "cache", *FLAGS)
    with running.connect() as client:
        save(client, ids(1, 16)).wait()
    running.kill()
    with daemon(place, "--dir", place / "cache", *FLAGS) as started, started.connect() as client:
        with workers(4, "crowd", started.url, PATIENCE) as crowd:
            assert client.stats()["counters"].get("disk_read_bytes", 0) == 0
            for each in crowd:
                each.tell("go")
            assert [each.answer() for each in crowd] == [[16] * 16] * 4
        assert client.stats()["counters"]["disk_read_bytes"] == SMALL.slot_bytes(16)
        assert client.stats()["tiers"]["host"]["blocks"] == 1


def test_threads_of_one_client_do_not_mix_their_answers(tmp_path: Path) -> None:
    with hosted(tmp_path / "cache") as here, here.connect() as client:
        chains = [ids(number, 16 + 5 * number) for number in range(16)]
        faults: list[str] = []

        def work(tokens: list[int]) -> None:
            for _ in range(20):
                save(client, tokens)
                with_more = client.load(found(client, tokens))
                if with_more.tokens != len(tokens) or wrong(with_more, tokens):
                    faults.append(f"{with_more.tokens} of {len(tokens)}")
                with_more.release()

        run([partial(work, tokens) for tokens in chains])
        assert faults == []


def run(calls: list[Callable[[], object]]) -> None:
    """Calls all at once."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- forks -------------------------------------------------------------------------------------------------------------


def child_says(client: Client) -> str:
    """What goes wrong in the child of a fork."""
    tokens = ids(1, 320)
    calls: dict[str, Callable[[], object]] = {
        "match": lambda: found(client, tokens),
        "drafts": lambda: client.drafts(SMALL, 1),
        "draft": lambda: client.draft(SMALL),
        "save": lambda: client.save(NS, SMALL, tokens, {}),
        "stats": client.stats,
        "ping": client.ping,
        "schedule": lambda: client.schedule([]),
        "expect": lambda: client.expect(SMALL),
        "worker": client.worker,
        "recall": lambda: client.recall("x"),
        "remember": lambda: client.remember("x", "y"),
        "flush": client.flush,
        "forget": lambda: client.forget(owner="x"),
        "saved": lambda: client.saved(1.0),
        "verify": client.verify,
        "segments": client.segments,
        "discover": lambda: client.discover(NS, SMALL, tokens, 32),
    }
    for name, call in calls.items():
        try:
            call()
        except kvstore.ForkError as error:
            if "fork" not in str(error):
                return f"{name}: {error}"
        else:
            return f"{name} raised nothing"
    client.close()
    return ""


def forked(client: Client, url: str, held: list[object]) -> int:
    """Forks; the child tries the client, drops all it has of it, and connects anew. Its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: that is what is tried
        pid = os.fork()
    if pid:
        return ended(pid)
    code = 1
    try:
        said = child_says(client)
        if said:
            os.write(2, said.encode())
        else:
            held.clear()
            del client
            gc.collect()
            with kvstore.connect(url, timeout=PATIENCE) as own:
                code = 0 if load_all(own, [*ids(1, 320), 0]) == 320 else 2
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Waits for a child, which must not hang."""
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        pause.wait(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def forks_under_load(folder: Path, count: int) -> None:
    with daemon(folder, "--dir", folder / "cache", *FLAGS) as started, started.connect() as client:
        tokens = ids(1, 320)
        save(client, tokens).wait()
        session = client._caller._connection
        held: list[object] = [found(client, tokens), client.load(found(client, tokens)), client.drafts(SMALL, 3)]
        over, faults = threading.Event(), list[str]()

        def load() -> None:
            while not over.is_set():
                good = load_all(client, [*tokens, 0])
                if good != 320:
                    faults.append(f"{good} tokens")

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            assert [forked(client, started.url, held) for _ in range(count)] == [0] * count
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert faults == [] and client._caller._connection is session, "the parent was hurt"
        load_held = held[1]
        assert isinstance(load_held, kvstore.load.Load) and load_held.intact() and wrong(load_held, tokens) == []
        assert (client.stats()["leases"], client.stats()["drafts"]) == (20, 3)


def test_the_child_of_a_fork_is_told_and_the_parent_goes_on(tmp_path: Path) -> None:
    forks_under_load(tmp_path, 10)


@pytest.mark.soak
def test_a_hundred_forks_under_load(tmp_path: Path) -> None:
    forks_under_load(tmp_path, 100)
