"""A real disk tier behind gates: a test holds or fails the next read, write, commit or erase, at will."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from kvstore.errors import TierError
from kvstore.files import Files, OsFiles
from kvstore.hot import Hot
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier

PATIENCE = 20.0  # seconds until a test that hangs says so
MIB = 1 << 20


class Gate:
    """Holds the calls that come to it, before they do anything or after they have done it."""

    def __init__(self, calls: int, after: bool, error: bool) -> None:
        self.calls, self.after, self.error = calls, after, error
        self._reached = threading.Semaphore(0)
        self._opened = threading.Event()

    def reached(self, calls: int = 1) -> None:
        """Waits until so many calls stand at the gate."""
        for _ in range(calls):
            assert self._reached.acquire(timeout=PATIENCE), "nobody came to the gate"

    def open(self) -> None:
        """Lets everybody through."""
        self._opened.set()

    def pass_through(self, call: Callable[[], Any]) -> Any:
        """What a caller does at the gate."""
        result = call() if self.after else None
        self._reached.release()
        assert self._opened.wait(PATIENCE), "nobody opened the gate"
        if self.error:
            raise TierError("the test said so")
        return result if self.after else call()


class GatedTier:
    """A tier whose byte-moving calls pass gates."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.calls: Counter[str] = Counter()
        self._gates: dict[str, Gate] = {}
        self._lock = threading.Lock()

    def gate(self, name: str, calls: int = 1, *, after: bool = False, error: bool = False) -> Gate:
        """A gate for the next ``calls`` calls of read, write, commit or erase."""
        self._gates[name] = Gate(calls, after, error)
        return self._gates[name]

    def fail(self, name: str, calls: int = 1, *, after: bool = False) -> None:
        """Has the next calls raise."""
        self.gate(name, calls, after=after, error=True).open()

    def heal(self) -> None:
        """No gates any more."""
        with self._lock:
            self._gates.clear()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.tier, name)
        if name not in ("read", "write", "commit", "erase"):
            return attribute

        def passed(*arguments: Any) -> Any:
            with self._lock:
                self.calls[name] += 1
                gate = self._gates.get(name)
                if gate is not None:
                    gate.calls -= 1
                    if not gate.calls:
                        del self._gates[name]
            if gate is None:
                return attribute(*arguments)
            return gate.pass_through(lambda: attribute(*arguments))

        return passed


@contextmanager
def gated(
    path: Path, host: int = 8 * MIB, disk: int = 64 * MIB, files: Files | None = None, hot: Hot | None = None
) -> Iterator[Any]:
    """(store, its tier behind gates); closed at the end."""
    tier = GatedTier(DiskTier(files or OsFiles(), str(path), disk))
    store = LocalStore(HostTier(host), cast(Tier, tier), LRU(), LRU(), hot=hot)
    try:
        yield store, tier
    finally:
        store.close()


def only_on_disk(store: LocalStore) -> None:
    """Writes everything, then evicts every host copy that nobody holds."""
    assert store.flush(PATIENCE)
    residency = store._residency
    with residency.lock:
        residency.settle()
        for number in list(residency.residents):
            if number not in residency.index.leases:
                residency.drop_host(number)


def fetches_are_over(store: LocalStore) -> None:
    """Waits until every fetch has settled: its block is in memory, or gone."""
    residency = store._residency
    with residency.lock:
        assert residency.changed.wait_for(lambda: not store._loader._fetches, PATIENCE)


class Task(threading.Thread):
    """A call in a thread of its own; ``result`` joins and gives what it returned, or raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._outcome: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._outcome
