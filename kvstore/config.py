"""The composition root: turns what a user says into a store. Only this module names concrete tiers and policies."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvstore.errors import BadInput, StoreBusy
from kvstore.policies.lru import LRU
from kvstore.store import Store
from kvstore.tiers.host import HostTier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.files import Files
    from kvstore.tiers.base import Problem

MIN_HOST = 1 << 20
MIN_DISK = 4 << 20
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


@dataclass(slots=True)
class _Shared:
    """A store that this process has open on a directory, and how many times; with no users it is about to close."""

    store: Store
    users: int


_open: dict[Path, _Shared] = {}  # guarded by _changed
_changed = threading.Condition()


def _after_fork() -> None:
    """The parent's stores are not the child's, and its lock may have been held."""
    global _changed
    _changed = threading.Condition()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)


def size_bytes(size: str | int, name: str = "size") -> int:
    """Bytes of a size such as ``"8GiB"``, ``"500 MB"`` or a plain int. Raises ``BadInput``."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None or match[2].lower() not in _UNITS:
            raise BadInput(f'{name}={size!r} is not a size; write it as "8GiB", "500MB" or a number of bytes')
        value = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if value <= 0:
        raise BadInput(f"{name}={size!r} must be more than nothing")
    return value


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    host: str | int = "1GiB",
    disk: str | int = "8GiB",
    on_busy: Literal["error", "memory"] = "error",
    files: Files | None = None,
) -> Store:
    """Opens a store. Without ``path`` it lives in memory only, and nothing is ever written anywhere.

    ``host`` and ``disk`` are byte budgets (``"8GiB"`` or an int) that are never exceeded. A directory that this process
    has open already is shared (its budgets stand, and it closes with the last who closes); one that another process
    holds raises ``StoreBusy``, or, with ``on_busy="memory"``, gives a store in memory. ``files`` is the door to the
    operating system (tests inject faults).

    Raises ``BadInput`` for sizes that make no sense and for a directory that is not a cache.
    """
    host_bytes = size_bytes(host, "host")
    disk_bytes = size_bytes(disk, "disk")
    if host_bytes < MIN_HOST:
        raise BadInput(f"host={host!r} is too small to hold a block; give at least 1MiB")
    if disk_bytes < MIN_DISK:
        raise BadInput(f"disk={disk!r} is too small for an index and a block; give at least 4MiB")
    if on_busy not in ("error", "memory"):
        raise BadInput(f'on_busy={on_busy!r} is unknown; choose "error" or "memory"')
    if path is None:
        return Store(HostTier(host_bytes), None, LRU(), LRU())
    place = _place(path)
    with _changed:
        while (shared := _open.get(place)) is not None and not shared.users:
            _changed.wait()  # it is being closed
        if shared is not None:
            shared.users += 1
            return shared.store.share()
        try:
            store = _open_directory(place, host_bytes, disk_bytes, files)
        except StoreBusy:
            if on_busy == "error":
                raise
            return Store(HostTier(host_bytes), None, LRU(), LRU())
        _open[place] = _Shared(store, 1)
        return store


def verify(path: str | os.PathLike[str]) -> Iterator[int | Problem]:
    """Reads every block of a directory that no process has open; changes nothing.

    Yields first how many blocks there are, then what is wrong. Raises ``BadInput`` when it is no cache.
    """
    from kvstore.files import OsFiles
    from kvstore.tiers.disk import DiskTier

    tier = DiskTier(OsFiles(), str(_place(path)), None, create=False)
    try:
        yield sum(1 for _ in tier.load())
        yield from tier.verify()
    finally:
        tier.close()


def _place(path: str | os.PathLike[str]) -> Path:
    text: object = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise BadInput(f"{text!r} names no directory; give one, or no path at all for a store in memory")
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a circle of links, or no home
        raise BadInput(f"{text!r} names no directory: {error}; give another") from error


def _open_directory(place: Path, host: int, disk: int, files: Files | None) -> Store:
    # Imported here, so that a store in memory needs no LMDB.
    from kvstore.files import OsFiles
    from kvstore.tiers.disk import DiskTier

    memory = HostTier(host)
    tier = DiskTier(files or OsFiles(), str(place), disk)
    try:
        return Store(memory, tier, LRU(), LRU(), lambda: _let_go(place), lambda: _gone(place))
    except BaseException:
        tier.close()
        raise


def _let_go(place: Path) -> bool:
    """One user of a shared store closes it; True for the last."""
    with _changed:
        shared = _open[place]
        shared.users -= 1
        return not shared.users


def _gone(place: Path) -> None:
    """The store has let go of the directory."""
    with _changed:
        del _open[place]
        _changed.notify_all()
