"""What a disk tier has been told and not yet written into its index."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from kvstore.block import Header
from kvstore.tiers.catalog import Change

TOUCH_SECONDS, TOUCH_COUNT = 60.0, 4096  # uses are written down when so old or so many


class Pending:
    """Blocks forgotten, times of use, and memos. Any method from any thread."""

    def __init__(self, now: float) -> None:
        self._lock = threading.Lock()
        self._forgotten: set[int] = set()
        self._used: dict[int, float] = {}
        self._memos: dict[str, str] = {}
        self._touched = now

    def forget(self, sequences: Iterable[int]) -> None:
        """Blocks to take out."""
        with self._lock:
            self._forgotten.update(sequences)

    def forgotten(self, sequence: int) -> bool:
        """Whether the block is to be taken out."""
        return sequence in self._forgotten

    def touch(self, sequences: Iterable[int], when: float) -> None:
        """Blocks that were used."""
        with self._lock:
            self._used.update(dict.fromkeys(sequences, when))

    def remember(self, name: str, value: str) -> None:
        """A memo to keep."""
        with self._lock:
            self._memos[name] = value

    def recall(self, name: str) -> str | None:
        """A memo that is not yet kept."""
        with self._lock:
            return self._memos.get(name)

    def change(self, written: Sequence[tuple[int, Header]], now: float, everything: bool) -> Change:
        """What to write now."""
        with self._lock:
            late = everything or now - self._touched >= TOUCH_SECONDS or len(self._used) >= TOUCH_COUNT
            if late:
                self._touched = now
            used = dict(self._used) if late else {}
            return Change(written, frozenset(self._forgotten), used, dict(self._memos))

    def done(self, change: Change) -> None:
        """The change is durable."""
        with self._lock:
            self._forgotten.difference_update(change.forgotten)
            self._memos = {name: value for name, value in self._memos.items() if change.memos.get(name) != value}
            self._used = {key: when for key, when in self._used.items() if change.used.get(key) != when}
