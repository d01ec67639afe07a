"""Processes that tests start beside a daemon, as its clients, and kill, stop or ask: ``python workers.py ROLE URL
TIMEOUT [words…]`` answers each line on its input with one line of JSON, and ends with its input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from blocks import NS, SMALL, WIDE, drafts, fill, found, ids, load_all, marks, save, wrong

import kvstore
from kvstore.daemon.client import Client
from kvstore.daemon.connection import Connection
from kvstore.load import Load
from kvstore.save import Draft

CHAINS = 40  # that all traffic shares
ALWAYS = property(lambda self: True)  # a planted fault: nobody looks whether his session is alive


class Worker:
    """One such process, as a test has it."""

    def __init__(self, role: str, url: str, timeout: float = 1.0, *words: object) -> None:
        command = [sys.executable, __file__, role, url, str(timeout), *map(str, words)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> Any:
        """Its answer."""
        self.tell(line)
        return self.answer()

    def tell(self, line: str) -> None:
        """Asks, and does not wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """What it says next."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said, f"the worker is gone: {self.process.wait()}"
        return json.loads(said)

    def signal(self, number: int) -> None:
        """Sends a signal; after SIGSTOP, waits until it has stopped."""
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def end(self, kill: bool = False) -> int:
        """Ends it; its exit code."""
        if kill:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        return self.process.wait()


@contextmanager
def workers(count: int, role: str, url: str, timeout: float = 1.0, *words: object) -> Iterator[list[Worker]]:
    """Several, ready, and ended afterwards whatever state they are in."""
    started = [Worker(role, url, timeout, number, *words) for number in range(count)]
    try:
        for each in started:
            assert each.ask("ready") == "ready"
        yield started
    finally:
        for each in started:
            if each.process.poll() is None:
                each.process.kill()
            for stream in (each.process.stdin, each.process.stdout):
                if stream is not None:
                    stream.close()
            each.process.wait()


class Traffic:
    """Saves and loads chains that others save and load, too, until it is asked what it saw."""

    def __init__(self, client: Client, timeout: float, seed: int) -> None:
        self._client, self._timeout, self._draw = client, timeout, random.Random(seed)
        self.calls, self.tokens, self.latest, self.wrong = 0, 0, 0.0, list[str]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __call__(self, line: str) -> object:
        if line == "ready":
            return line
        self._over.set()
        self._thread.join()
        return {"calls": self.calls, "tokens": self.tokens, "late": self.latest, "wrong": self.wrong}

    def _run(self) -> None:
        while not self._over.wait(0.003):
            try:
                self._once()
            except BaseException as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                raise

    def _once(self) -> None:
        tokens = ids(self._draw.randrange(CHAINS), self._draw.randrange(1, 200))
        if self._draw.random() < 0.3:
            self._save(tokens)
            return
        match = self._timed(lambda: found(self._client, tokens))
        load = self._timed(lambda: self._client.load(match))
        self.wrong += wrong(load, tokens)
        self.tokens += load.good_tokens(1)
        load.release()

    def _save(self, tokens: list[int]) -> None:
        made = dict[int, Draft]()
        match = self._timed(lambda: found(self._client, tokens))
        every, first = marks(NS, tokens), match.tokens // 16
        match.release()
        for block, draft in enumerate(self._timed(lambda: self._client.drafts(SMALL, 4)), first):
            if block * 16 < len(tokens):
                fill(draft, every[block * 16 : block * 16 + 16])
                made[block] = draft
        saved = self._timed(lambda: self._client.save(NS, SMALL, tokens, made))
        self._timed(lambda: saved.tokens)

    def _timed(self, call: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        try:
            return call()
        finally:
            self.calls += 1
            self.latest = max(self.latest, time.monotonic() - begin - self._timeout)


class Holder:
    """Holds leases, and drafts that are half written, until it is killed."""

    def __init__(self, client: Client, _: float, seed: int) -> None:
        self._client, self._seed = client, seed
        self._held: list[object] = []

    def __call__(self, line: str) -> object:
        if line == "hold":
            tokens = ids(self._seed, 400)
            match = found(self._client, tokens)
            self._held += [match, self._client.load(found(self._client, tokens))]
            made = drafts(self._client, NS, SMALL, ids(self._seed + 1000, 100))
            half = self._client.drafts(SMALL, 5)
            for draft in half:
                draft.layer(0)[0][:4] = b"half"
            self._held += [made, half]
            return [match.tokens, len(made) + len(half)]
        return line


class Reader:
    """Loads one chain, and copies it when and as far as it is asked."""

    def __init__(self, client: Client, _: float, number: int, trusting: bool = False) -> None:
        self._client, self._tokens = client, ids(number, 16 * 32)
        self._load: Load | None = None
        if trusting:
            Connection.alive = ALWAYS  # type: ignore[assignment,method-assign]

    def __call__(self, line: str) -> object:
        if line == "load":
            self._load = self._client.load(found(self._client, self._tokens))
            return self._load.tokens
        if line == "copy":
            assert self._load is not None
            buffer = memoryview(bytearray(1 << 20))
            return {
                "intact": self._load.intact(),
                "copied": self._load.read_into(buffer),
                "good": self._load.good_tokens(1),
                "waited": self._load.wait(1),
                "wrong": self._differs(),
                "intact then": self._load.intact(),
            }
        return load_all(self._client, [*self._tokens, 0]) if line == "again" else line

    def _differs(self) -> int:
        """Pieces whose bytes are not what was saved, whatever the load says of itself."""
        assert self._load is not None
        load, found = Plain(self._load), 0
        found += len(wrong(load, self._tokens))  # type: ignore[arg-type]
        return found


class Plain:
    """A load that believes that all is there."""

    def __init__(self, load: Load) -> None:
        self.layout, self.pieces, self._tokens = load.layout, load.pieces, load.tokens

    def wait(self, layer: int) -> bool:
        return True

    def good_tokens(self, layer: int) -> int:
        return self._tokens


class Copier:
    """Copies a long chain over and over, in one go each time, and looks at what it got."""

    def __init__(self, client: Client, _: float, seed: int, trusting: bool = False) -> None:
        if trusting:
            Connection.alive = ALWAYS  # type: ignore[assignment,method-assign]
        self._client, self._tokens = client, ids(seed, WIDE.block_tokens * 24)
        self.copied, self.missed, self.wrong = 0, 0, 0
        expected = bytearray()
        every = marks(NS, self._tokens)
        for block in range(24):
            draft = client.draft(WIDE)
            assert draft is not None
            fill(draft, every[block * 32 : block * 32 + 32])
            expected += draft.payload
        self._expected = bytes(expected)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __call__(self, line: str) -> object:
        if line == "go":
            self._thread.start()
        elif line == "over":
            self._over.set()
            self._thread.join()
            return [self.copied, self.missed, self.wrong]
        return line

    def _run(self) -> None:
        buffer = memoryview(bytearray(len(self._expected)))
        while not self._over.is_set():
            load = self._client.load(found(self._client, self._tokens, layout=WIDE))
            for _ in range(50):
                size = load.read_into(buffer)
                self.copied += size > 0
                self.wrong += buffer[:size] != self._expected[:size]
                if not size:
                    self.missed += 1
                    save(self._client, self._tokens, layout=WIDE)
                    break
            load.release()


class Crowd:
    """Sixteen threads that want the same block at once."""

    def __init__(self, client: Client, _: float, number: int) -> None:
        self._client = client

    def __call__(self, line: str) -> object:
        if line != "go":
            return line
        tokens, well = ids(1, 16), list[int]()
        start = threading.Barrier(16)

        def work() -> None:
            start.wait()
            well.append(load_all(self._client, [*tokens, 0]))

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return well


ROLES: dict[str, Callable[..., Callable[[str], object]]] = {
    "traffic": Traffic,
    "holder": Holder,
    "reader": Reader,
    "copier": Copier,
    "crowd": Crowd,
}


def main(role: str, url: str, timeout: str, *words: str) -> None:
    with kvstore.connect(url, timeout=float(timeout)) as client:
        worker = ROLES[role](client, float(timeout), *map(int, words))
        for line in sys.stdin:
            print(json.dumps(worker(line.strip())), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
