"""The one door to the operating system: files, locks, clock, randomness.

Everything that touches a disk goes through a ``Files``, so a test can put a faulty one in its place.
``OsFiles(portable=True)`` is the system without O_DIRECT and fallocate, as macOS has it. Errors are plain ``OSError``.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

PAGE = 4096
TEMPORARY = ".kvstore-"  # what a crash may leave of `write_small`
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_REFUSED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)


class Space(NamedTuple):
    """Bytes of a filesystem: what is left for us, and all there is."""

    free: int
    total: int


class Held(OSError):
    """A lock is held by another; ``holder`` is what that one wrote about itself."""

    def __init__(self, holder: str) -> None:
        super().__init__(errno.EWOULDBLOCK, f"held by {holder or 'another process'}")
        self.holder = holder or "another process"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Handle:
    """An open file. ``direct``: it goes past the page cache, with memory, offsets and lengths in whole pages."""

    fd: int
    path: str
    direct: bool = False
    pid: int = field(default_factory=os.getpid)


class OsFiles:
    """``Files`` of the system that we run on. ``portable`` hides what Linux has beyond others."""

    def __init__(self, portable: bool = False) -> None:
        self.portable = portable or not sys.platform.startswith("linux")
        self._direct = 0 if self.portable else getattr(os, "O_DIRECT", 0)

    def open(self, path: str, *, create: bool = False, direct: bool = False) -> Handle:
        """Opens a file to read and write, 0600. ``create``: it must not be there yet. ``direct`` is a wish."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        if direct and self._direct:
            try:
                return Handle(os.open(path, flags | self._direct, 0o600), path, True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                flags &= ~os.O_EXCL  # Linux may have made the file before it refused
        return Handle(os.open(path, flags, 0o600), path)

    def close(self, handle: Handle) -> None:
        """Closes a file or gives a lock back; a handle from before a fork is left to the parent."""
        fd, handle.fd = handle.fd, -1
        _locks.discard(handle)
        if fd >= 0 and handle.pid == os.getpid():
            os.close(fd)

    def read(self, handle: Handle, buffer: memoryview, offset: int) -> int:
        """Fills ``buffer`` from ``offset`` and says how many bytes came; fewer only at the end of the file."""
        done, size = 0, len(buffer)
        while done < size:
            got = self._moved(handle, self._read_some, buffer[done:] if done else buffer, offset + done)
            done += got
            if got == 0 or (handle.direct and got % 512):  # the end of the file
                break
        return done

    def write(self, handle: Handle, data: memoryview, offset: int) -> None:
        """Writes all of ``data``."""
        done, size = 0, len(data)
        while done < size:
            put = self._moved(handle, self._write_some, data[done:] if done else data, offset + done)
            if put == 0:
                raise OSError(errno.EIO, "nothing was written", handle.path)
            done += put

    def _moved(self, handle: Handle, move: Callable[[int, memoryview, int], int], part: memoryview, offset: int) -> int:
        try:
            return move(handle.fd, part, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not handle.direct:
                raise
        # Some filesystems take the flag and refuse the transfer; a short one may also leave an odd rest.
        fcntl.fcntl(handle.fd, fcntl.F_SETFL, fcntl.fcntl(handle.fd, fcntl.F_GETFL) & ~self._direct)
        handle.direct = False
        return move(handle.fd, part, offset)

    def _read_some(self, fd: int, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(fd, [buffer], offset)
        data = os.pread(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def _write_some(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def sync(self, handle: Handle) -> None:
        """What was written to the file survives a loss of power from now on."""
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(handle.fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(handle.fd)

    def sync_folder(self, path: str) -> None:
        """So do the names in a folder."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def allocate(self, handle: Handle, length: int) -> None:
        """Makes the file ``length`` bytes long, with the space reserved where the system can; it reads as zeros."""
        if self.portable or not _fallocate(handle.fd, 0, 0, length):
            os.ftruncate(handle.fd, length)

    def zero(self, handle: Handle, offset: int, length: int) -> None:
        """Makes a range of whole pages read as zeros, nothing of it left on the medium as far as we can reach."""
        if not self.portable:
            for mode in (_ZERO_RANGE | _KEEP_SIZE, _PUNCH_HOLE | _KEEP_SIZE):
                if _fallocate(handle.fd, mode, offset, length):
                    return
        with mmap.mmap(-1, min(length, 1 << 20)) as blank, memoryview(blank) as view:
            for start in range(0, length, len(view)):
                with view[: min(len(view), length - start)] as part:
                    self.write(handle, part, offset + start)

    def truncate(self, handle: Handle, length: int) -> None:
        """Cuts or extends the file."""
        os.ftruncate(handle.fd, length)

    def map(self, handle: Handle) -> mmap.mmap:
        """The whole file, which must not be empty, mapped to be read only."""
        return mmap.mmap(handle.fd, 0, prot=mmap.PROT_READ)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return os.stat(path).st_size

    def exists(self, path: str) -> bool:
        """Whether there is anything of that name."""
        return os.path.lexists(path)

    def is_folder(self, path: str) -> bool:
        """Whether it is a folder, or a link to one."""
        return os.path.isdir(path)

    def mode(self, path: str) -> int:
        """Who may do what with it: the permission bits."""
        return os.stat(path).st_mode & 0o777

    def names(self, path: str) -> list[str]:
        """Names in a folder, sorted."""
        return sorted(os.listdir(path))

    def make_folder(self, path: str) -> None:
        """Makes a folder 0700 with its parents; one that is there is left as it is."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise

    def remove(self, path: str) -> None:
        """Unlinks a file, or removes an empty folder."""
        try:
            os.unlink(path)
        except (IsADirectoryError, PermissionError):  # what Linux and macOS say of a folder
            os.rmdir(path)

    def rename(self, old: str, new: str) -> None:
        """Renames within a filesystem, over what is there."""
        os.rename(old, new)

    def read_small(self, path: str, limit: int = 1 << 20) -> bytes:
        """The file's first ``limit`` bytes."""
        with open(path, "rb", buffering=0) as file:
            return file.read(limit)

    def write_small(self, path: str, data: bytes) -> None:
        """Replaces a file, all or nothing, durable when it returns."""
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f"{TEMPORARY}{name}-{self.random(6).hex()}")
        handle = self.open(temporary, create=True)
        try:
            try:
                self.write(handle, memoryview(data), 0)
                self.sync(handle)
            finally:
                self.close(handle)
            self.rename(temporary, path)
        except OSError:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            raise
        self.sync_folder(folder or ".")

    def lock(self, path: str) -> Handle:
        """Takes the lock for this process, until it is closed or the process ends; raises ``Held``."""
        handle = Handle(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), path)
        try:
            fcntl.flock(handle.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle.fd, 0)
            os.pwrite(handle.fd, f"pid {os.getpid()} ({_command()})\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(handle.fd, 512, 0).decode(errors="replace").strip()
            self.close(handle)
            raise Held(holder) from None
        except OSError:
            self.close(handle)
            raise
        _locks.add(handle)
        return handle

    def space(self, path: str) -> Space:
        """What the filesystem of ``path`` has left."""
        found = os.statvfs(path)
        return Space(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)

    def now(self) -> float:
        """Unix seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def random(self, count: int) -> bytes:
        """Random bytes from the system."""
        return os.urandom(count)


def _command() -> str:
    """The program and its first argument: enough to find it, little enough to hold no secret."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return " ".join([name if name not in ("", "-c") else os.path.basename(sys.executable), *sys.argv[1:2]])[:80]


@lru_cache(maxsize=1)
def _libc() -> Any:
    import ctypes  # 10 ms that only those pay who open a disk tier

    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "fallocate"):
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc, ctypes.get_errno


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """False when the filesystem cannot do it; other failures raise."""
    libc, get_errno = _libc()
    while hasattr(libc, "fallocate"):
        if libc.fallocate(fd, mode, offset, length) == 0:
            return True
        if (code := get_errno()) in _REFUSED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return False


Files = OsFiles  # the door's type, for whoever only passes it on; tests derive faulty ones from it

# A child that outlives us must not keep our locks: flock belongs to the open file, which a fork shares.
_locks: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_fork() -> None:
    for handle in list(_locks):
        if handle.fd >= 0:
            os.close(handle.fd)
            handle.fd = -1
    _locks.clear()


os.register_at_fork(after_in_child=_after_fork)
