"""What the system says of a process."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from pathlib import Path

MIB = 1 << 20


def memory(pid: int, field: str = "RssAnon") -> int:
    """Bytes that are the process's own (arenas, which are shared, left out); ``VmHWM``: the most it ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"there is no {field}")


def idle(pid: int) -> None:
    """Waits until it does nothing: what a daemon compiles when it starts is compiled."""
    pause, before = threading.Event(), -1
    for _ in range(400):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
        now = int(fields[11]) + int(fields[12])
        if now - before <= 1:  # hundredths of a second
            return
        before = now
        pause.wait(0.2)
    raise AssertionError("it is never idle")


def descriptors(pid: int) -> Counter[str]:
    """What its open descriptors lead to, without numbers of inodes."""
    found = Counter[str]()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        found[_name(target)] += 1
    return found


def mappings(pid: int) -> Counter[str]:
    """Its mappings of shared memory, by name."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return Counter(_name("/memfd:" + line.split("/memfd:")[1]) for line in lines if "/memfd:kvstore" in line)


def _name(target: str) -> str:
    """Without numbers of inodes and sessions."""
    return re.sub(r":\[\d+\]|-\d+ \(deleted\)| \(deleted\)", "", target)


def threads(pid: int) -> int:
    """How many it has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def named(pid: int, folder: Path) -> set[str]:
    """What it has mapped or open that has a name in shared memory, but for what is in this folder's parent."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = {line.split(" ", 5)[5].strip() for line in lines if "/dev/shm" in line} | {*descriptors(pid)}
    return {name for name in found if name.startswith("/dev/shm") and not name.startswith(str(folder.parent))}
