"""A door to the operating system with faults behind it: it fails the n-th call, transfers little at a time, flips bits,
and loses power. No product code knows of it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvstore.files import Handle, OsFiles, Space

SECTOR = 512


class PowerLoss(BaseException):
    """The machine is off: nothing that would catch an error may go on."""


@dataclass
class Undo:
    """What was there before bytes were written that are not synced yet."""

    offset: int
    old: bytes
    size: int  # of the file


class FaultyFiles(OsFiles):
    """``OsFiles`` whose calls are counted and can fail.

    ``fail_at``: number of the call that fails (the first is 1), with ``code``, once or (``forever``) from then on;
    without a code the power goes at that call (``PowerLoss``), for good.
    ``short``: each transfer moves half of what is asked, again and again. ``rot``: called with each buffer that was
    read. ``stolen``: bytes that others took from the filesystem. ``skew`` is added to both clocks.
    """

    def __init__(self, portable: bool = False) -> None:
        super().__init__(portable)
        self.calls = 0
        self.log: list[str] = []
        self.fail_at: int | None = None
        self.code: int | None = errno.EIO
        self.forever = False
        self.short = False
        self.stolen = 0
        self.skew = 0.0
        self.rot: Callable[[Handle, memoryview, int], None] | None = None
        self._guard = threading.RLock()
        self._handles: set[Handle] = set()
        self._unsynced: dict[str, list[Undo]] = {}
        self._names: list[tuple[str, Callable[[], None]]] = []  # folder, and how to take the change of a name back

    # --- faults

    def _call(self, name: str, path: str) -> None:
        with self._guard:
            self.calls += 1
            self.log.append(f"{name} {os.path.basename(path)}")
            n = self.fail_at
            if n is not None and (self.calls == n or (self.calls > n and (self.forever or self.code is None))):
                if self.code is None:
                    raise PowerLoss
                raise OSError(self.code, os.strerror(self.code), path)

    def heal(self) -> None:
        """No more faults."""
        self.fail_at, self.short, self.rot, self.stolen = None, False, None, 0

    def _read_some(self, fd: int, buffer: memoryview, offset: int) -> int:
        return super()._read_some(fd, self._less(buffer), offset)

    def _write_some(self, fd: int, data: memoryview, offset: int) -> int:
        return super()._write_some(fd, self._less(data), offset)

    def _less(self, data: memoryview) -> memoryview:
        half = len(data) // 2 // SECTOR * SECTOR
        return data[:half] if self.short and half else data

    def let_go(self) -> None:
        """Closes what is still open, as the end of a process does."""
        for handle in list(self._handles):
            super().close(handle)

    # --- what a loss of power would take back

    def lose_power(self, rng: random.Random) -> None:
        """Takes back some of what was not synced: any sectors of files, and the last few changes of names."""
        with self._guard:
            for path, undos in self._unsynced.items():
                if os.path.exists(path):
                    for undo in reversed(undos):
                        _take_back(path, undo, rng)
            for _, undo_name in reversed(self._names[rng.randint(0, len(self._names)) :]):
                undo_name()
            self._unsynced.clear()
            self._names.clear()

    def _remember(self, path: str, offset: int, length: int) -> None:
        if not os.path.exists(path):
            return
        with open(path, "rb") as file:
            file.seek(offset)
            old = file.read(length)
        self._unsynced.setdefault(path, []).append(Undo(offset, old, os.path.getsize(path)))

    def _renamed(self, folder: str, undo: Callable[[], None]) -> None:
        self._names.append((os.path.abspath(folder), undo))

    # --- the port

    def close(self, handle: Handle) -> None:
        """See ``OsFiles``. Never fails."""
        super().close(handle)
        self._handles.discard(handle)

    def open(self, path: str, *, create: bool = False, direct: bool = False) -> Handle:
        """See ``OsFiles``."""
        self._call("open", path)
        handle = super().open(path, create=create, direct=direct)
        self._handles.add(handle)
        if create:
            self._renamed(os.path.dirname(path), lambda: _drop(path))
        return handle

    def read(self, handle: Handle, buffer: memoryview, offset: int) -> int:
        """See ``OsFiles``."""
        self._call("read", handle.path)
        got = super().read(handle, buffer, offset)
        if self.rot:
            self.rot(handle, buffer[:got], offset)
        return got

    def write(self, handle: Handle, data: memoryview, offset: int) -> None:
        """See ``OsFiles``. A write that fails may have written the first half."""
        with self._guard:
            self._remember(handle.path, offset, len(data))
            try:
                self._call("write", handle.path)
            except (OSError, PowerLoss):
                if half := len(data) // 2 // SECTOR * SECTOR:
                    super().write(handle, data[:half], offset)
                raise
        super().write(handle, data, offset)

    def sync(self, handle: Handle) -> None:
        """See ``OsFiles``."""
        self._call("sync", handle.path)
        super().sync(handle)
        with self._guard:
            self._unsynced.pop(handle.path, None)

    def sync_folder(self, path: str) -> None:
        """See ``OsFiles``."""
        self._call("sync_folder", path)
        super().sync_folder(path)
        with self._guard:
            self._names = [item for item in self._names if item[0] != os.path.abspath(path)]

    def allocate(self, handle: Handle, length: int) -> None:
        """See ``OsFiles``."""
        with self._guard:
            self._remember(handle.path, 0, 0)
            self._call("allocate", handle.path)
        super().allocate(handle, length)

    def zero(self, handle: Handle, offset: int, length: int) -> None:
        """See ``OsFiles``."""
        with self._guard:
            self._remember(handle.path, offset, length)
            self._call("zero", handle.path)
        super().zero(handle, offset, length)

    def truncate(self, handle: Handle, length: int) -> None:
        """See ``OsFiles``."""
        self._call("truncate", handle.path)
        super().truncate(handle, length)

    def size(self, path: str) -> int:
        """See ``OsFiles``."""
        self._call("size", path)
        return super().size(path)

    def names(self, path: str) -> list[str]:
        """See ``OsFiles``."""
        self._call("names", path)
        return super().names(path)

    def make_folder(self, path: str) -> None:
        """See ``OsFiles``."""
        self._call("make_folder", path)
        if not os.path.exists(path):
            super().make_folder(path)
            self._renamed(os.path.dirname(path), lambda: shutil.rmtree(path, ignore_errors=True))

    def remove(self, path: str) -> None:
        """See ``OsFiles``."""
        self._call("remove", path)
        if os.path.isfile(path):
            data = Path(path).read_bytes()
            super().remove(path)
            self._renamed(os.path.dirname(path), lambda: _put_back(path, data))
        else:
            super().remove(path)
            self._renamed(os.path.dirname(path), lambda: os.makedirs(path, exist_ok=True))

    def rename(self, old: str, new: str) -> None:
        """See ``OsFiles``."""
        self._call("rename", new)
        covered = Path(new).read_bytes() if os.path.isfile(new) else None
        super().rename(old, new)

        def undo() -> None:
            if os.path.exists(new):
                os.rename(new, old)
            if covered is not None:
                _put_back(new, covered)

        self._renamed(os.path.dirname(new), undo)

    def read_small(self, path: str, limit: int = 1 << 20) -> bytes:
        """See ``OsFiles``."""
        self._call("read_small", path)
        return super().read_small(path, limit)

    def lock(self, path: str) -> Handle:
        """See ``OsFiles``."""
        self._call("lock", path)
        handle = super().lock(path)
        self._handles.add(handle)
        return handle

    def space(self, path: str) -> Space:
        """See ``OsFiles``."""
        self._call("space", path)
        found = super().space(path)
        return Space(max(0, found.free - self.stolen), found.total)

    def now(self) -> float:
        """See ``OsFiles``."""
        return super().now() + self.skew

    def monotonic(self) -> float:
        """See ``OsFiles``."""
        return super().monotonic() + self.skew


def _take_back(path: str, undo: Undo, rng: random.Random) -> None:
    """Each sector stays as it was written, or becomes what it was; all of them equally often as only some."""
    odds = rng.choice((0.0, 0.5, 1.0))
    with open(path, "r+b") as file:
        for start in range(0, len(undo.old), SECTOR):
            if rng.random() < odds:
                file.seek(undo.offset + start)
                file.write(undo.old[start : start + SECTOR])
        if odds == 1.0 and os.path.getsize(path) != undo.size:
            file.truncate(undo.size)


def _put_back(path: str, data: bytes) -> None:
    if os.path.isdir(os.path.dirname(path)):
        with open(path, "wb") as file:
            file.write(data)


def _drop(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)
