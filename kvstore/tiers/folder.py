"""The directory of a disk tier: what makes it ours, who holds it, where it lies.

``DIR`` holds ``CACHEDIR.TAG``, ``.gitignore`` and one folder for each format version. Only ``v1`` is ours to touch.
"""

from __future__ import annotations

import errno
import os
import re

from kvstore.errors import BadInput, StoreBusy, TierError
from kvstore.files import TEMPORARY, Files, Handle, Held

VERSION_FOLDER = "v1"
TAG = "CACHEDIR.TAG"
TAG_TEXT = b"""Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of kvstore: everything in it can be computed again, and it may be deleted as a whole
# while no kvstore process has it open. https://bford.info/cachedir/ says what this file is for.
"""
_OURS = b"kvstore"
_NETWORK = re.compile(
    r"nfs4?|cifs|smb.*|9p|afs|ceph|gluster.*|lustre|gpfs|beegfs|pvfs2|orangefs|ncpfs"
    r"|fuse\.(ssh|gluster|ceph|s3|gcsfuse|rclone|juice|moose).*"
)
_CALLERS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


class Folder:
    """A cache directory, held by this process until ``close``."""

    def __init__(self, files: Files, path: str | os.PathLike[str], *, create: bool = True) -> None:
        """Takes the directory. Raises ``BadInput`` for one that is no cache, ``StoreBusy`` when another holds it."""
        self._files = files
        self.path = os.path.abspath(path)
        self.data = os.path.join(self.path, VERSION_FOLDER)
        try:
            self._prepare(create)
            self._lock = self._take()
        except OSError as error:
            if error.errno in _CALLERS:
                raise BadInput(
                    f"{self.path!r} cannot be used as a cache: {error.strerror}; give a directory that you may write to"
                ) from error
            raise TierError(f"{self.path!r} cannot be opened: {error}") from error

    def _prepare(self, create: bool) -> None:
        files, there = self._files, self._files.exists(self.path)
        if there and not files.is_folder(self.path):
            raise BadInput(f"{self.path!r} is a file; give a directory for the cache")
        names = [name for name in files.names(self.path) if not name.startswith(TEMPORARY)] if there else []
        ours = self._ours(names)
        if not ours and (names or not create):
            raise BadInput(f"{self.path!r} is not a kvstore cache; give a cache, or an empty or new directory")
        if not there:
            files.make_folder(self.path)
            files.sync_folder(os.path.dirname(self.path))
        for name, text in ((TAG, TAG_TEXT), (".gitignore", b"*\n")):
            if name not in names:
                files.write_small(os.path.join(self.path, name), text)
        if VERSION_FOLDER not in names:
            files.make_folder(self.data)
            files.sync_folder(self.path)

    def _ours(self, names: list[str]) -> bool:
        if TAG in names:
            return _OURS in self._files.read_small(os.path.join(self.path, TAG), 4096)
        # Somebody took the tag away: our lock or extents say the same.
        return VERSION_FOLDER in names and "lock" in self._files.names(self.data)

    def _take(self) -> Handle:
        try:
            lock = self._files.lock(os.path.join(self.data, "lock"))
        except Held as held:
            raise StoreBusy(
                f"the cache {self.path!r} is in use by {held.holder}; stop it, wait for it, or give another directory"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise BadInput(
                f"the filesystem of {self.path!r} cannot lock files, so two processes could spoil each other's work; "
                "give a directory on a local disk"
            ) from error
        try:
            self._sweep()
        except BaseException:
            self._files.close(lock)
            raise
        return lock

    def _sweep(self) -> None:
        """Removes what a crash left half written."""
        for folder in (self.path, self.data):
            for name in self._files.names(folder):
                if name.startswith(TEMPORARY):
                    self._files.remove(os.path.join(folder, name))

    def network(self) -> str:
        """Type of the filesystem when it is a network's, else an empty string."""
        kind = filesystem(self._files, self.path)
        return kind if is_network(kind) else ""

    def close(self) -> None:
        """Lets go of the directory."""
        self._files.close(self._lock)


def filesystem(files: Files, path: str) -> str:
    """Type of the filesystem that holds a path; empty where the system does not say."""
    try:
        mounts = files.read_small("/proc/self/mounts").decode(errors="replace")
    except OSError:  # no Linux
        return ""
    real, best, kind = os.path.realpath(path), "", ""
    for line in mounts.splitlines():
        _, point, this = line.split(" ")[:3]
        point = point.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, this
    return kind


def is_network(kind: str) -> bool:
    """Whether filesystems of this type are another machine's."""
    return bool(_NETWORK.fullmatch(kind))
