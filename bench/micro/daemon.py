"""A store that a daemon holds: loads and saves beside memcpy with as many threads, calls, and many clients at once."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvstore
from kvstore.bench.micro.host import LAYOUTS, NAMESPACE, TOTAL, load_chain, prompt, save_chain
from kvstore.bench.micro.limits import Timing, compare, copy, memory

CALLS = 1000
CLIENTS, EACH = 16, 128 << 20  # clients at once, and payload bytes of each
PATIENCE = 30.0  # seconds that a daemon may take to begin
TIMEOUT = 30.0  # of a call


@contextmanager
def daemon(folder: Path, host: str, staging: str = "40%") -> Iterator[tuple[str, int]]:
    """A daemon in memory of its own; where it listens, and its process."""
    place = folder / "micro.sock"
    command = [sys.executable, "-m", "kvstore.cli", "serve", "--socket", str(place), "--host", host]
    process = subprocess.Popen([*command, "--staging", staging])
    try:
        deadline, pause = time.monotonic() + PATIENCE, threading.Event()
        while not place.exists() and process.poll() is None and time.monotonic() < deadline:
            pause.wait(0.01)
        yield f"unix:{place}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def measure(size: str, folder: Path, repeats: int) -> dict[str, Timing]:
    """``daemon_load``, without and with checksums, and ``daemon_save``, which the daemon always takes checksums of."""
    layout = LAYOUTS[size]
    block = layout.payload_bytes(layout.block_tokens)
    blocks = TOTAL // block
    total, tokens = blocks * block, blocks * layout.block_tokens
    source, target = memory(total), memory(total)
    result = {}
    with daemon(folder, f"{12 * TOTAL}") as (url, _), kvstore.connect(url, timeout=TIMEOUT) as store:
        chain = prompt(0, tokens)

        def limit() -> None:
            copy(target, source, block)

        def save(ids: array[int]) -> None:
            saved = save_chain(store, layout, ids, source)
            assert saved.new_tokens == tokens, "the host tier is too small for the benchmark"

        for seed in range(6):  # pages that were never touched are not what is measured
            save(prompt(seed, tokens))
        for name, check in (("daemon_load", False), ("daemon_load_checked", True)):
            result[name] = compare(limit, lambda c=check: load_chain(store, layout, chain, target, c), repeats)  # type: ignore[misc]
        assert target == source, "the bytes that came back are not those that were saved"
        fresh = [chain]

        def new_prompt() -> None:
            fresh[0] = prompt(random.randrange(1 << 60), tokens)

        result["daemon_save"] = compare(limit, lambda: save(fresh[0]), repeats, prepare=new_prompt)
    return result


def calls(folder: Path) -> dict[str, Any]:
    """Medians of a ping, and of a match of 32k tokens that are stored; the daemon's memory beside arenas and index."""
    layout = LAYOUTS["2"]
    with daemon(folder, "1GiB") as (url, pid), kvstore.connect(url, timeout=TIMEOUT) as store:
        size = layout.payload_bytes(layout.block_tokens)
        ids = prompt(0, 32768)
        count = len(ids) // layout.block_tokens
        save_chain(store, layout, ids, memory(count * size)).wait()
        pings, matches = [], []
        for _ in range(CALLS):
            begin = time.perf_counter()
            store.ping()
            pings.append(time.perf_counter() - begin)
        for _ in range(CALLS // 4):
            begin = time.perf_counter()
            match = store.match(NAMESPACE, layout, ids)
            matches.append(time.perf_counter() - begin)
            assert match.tokens == len(ids) - 1
            match.release()
        return {
            "ping_seconds": statistics.median(pings),
            "match_32k_daemon_seconds": statistics.median(matches),
            "daemon_own_bytes": own_bytes(pid),
        }


def own_bytes(pid: int) -> int:
    """Memory of a process that is not shared: beside arenas."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 + int(status.split("RssFile:")[1].split()[0]) * 1024


def many(size: str, folder: Path, repeats: int) -> Timing:
    """Loads by ``CLIENTS`` processes at once, beside as many processes that copy as much."""
    with daemon(folder, f"{3 * CLIENTS * EACH}") as (url, _):
        workers = [_Worker(url, size, number) for number in range(CLIENTS)]
        try:
            return compare(lambda: _all(workers, b"c"), lambda: _all(workers, b"l"), repeats)
        finally:
            for worker in workers:
                worker.close()


class _Worker:
    """A process that copies, or loads, when it is told to."""

    def __init__(self, url: str, size: str, number: int) -> None:
        command = [sys.executable, "-m", "kvstore.bench.micro.daemon", url, size, str(number)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()

    def tell(self, what: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what)
        self.process.stdin.flush()

    def answer(self) -> None:
        assert self.process.stdout is not None
        said = self.process.stdout.read(1)
        assert said == b".", "a worker failed"

    def close(self) -> None:
        self.process.communicate()


def _all(workers: list[_Worker], what: bytes) -> None:
    for worker in workers:
        worker.tell(what)
    for worker in workers:
        worker.answer()


def _work(url: str, size: str, number: int) -> None:
    """A worker's life."""
    layout = LAYOUTS[size]
    block = layout.payload_bytes(layout.block_tokens)
    blocks = EACH // block
    ids, source, target = prompt(number, blocks * layout.block_tokens), memory(EACH), memory(EACH)
    with kvstore.connect(url, timeout=TIMEOUT) as store:
        save_chain(store, layout, ids, source).wait()
        os.write(1, b".")
        while what := os.read(0, 1):
            if what == b"c":
                copy(target, source, block)
            else:
                load_chain(store, layout, ids, target)
            os.write(1, b".")


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
