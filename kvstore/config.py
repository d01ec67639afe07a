"""The composition root: turns what a user says into a store. Only this module names concrete tiers and policies."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvstore.errors import BadInput, StoreBusy
from kvstore.hot import Hot
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.policies.pace import Pace
from kvstore.tiers.host import HostTier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.files import Files
    from kvstore.tiers.base import Problem

MIN_HOST = 1 << 20
MIN_DISK = 4 << 20
MIN_DEVICE = 1 << 20
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


@dataclass(slots=True)
class _Shared:
    """A store that this process has open on a directory, and how many times; with no users it is about to close."""

    store: LocalStore
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
    device: str | int | None = None,
    device_name: str = "cuda",
    on_busy: Literal["error", "memory"] = "error",
    files: Files | None = None,
) -> LocalStore:
    """Opens a store. Without ``path`` it lives in memory only, and nothing is ever written anywhere.

    ``host`` and ``disk`` are byte budgets (``"8GiB"`` or an int) that are never exceeded. A directory that this process
    has open already is shared (its budgets stand, and it closes with the last who closes); one that another process
    holds raises ``StoreBusy``, or, with ``on_busy="memory"``, gives a store in memory. ``files`` is the door to the
    operating system (tests inject faults).

    ``device`` is the budget of a tier on the device ``device_name`` ("cuda", "cuda:1", "cpu"), which is taken at once
    and keeps what was loaded last where the engine is; 0: none. With it (0 too), host memory is pinned for CUDA as it
    comes into use. What cannot be had (no such device, no memory left on it, no pinning) is done without, with a line
    in the log and a gauge in ``stats``. Needs torch; without ``device`` none is imported.

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
    wanted = _device_bytes(device, device_name)
    if path is None:
        return _in_memory(host_bytes, wanted, device_name)
    place = _place(path)
    with _changed:
        while (shared := _open.get(place)) is not None and not shared.users:
            _changed.wait()  # it is being closed
        if shared is not None:
            shared.users += 1
            return shared.store.share()
        try:
            store = _open_directory(place, host_bytes, disk_bytes, files, wanted, device_name)
        except StoreBusy:
            if on_busy == "error":
                raise
            return _in_memory(host_bytes, wanted, device_name)
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


def _device_bytes(device: str | int | None, name: str) -> int | None:
    """The device tier's budget; None: neither a tier nor pinned memory."""
    text: object = name
    if not isinstance(text, str) or not _DEVICE.fullmatch(text):
        raise BadInput(f'device_name={text!r} is no device; write "cuda", "cuda:1" or "cpu"')
    if device is None:
        return None
    size = 0 if device == 0 and not isinstance(device, bool) else size_bytes(device, "device")
    if 0 < size < MIN_DEVICE:
        raise BadInput(f"device={device!r} is too small to hold a block; give at least 1MiB, or 0 for no tier")
    try:
        import kvstore.tiers.device  # noqa: F401
    except ImportError as error:
        raise BadInput("a device tier needs torch; install it, or leave out device=") from error
    return size


def _host(size: int, device: int | None, name: str) -> HostTier:
    if device is None or name == "cpu":
        return HostTier(size)
    from kvstore.tiers.device import CudaPins, present

    return HostTier(size, CudaPins(name) if present(name) else None)


def _hot(device: int | None, name: str) -> Hot | None:
    if device is None:
        return None
    from kvstore.tiers.device import DeviceTier

    return Hot(DeviceTier(device, name), LRU())


def _in_memory(host: int, device: int | None, name: str) -> LocalStore:
    return LocalStore(_host(host, device, name), None, Pace(time.monotonic), LRU(), hot=_hot(device, name))


def _open_directory(
    place: Path, host: int, disk: int, files: Files | None, device: int | None, name: str
) -> LocalStore:
    # Imported here, so that a store in memory needs no LMDB.
    from kvstore.files import OsFiles
    from kvstore.tiers.disk import DiskTier

    memory = _host(host, device, name)
    tier = DiskTier(files or OsFiles(), str(place), disk)
    try:
        hot = _hot(device, name)
        return LocalStore(memory, tier, *Pace.pair(time.monotonic), lambda: _let_go(place), lambda: _gone(place), hot)
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
