"""What ``kvstore doctor`` looks at of a cache directory, a socket, a daemon and a Redis."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.cli.machine import Finding
from kvstore.errors import BadInput, Unreachable
from kvstore.figures import plain, size, span

if TYPE_CHECKING:
    from kvstore.daemon.operator import Operator
    from kvstore.settings import Settings

PATIENCE = 2.0  # seconds that a daemon or a Redis has for an answer
ANSWER = 1 << 20  # bytes that it may say


def directory(place: Path) -> Iterator[Finding]:
    """Who may use it, and what its filesystem can do."""
    from kvstore.cli.target import is_cache
    from kvstore.files import OsFiles
    from kvstore.tiers.folder import filesystem, is_network

    name = "directory"
    if not place.exists():
        parent = next(above for above in place.parents if above.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding(name, "pass", f"{place} is not there yet; kvstore serve makes it")
        else:
            yield Finding(
                name, "fail", f"{place} is not there, and {parent} may not be written to", "make it, or choose another"
            )
        return
    if not is_cache(place) and any(place.iterdir()):
        yield Finding(name, "fail", f"{place} is neither empty nor a cache", "give a directory of its own")
        return
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            name, "fail", f"{place} may not be written to by user {os.getuid()}", f"chown it to {os.getuid()}"
        )
        return
    mode = stat.S_IMODE(place.stat().st_mode)
    if mode & 0o077:
        what = f"{place} (mode {mode:04o}) lets others in, who may read what conversations were about"
        yield Finding(name, "warn", what, f"chmod 700 {place}")
    else:
        yield Finding(name, "pass", f"{place} is this user's alone")
    kind = filesystem(OsFiles(), str(place))
    if is_network(kind):
        what = f"{kind} is another machine's: the index is read anew at each start"
        yield Finding("filesystem", "warn", what, "give a directory on a local disk")
    else:
        yield Finding("filesystem", "pass", kind or "unknown")
    yield direct(place)


def direct(place: Path) -> Finding:
    """Whether reads and writes can go past the page cache; a page is written there, and removed."""
    from kvstore.files import TEMPORARY, OsFiles

    files, path = OsFiles(), str(place / f"{TEMPORARY}doctor-{os.urandom(6).hex()}")
    try:
        handle = files.open(path, create=True, direct=True)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view:
                files.write(handle, view, 0)
            worked = handle.direct
        finally:
            files.close(handle)
            files.remove(path)
    except OSError as error:
        return Finding("direct I/O", "fail", f"nothing can be written: {error}", "mend the disk, or choose another")
    if worked:
        return Finding("direct I/O", "pass", "reads and writes go past the page cache")
    what = "the filesystem has none: reads and writes go through the page cache and cost more of the CPU"
    return Finding("direct I/O", "warn", what, "a disk with ext4 or xfs is faster")


def space(place: Path, budget: int) -> Finding:
    """The disk budget against what is there."""
    from kvstore.files import OsFiles

    there = next(path for path in (place, *place.parents) if path.exists())
    found = OsFiles().space(str(there))
    used = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
    what = f"{size(budget)} is the budget, {size(used)} is in use, {size(found.free)} is free"
    if budget > found.total:
        return Finding(
            "disk space", "fail", what, f"the filesystem has {size(found.total)} in all; give less with --disk"
        )
    if budget - used > found.free:
        return Finding("disk space", "warn", what, "the cache cannot become as large as that; free some, or give less")
    return Finding("disk space", "pass", what)


def newest(place: Path) -> float:
    """When the youngest file was written (Unix seconds); 0 where there is none."""
    return max((path.stat().st_mtime for path in place.rglob("*") if path.is_file()), default=0.0)


def held(place: Path) -> bool:
    """Whether a process has the directory open."""
    from kvstore.tiers.folder import VERSION_FOLDER

    try:
        fd = os.open(place / VERSION_FOLDER / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def index(place: Path) -> Finding:
    """The index of a directory; that of one in use is its user's business."""
    from kvstore.files import OsFiles
    from kvstore.tiers.catalog import Doubt
    from kvstore.tiers.folder import VERSION_FOLDER
    from kvstore.tiers.lmdb_check import sound

    folder = place / VERSION_FOLDER / "index"
    if held(place):
        return Finding("index", "pass", "in use by a process")
    if not folder.is_dir():
        return Finding("index", "pass", "there is none yet")
    try:
        clean = sound(OsFiles(), str(folder))
    except Doubt as doubt:
        return Finding(
            "index", "warn", str(doubt), "nothing: it is made anew from the blocks when the directory is opened"
        )
    if clean:
        return Finding("index", "pass", "it is bit for bit what was closed")
    what = "its last user was killed; its pages are sound"
    return Finding("index", "warn", what, "nothing: each entry is checked when the directory is opened")


def socket(path: Path) -> Finding:
    """Who may connect."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return Finding("socket", "warn", f"{path} is not there", "start a daemon: kvstore serve")
    except OSError as error:
        return Finding("socket", "fail", f"{path} cannot be reached: {error.strerror}", "look at the folders above it")
    mode = stat.S_IMODE(found.st_mode)
    what = f"{path}, user {found.st_uid}, group {found.st_gid}, mode {mode:04o}"
    if not stat.S_ISSOCK(found.st_mode):
        return Finding("socket", "fail", f"{path} is no socket", "name the socket that kvstore serve listens at")
    if not os.access(path, os.W_OK):
        return Finding(
            "socket", "fail", f"{what}: closed to user {os.getuid()}", "socket_mode and socket_group open it"
        )
    if mode & 0o002:
        return Finding("socket", "warn", f"{what}: everybody here may connect", "set socket_mode 0660, or allow_uids")
    return Finding("socket", "pass", what)


def answering(found: Operator) -> Finding:
    """A daemon that is there."""
    import kvstore

    about, took = found.about(), found.ping()
    what = f"process {about.pid}, version {about.version}, up {span(about.uptime)}, answers in {took * 1e6:.0f} µs"
    if about.version != kvstore.__version__:
        remedy = f"this is kvstore {kvstore.__version__}; restart the daemon, or install the same here"
        return Finding("daemon", "warn", what, remedy)
    return Finding("daemon", "pass", what)


def silent(error: Unreachable) -> Finding:
    """A daemon that is not."""
    if isinstance(error.__cause__, Unreachable):
        return Finding("daemon", "warn", "none is running here", "kvstore serve starts one")
    return Finding("daemon", "fail", str(error), "its log says more")


def redis(settings: Settings) -> Finding | None:
    """The Redis that settings name, if they name one. Nothing of a URL but its hosts is shown."""
    if settings.redis.url is None:
        return None
    try:
        from redis import RedisError

        from kvstore.tiers.bounded import bounded
        from kvstore.tiers.redis_client import client, disconnect, target

        where = target(settings.redis.url.get_secret_value())
    except ModuleNotFoundError as error:
        return Finding("redis", "fail", f"{error.name} is not there", "pip install 'kvstore-llm[redis]'")
    except BadInput as error:
        return Finding("redis", "fail", str(error), "mend redis.url")
    try:
        with bounded(PATIENCE, ANSWER):
            made = client(where)
            made.ping()
            disconnect(made)
    except (RedisError, OSError) as error:
        what = f"{where.place} does not answer: {plain(str(error))}"
        return Finding("redis", "warn", what, "a daemon does without it until it is there")
    return Finding("redis", "pass", f"{where.place} answers")
