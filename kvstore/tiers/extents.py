"""The files of a disk tier's slab: ``extent-%06d.slab``, a header page and then slots of one size.

A file is made when it is first written to and removed when its number is given back; both happen outside the store's
lock. Few files are open at a time, however many extents there are.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby

from xxhash import xxh3_128_digest

from kvstore.files import PAGE, Files, Handle
from kvstore.tiers.slab import Extent

MAGIC = b"KVEXTENT"
VERSION = 1
# magic, version, number, bytes of a slot, slots, random id, xxh3_128 of what stands before it
HEADER = struct.Struct("<8sIIQQ16s16s")
_NAME = re.compile(r"extent-(\d{6,})\.slab")
_MAX_OPEN = 128


@dataclass(slots=True)
class _File:
    handle: Handle
    users: int = 0
    doomed: bool = False  # removed while somebody reads: closed by the last of them


class Extents:
    """Extent files in one folder. ``OSError`` passes through."""

    def __init__(self, files: Files, folder: str) -> None:
        self._files = files
        self._folder = folder
        self._lock = threading.Lock()  # guards the tables; never held over I/O
        self._making = threading.Lock()  # one at a time makes and removes files
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._planned: dict[int, Extent] = {}
        self._removed: list[int] = []
        self._unsynced = False
        self._closing: list[Handle] = []
        self.failed: set[int] = set()  # planned, and the file could not be made
        self.highest = 0  # number that any file here has
        self.foreign = 0  # bytes of files that are not ours to touch
        self.damaged: list[str] = []  # names of extents that were dropped at the scan, or cut

    @property
    def planned_bytes(self) -> int:
        """Bytes of files that will be made at the first write."""
        return sum(PAGE + extent.bytes for extent in list(self._planned.values()))

    def scan(self) -> list[Extent]:
        """The extents that are there. Torn ones are removed; what another version wrote is left alone."""
        found = []
        for name in self._files.names(self._folder):
            match = _NAME.fullmatch(name)
            path = os.path.join(self._folder, name)
            if match:
                self.highest = max(self.highest, int(match[1]))
                extent = self._read(path, int(match[1]))
                if extent is not None:
                    found.append(extent)
            elif name != "lock" and not self._files.is_folder(path):
                self.foreign += self._files.size(path)
        return found

    def _read(self, path: str, number: int) -> Extent | None:
        size, page = self._files.size(path), self._files.read_small(path, PAGE)
        fields = HEADER.unpack_from(page.ljust(HEADER.size, b"\0"))
        magic, version, own, slot_bytes, slots = fields[:5]
        if any(page) and (magic != MAGIC or version != VERSION):
            self.foreign += size
            return None
        sound = xxh3_128_digest(page[: HEADER.size - 16]) == fields[-1] and own == number & 0xFFFFFFFF
        there = (size - PAGE) // slot_bytes if sound and slot_bytes else 0
        if there < 1:  # never finished, or damaged
            self.damaged.append(os.path.basename(path))
            self._files.remove(path)
            return None
        extent = Extent(number, slot_bytes, min(there, slots))
        if size != PAGE + slots * slot_bytes:
            self.damaged.append(os.path.basename(path))
            handle = self._files.open(path)
            try:
                self._files.truncate(handle, PAGE + extent.bytes)
                self._write_header(handle, extent)
            finally:
                self._files.close(handle)
        return extent

    def plan(self, extent: Extent) -> None:
        """Notes an extent; its file is made at the first use. No I/O."""
        self._planned[extent.number] = extent

    def remove(self, number: int) -> None:
        """Gives an extent up; its file goes before the next one is made, at ``tidy`` or ``close``. No I/O."""
        with self._lock:
            self.failed.discard(number)
            if self._planned.pop(number, None) is not None:
                return
            self._removed.append(number)
            file = self._open.pop(number, None)
            if file is not None:
                file.doomed = True
                if not file.users:
                    self._closing.append(file.handle)

    @contextmanager
    def use(self, number: int) -> Iterator[Handle]:
        """The open file of an extent, for the length of a ``with``."""
        with self._lock:
            file = self._open.get(number)
            if file is not None:
                file.users += 1
                self._open.move_to_end(number)
        if file is None:
            file = self._acquire(number)
        try:
            yield file.handle
        finally:
            with self._lock:
                file.users -= 1
                last = file.doomed and not file.users
            if last:
                self._files.close(file.handle)

    def _acquire(self, number: int) -> _File:
        with self._making:
            with self._lock:
                file = self._open.get(number)  # another thread was faster
                if file is not None:
                    file.users += 1
                    return file
                extent = self._planned.get(number)
            handle = self._files.open(self._path(number), direct=True) if extent is None else self._make(extent)
            file = _File(handle, users=1)
            with self._lock:
                self._planned.pop(number, None)
                self._open[number] = file
                idle = [n for n, other in self._open.items() if not other.users][: max(0, len(self._open) - _MAX_OPEN)]
                closing = [self._open.pop(n).handle for n in idle]
            for other in closing:
                self._files.close(other)
            return file

    def _make(self, extent: Extent) -> Handle:
        path = self._path(extent.number)
        try:
            self._clear()  # first, so that there is never more than the budget
            # Through the page cache, because a direct write of one page waits behind all large ones in flight.
            handle = self._files.open(path, create=True)
            try:
                self._files.allocate(handle, PAGE + extent.bytes)
                self._write_header(handle, extent)
                self._files.close(handle)
                handle = self._files.open(path, direct=True)
            except BaseException:
                self._files.close(handle)
                self._files.remove(path)
                raise
        except OSError:
            self.failed.add(extent.number)
            raise
        self._unsynced = True
        self.failed.discard(extent.number)
        return handle

    def _write_header(self, handle: Handle, extent: Extent) -> None:
        mark = self._files.random(16)
        body = HEADER.pack(MAGIC, VERSION, extent.number, extent.slot_bytes, extent.slots, mark, bytes(16))[:-16]
        page = (body + xxh3_128_digest(body)).ljust(PAGE, b"\0")
        self._files.write(handle, memoryview(page), 0)

    def _clear(self) -> None:
        """Closes and removes what was given up. What cannot be removed stays on the list."""
        with self._lock:
            closing, self._closing = self._closing, []
        for handle in closing:
            self._files.close(handle)
        while self._removed:
            path = self._path(self._removed[-1])
            if self._files.exists(path):
                self._files.remove(path)
            self._removed.pop()

    def zero(self, extent: Extent, slots: Iterable[int]) -> None:
        """Zeroes slots, durably; nothing when the extent has no file yet."""
        ordered = sorted(slots)
        if not ordered or extent.number in self._planned:
            return
        with self.use(extent.number) as handle:
            for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
                numbers = [slot for _, slot in run]
                self._files.zero(handle, PAGE + numbers[0] * extent.slot_bytes, len(numbers) * extent.slot_bytes)
            self._files.sync(handle)

    def sync(self, numbers: Iterable[int]) -> None:
        """Makes what was written to these extents durable, and the names of new files."""
        for number in numbers:
            with self.use(number) as handle:
                self._files.sync(handle)
        with self._making:
            if self._unsynced:
                self._files.sync_folder(self._folder)
                self._unsynced = False

    def tidy(self) -> None:
        """Removes the files that were given up."""
        with self._making:
            self._clear()

    def close(self) -> None:
        """Closes all files, and removes those that were given up, if that works: the next start sees what is left."""
        with self._making:
            with self._lock:
                for file in self._open.values():
                    file.doomed = True
                self._closing += [file.handle for file in self._open.values() if not file.users]
                self._open.clear()
            with suppress(OSError):
                self._clear()

    def _path(self, number: int) -> str:
        return os.path.join(self._folder, f"extent-{number:06d}.slab")
