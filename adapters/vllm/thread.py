"""A thread that does what it is given, one after the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

log = logging.getLogger("kvstore")


class Worker:
    """One thread. Whoever gives it tasks closes it."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, task: Callable[[], None]) -> None:
        """Asks for a task. Any thread."""
        self._tasks.put(task)

    def close(self, timeout: float) -> None:
        """Waits until all tasks are done; a thread that is stuck is left."""
        self._tasks.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:  # top loop: the engine computes, or misses, what failed here
                log.warning("%s: %s: %s", threading.current_thread().name, type(error).__name__, error)
