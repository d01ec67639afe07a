"""The composition root: turns what a user says into a store. Only this module names concrete tiers and policies."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from kvstore.directory import disk_tier, place_of
from kvstore.errors import BadInput, StoreBusy
from kvstore.hot import Hot
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.policies.pace import Pace
from kvstore.remote.options import RemoteOptions
from kvstore.sizes import size_bytes
from kvstore.tiers.host import HostTier

if TYPE_CHECKING:
    from kvstore.files import Files
    from kvstore.store import Store
    from kvstore.tiers.base import Remote
    from kvstore.tiers.host import Memory

MIN_HOST = 1 << 20
MIN_DISK = 4 << 20
MIN_DEVICE = 1 << 20
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(slots=True)
class _Shared:
    """A store that this process has open on a directory, and how many times; with no users it is about to close."""

    store: LocalStore
    users: int
    keys: Path | None


_open: dict[Path, _Shared] = {}  # guarded by _changed
_changed = threading.Condition()


def _after_fork() -> None:
    """The parent's stores are not the child's, and its lock may have been held."""
    global _changed
    _changed = threading.Condition()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)


@overload
def open(
    path: str | os.PathLike[str] | None = ...,
    *,
    host: str | int = ...,
    disk: str | int = ...,
    device: str | int | None = ...,
    device_name: str = ...,
    on_busy: Literal["error", "memory"] = ...,
    redis: str | RemoteOptions | None = ...,
    encryption: str | os.PathLike[str] | None = ...,
    files: Files | None = ...,
) -> LocalStore: ...


@overload
def open(
    path: str | os.PathLike[str] | None = ...,
    *,
    host: str | int = ...,
    disk: str | int = ...,
    device: str | int | None = ...,
    device_name: str = ...,
    on_busy: Literal["connect"],
    redis: str | RemoteOptions | None = ...,
    encryption: str | os.PathLike[str] | None = ...,
    files: Files | None = ...,
) -> Store: ...


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    host: str | int = "1GiB",
    disk: str | int = "8GiB",
    device: str | int | None = None,
    device_name: str = "cuda",
    on_busy: Literal["error", "memory", "connect"] = "error",
    redis: str | RemoteOptions | None = None,
    encryption: str | os.PathLike[str] | None = None,
    files: Files | None = None,
) -> Store:
    """Opens a store. Without ``path`` it lives in memory only, and nothing is ever written anywhere.

    ``host`` and ``disk`` are byte budgets (``"8GiB"`` or an int) that are never exceeded. A directory that this process
    has open already is shared (its budgets stand, and it closes with the last who closes); one that another process
    holds raises ``StoreBusy``, or, with ``on_busy="memory"``, gives a store in memory, with ``"connect"`` that of the
    daemon that serves it (see ``connect``). ``files`` is the door to the operating system (tests inject faults).

    ``device`` is the budget of a tier on the device ``device_name`` ("cuda", "cuda:1", "cpu"), which is taken at once
    and keeps what was loaded last where the engine is; 0: none. With it (0 too), host memory is pinned for CUDA as it
    comes into use. What cannot be had (no such device, no memory left on it, no pinning) is done without, with a line
    in the log and a gauge in ``stats``. Needs torch; without ``device`` none is imported.

    ``redis`` is the URL of a Redis that hosts share blocks through, or ``RemoteOptions`` with it. It is connected to
    beside; whether it answers, slowly or never, the store works. Needs redis-py; without ``redis`` none is imported.

    ``encryption`` is a folder outside of ``path``, for this cache alone: what is on disk is encrypted with one key a
    namespace, kept there, and what was written with a key that is not there any more is not found. Needs cryptography.

    Raises ``BadInput`` for sizes that make no sense, for a directory that is not a cache, for a key folder that others
    can read, and for a cache with encrypted blocks without ``encryption``.
    """
    host_bytes, disk_bytes = _budgets(host, disk, on_busy)
    wanted = _device_bytes(device, device_name)
    shared_with, keys = remote(redis), None if encryption is None else place_of(encryption)
    if path is None:
        return _in_memory(host_bytes, wanted, device_name, shared_with)
    place = place_of(path)
    with _changed:
        while (shared := _open.get(place)) is not None and not shared.users:
            _changed.wait()  # it is being closed
        if shared is not None:
            if shared.keys != keys:
                raise BadInput(f"{str(place)!r} is open in this process with another encryption=; give the same")
            shared.users += 1
            return shared.store.share()
        try:
            store = _open_directory(place, host_bytes, disk_bytes, files, wanted, device_name, shared_with, keys)
        except StoreBusy:
            if on_busy == "connect":
                from kvstore.daemon import connect

                return connect(place)
            if on_busy == "error":
                raise
            return _in_memory(host_bytes, wanted, device_name, shared_with)
        _open[place] = _Shared(store, 1, keys)
        return store


def _budgets(host: str | int, disk: str | int, on_busy: str) -> tuple[int, int]:
    host_bytes = size_bytes(host, "host")
    disk_bytes = size_bytes(disk, "disk")
    if host_bytes < MIN_HOST:
        raise BadInput(f"host={host!r} is too small to hold a block; give at least 1MiB")
    if disk_bytes < MIN_DISK:
        raise BadInput(f"disk={disk!r} is too small for an index and a block; give at least 4MiB")
    if on_busy not in ("error", "memory", "connect"):
        raise BadInput(f'on_busy={on_busy!r} is unknown; choose "error", "memory" or "connect"')
    return host_bytes, disk_bytes


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


def remote(redis: str | RemoteOptions | None) -> tuple[Remote, RemoteOptions] | None:
    """The remote tier that a URL or options stand for, not connected yet. Raises ``BadInput``."""
    if redis is None:
        return None
    options = RemoteOptions(redis) if isinstance(redis, str) else redis
    try:
        from kvstore.tiers.redis import RedisTier
    except ImportError as error:
        raise BadInput("redis= needs redis-py; install kvstore-llm[redis], or leave out redis=") from error
    return RedisTier(options.url, options.prefix, options.budget, options.key), options


def _in_memory(
    host: int, device: int | None, name: str, shared_with: tuple[Remote, RemoteOptions] | None
) -> LocalStore:
    hot = _hot(device, name)
    return LocalStore(_host(host, device, name), None, Pace(time.monotonic), LRU(), hot=hot, remote=shared_with)


def _open_directory(
    place: Path,
    host: int,
    disk: int,
    files: Files | None,
    device: int | None,
    name: str,
    shared_with: tuple[Remote, RemoteOptions] | None,
    keys: Path | None,
) -> LocalStore:
    memory = _host(host, device, name)
    tier = disk_tier(place, disk, keys, files, shared=shared_with is not None)
    try:
        hot, policies = _hot(device, name), Pace.pair(time.monotonic)
        return LocalStore(memory, tier, *policies, lambda: _let_go(place), lambda: _gone(place), hot, shared_with)
    except BaseException:
        tier.close()
        raise


def serving(
    path: Path | None,
    host: int,
    disk: int,
    memory: Memory,
    redis: RemoteOptions | None = None,
    encryption: Path | None = None,
) -> tuple[LocalStore, HostTier]:
    """A daemon's store, and its host tier, whose extents are from ``memory``. Sizes in bytes. Raises as ``open``."""
    if min(host, disk) < MIN_DISK:
        raise BadInput(f"a tenant needs {MIN_DISK} bytes of memory and of disk at least, not {min(host, disk)}")
    tier, shared_with = HostTier(host, memory=memory), remote(redis)
    if path is None:
        return LocalStore(tier, None, Pace(time.monotonic), LRU(), remote=shared_with), tier
    keys = None if encryption is None else place_of(encryption)
    below = disk_tier(place_of(path), disk, keys, shared=shared_with is not None)
    try:
        return LocalStore(tier, below, *Pace.pair(time.monotonic), remote=shared_with), tier
    except BaseException:
        below.close()
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
