"""What ``kvstore doctor`` looks at of the machine and of this process."""

from __future__ import annotations

import mmap
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from kvstore.figures import size, span

PACKAGE = "kvstore-llm"
LEAST_PYTHON = (3, 11)
WANTED = ("serve", "redis")  # extras that a daemon may need
FEW_FILES = 4096  # descriptors that a daemon with many clients may come near
OWN = 150 << 20  # bytes that a daemon takes beside its budget
OLD = 1_704_067_200  # 2024: no clock that is set says less
AHEAD = 60.0  # seconds that a file may be younger than the clock
SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
GPU = Path("/dev/nvidiactl")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*?>=\s*([0-9.]+)[^;]*(?:;.*extra == ['\"](\w+)['\"].*)?")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``what`` there is, and, unless it is fine, what to do about it."""

    name: str
    state: Literal["pass", "warn", "fail"]
    what: str
    remedy: str = ""


def findings(host: int | None, newest: float) -> Iterator[Finding]:
    """``host``: bytes of memory that a daemon has, or would have; None: nobody knows. ``newest``: when the youngest
    file of the directory was written (Unix seconds), 0 where there is none."""
    yield python()
    yield from packages()
    yield shared_memory()
    if host is not None:
        yield memory(host)
    yield open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], GPU.exists())
    yield huge_pages(SHMEM)
    yield Finding(
        "/dev/shm", "pass", "not used: memory is shared by descriptor, and has no name that could be left behind"
    )
    yield clock(time.time(), newest)


def python() -> Finding:
    """The interpreter, and the kernel."""
    found = f"{platform.python_version()} on {platform.system()} {platform.release()}"
    if sys.version_info[:2] < LEAST_PYTHON:
        return Finding("python", "fail", found, f"install Python {'.'.join(map(str, LEAST_PYTHON))} or later")
    return Finding("python", "pass", found)


def packages() -> Iterator[Finding]:
    """What kvstore was installed with, and the extras that a daemon may need."""
    try:
        wanted = requires(PACKAGE) or []
    except PackageNotFoundError:
        yield Finding(
            "packages", "warn", "kvstore runs from its source", f"pip install {PACKAGE} sees to what it needs"
        )
        return
    fine = [f"kvstore {version(PACKAGE)}"]
    for one in wanted:
        match = _REQUIREMENT.fullmatch(one)
        if match is None or match[3] not in (None, *WANTED):
            continue
        name, least, extra = match.groups()
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        if found and numbers(found) >= numbers(least):
            fine.append(f"{name} {found}")
            continue
        target = f"'{PACKAGE}[{extra}]'" if extra else PACKAGE
        what = f"{name} {found or 'is not there'}" + (f", which is older than {least}" if found else "")
        yield Finding("packages", "warn" if extra else "fail", what, f"pip install {target}")
    yield Finding("packages", "pass", ", ".join(fine))


def numbers(text: str) -> tuple[int, ...]:
    """A version, to compare with another."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def shared_memory() -> Finding:
    """Whether memory can be shared so that only one process writes."""
    from kvstore.daemon.arenas import create

    try:
        fd, mapping = create("doctor", mmap.PAGESIZE, writable=False)
    except (OSError, AttributeError) as error:
        return Finding("shared memory", "fail", f"memfd with F_SEAL_FUTURE_WRITE: {error}", "run Linux 5.1 or later")
    with mapping:
        try:
            mmap.mmap(fd, mmap.PAGESIZE).close()
        except PermissionError:
            return Finding("shared memory", "pass", "memfd works, and what is sealed cannot be written by others")
        finally:
            os.close(fd)
    return Finding("shared memory", "fail", "a sealed memfd could be written by others", "run Linux 5.1 or later")


def memory(host: int) -> Finding:
    """The budget against the memory there is; arenas are memory of the daemon like any other."""
    from kvstore.tiers.host import memory_limit

    limit = memory_limit()
    what = f"{size(host)} for blocks, about {size(OWN)} beside them; this cgroup or machine has {size(limit)}"
    if host > limit:
        return Finding(
            "memory", "fail", what, f"give --host {max((limit - OWN) * 8 // 10, 0) >> 20}MiB, or raise the limit"
        )
    if host + OWN > limit * 0.9:
        remedy = "leave more to workers and to the system: a smaller --host, or a higher limit"
        return Finding("memory", "warn", what, remedy)
    return Finding("memory", "pass", what)


def open_files(soft: int, hard: int) -> Finding:
    """Descriptors: a daemon raises the soft limit to the hard one by itself."""
    shown = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    what = f"{soft:,} open files, and a daemon may raise that to {shown}"
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        return Finding(
            "open files", "warn", what, f"raise it where many clients come: LimitNOFILE={FEW_FILES}, ulimit -Hn"
        )
    return Finding("open files", "pass", what)


def locked_memory(limit: int, gpu: bool) -> Finding:
    """RLIMIT_MEMLOCK: only drivers that pin memory for a device may count it."""
    shown = "no limit" if limit == resource.RLIM_INFINITY else size(limit)
    if gpu and limit != resource.RLIM_INFINITY and limit < OWN:
        remedy = "if workers log that host memory cannot be pinned, raise it: LimitMEMLOCK=infinity, ulimit -l"
        return Finding("locked memory", "warn", f"{shown}, and there is a GPU to pin for", remedy)
    return Finding("locked memory", "pass", f"{shown}; a daemon locks none")


def huge_pages(path: Path) -> Finding:
    """Whether arenas may have huge pages, which makes the first use of them cheaper."""
    try:
        text = path.read_text()
    except OSError:
        return Finding("huge pages", "pass", "this system does not say")
    chosen = next(iter(re.findall(r"\[(\w+)\]", text)), "unknown")
    if chosen in ("never", "deny"):
        return Finding("huge pages", "warn", f"shared memory has none ({chosen})", f"as root: echo advise > {path}")
    return Finding("huge pages", "pass", f"shared memory may have them ({chosen})")


def clock(now: float, newest: float) -> Finding:
    """The wall clock, by which blocks expire."""
    if now < OLD:
        return Finding("clock", "fail", "it is not set", "set it: blocks expire by it")
    if newest > now + AHEAD:
        what = f"it is {span(newest - now)} behind the youngest file of the cache"
        return Finding("clock", "warn", what, "set it: ages and times to live are wrong by that")
    return Finding("clock", "pass", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))
