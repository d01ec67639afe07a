"""Memory that a client has mapped, pinned for the device that copies from it and to it: in a thread, beside its work.

An arena is unmapped by whoever drops the last view of it, in any thread. One that is pinned is not: it comes back here
(``Shared.leaving``), is unpinned, and goes then. So a load that outlives its session, and the daemon, is copied at the
pinned rate to its end, and no address is ever pinned that is somebody else's memory by now.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import NamedTuple
from weakref import WeakSet

from kvstore.daemon.mapped import Shared
from kvstore.tiers.base import Pins

log = logging.getLogger("kvstore")


class Both(NamedTuple):
    """What pins the daemon's memory, which can only be read here, and the client's own."""

    theirs: Pins
    own: Pins


def nothing() -> Both | None:
    """Where no device is."""
    return None


class Pinning:
    """Pins the arenas of one client, those of all its sessions. Any thread.

    What is refused stays pageable, which is slower and nothing else.
    """

    def __init__(self, find: Callable[[], Both | None] = nothing) -> None:
        """``find`` is asked for pins while memory waits for some, until it has given them."""
        self._find, self._pid = find, os.getpid()
        self._work = SimpleQueue[Shared | None]()  # what has come, and what leaves; finalizers may put into it
        self._lock = threading.Lock()  # guards the fields below
        self._mapped, self._waiting = WeakSet[Shared](), WeakSet[Shared]()
        self._pins: Both | None = None
        self._pinned_bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        # The thread's own.
        self._pinned: dict[int, tuple[Pins, int]] = {}  # by address: what pins it, bytes
        self._complained = False
        self._over = False  # nothing is pinned any more, nor will be

    def add(self, memory: Shared) -> None:
        """Pins an arena that has just come, as soon as there is a device."""
        with self._lock:
            self._mapped.add(memory)
            self._waiting.add(memory)
        self.look()

    def look(self) -> None:
        """Has what still waits for a device pinned, if there is one now. Costs nothing where nothing waits."""
        if not self._waiting:
            return
        found = self._pins or self._find()
        with self._lock:
            if found is None or self._closed:
                return
            self._pins = found
            if self._thread is None:
                self._start()
            if self._thread is not None:
                for memory in self._waiting:
                    self._work.put(memory)
            self._waiting.clear()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="kvstore-pins", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the next arena tries again
            log.warning("no thread pins what the daemon shares, which stays pageable: %s", str(error))  # not its frames
            return
        self._thread = thread
        atexit.register(self.close)  # a thread that went on to pin would abort the process

    def gauges(self) -> dict[str, int]:
        """``host_pinned_bytes`` and ``host_pageable_bytes``: how much of what is mapped a device copies by itself."""
        with self._lock:
            mapped = sum(len(memory) for memory in self._mapped)
            return {
                "host_pinned_bytes": self._pinned_bytes,
                "host_pageable_bytes": max(mapped - self._pinned_bytes, 0),
            }

    def close(self) -> None:
        """Unpins everything, and ends the thread; again is no error. What loads still look at stays mapped."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is None or not thread.is_alive():  # so it is in the child of a fork
            return
        self._work.put(None)
        thread.join()
        atexit.unregister(self.close)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (memory := self._work.get()) is not None:
            if memory.base in self._pinned:
                self._unpin(memory.base)
            elif not self._closed:
                self._pin(memory)
            del memory  # or it would stay while this thread waits
        for base in list(self._pinned):
            self._unpin(base)
        self._over = True
        with contextlib.suppress(Empty):  # what has left since it was unpinned
            while True:
                self._work.get_nowait()

    def _pin(self, memory: Shared) -> None:
        assert self._pins is not None
        pins, size = self._pins.own if memory.writable else self._pins.theirs, len(memory)
        if pins.pin(memory.base, size):
            self._pinned[memory.base] = pins, size
            memory.leaving = self._left
            with self._lock:
                self._pinned_bytes += size
        elif not self._complained:
            self._complained = True
            log.warning("what the daemon shares cannot be pinned and stays pageable, at first %d bytes", size)

    def _unpin(self, base: int) -> None:
        pins, size = self._pinned.pop(base)
        pins.unpin(base)
        with self._lock:
            self._pinned_bytes -= size

    def _left(self, memory: Shared) -> None:
        """Nobody looks at pinned memory any more; a finalizer, so it takes no lock. A child of a fork has it, too, but
        has pinned nothing."""
        if not self._over and os.getpid() == self._pid:
            self._work.put(memory)
