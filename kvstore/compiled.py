"""Functions that numba compiles off the request path. Until they are ready, or without numba, callers use plain code.

Nothing here imports numba before somebody asks, and asking only queues: one thread at a time builds, and ends when
nothing is left to build. A fork waits for the build under way, because a child would inherit locks of the import system
and of the compiler that nobody in it can release.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

log = logging.getLogger("kvstore")

F = TypeVar("F")
Function = TypeVar("Function", bound=Callable[..., object])


class Compiled(Generic[F]):
    """One compiled function, or a few that belong together. Made at module level; any thread may use it."""

    def __init__(self, name: str, build: Callable[[], F]) -> None:
        """``build`` imports numba and returns the function, after a check against plain code on a small input.

        It raises what it likes when there is none to be had (``ImportError`` where numba is missing): that is logged
        once, and callers stay with plain code.
        """
        self.name = name
        self.build = build
        self.function: F | None = None  # written once, by the queue
        self.asked = False  # written by the queue, under its lock

    def get(self, ask: bool = True) -> F | None:
        """The function, or None: not there yet, or not to be had. The first call asks for it, unless told not to.

        Takes microseconds.
        """
        if ask and not self.asked:
            _queue.ask(self)
        return self.function

    def wait(self, timeout: float | None = None) -> F | None:
        """``get``, once it is settled or ``timeout`` seconds are over; for tests and benchmarks."""
        self.get()
        _queue.wait(self, timeout)
        return self.function


def nogil(signature: Any) -> Callable[[Function], Function]:
    """Compiles the decorated function for ``signature`` at once, to run without Python's lock. For ``build`` only.

    ``signature``: of numba, or as it is written. numba keeps the result on disk where the user may write. It knows a
    function by its file and name, and a closure by what it closes over besides: that may be numbers, not intrinsics,
    which are others in each process. Other argument types raise ``TypeError``.
    """
    from numba import njit

    def compiled(function: Function) -> Function:
        kernel: Any
        try:
            kernel = njit(signature, nogil=True, cache=True)(function)
        except (EOFError, OSError, RuntimeError) as error:  # no place to write, a full one, a file cut short
            log.info("%s is compiled anew by each process: %s", function.__name__, error)
            kernel = njit(signature, nogil=True)(function)
        return cast("Function", kernel)

    return compiled


def idle(timeout: float | None = None) -> bool:
    """Waits until nothing is being built and the thread has ended; False when ``timeout`` seconds were not enough."""
    return _queue.idle(timeout)


class _Queue:
    """What is to be built, in order, and the thread that does it."""

    def __init__(self) -> None:
        self._building = threading.RLock()  # held during a build, and across a fork; taken before ``_changed``
        self._changed = threading.Condition()  # guards what follows, and ``asked`` of every Compiled
        self._waiting: list[Compiled[Any]] = []  # the first is being built
        self._thread: threading.Thread | None = None
        self._running = False

    def ask(self, compiled: Compiled[Any]) -> None:
        """Queues a build, once."""
        with self._changed:
            if compiled.asked or not threading.main_thread().is_alive():  # the interpreter ends: no thread any more
                return
            compiled.asked = True
            self._waiting.append(compiled)
            if not self._running:
                self._thread = threading.Thread(target=self._run, name="kvstore-compile", daemon=False)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the system gives no more threads: the next call asks again
                    log.warning("%s is not compiled now: %s", compiled.name, error)
                    self._thread, compiled.asked = None, False
                    self._waiting.clear()
                else:
                    self._running = True

    def wait(self, compiled: Compiled[Any], timeout: float | None) -> None:
        """Until ``compiled`` is built or has failed, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: compiled not in self._waiting, timeout)

    def idle(self, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, timeout):
                return False
            thread = self._thread
        if thread is not None:
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0))
        return thread is None or not thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not threading.main_thread().is_alive():  # the interpreter ends, and waits for this thread
                    self._waiting.clear()
                if not self._waiting:
                    self._running = False
                    self._changed.notify_all()
                    return
                compiled = self._waiting[0]
            with self._building:
                try:
                    compiled.function = compiled.build()
                    log.debug("%s is compiled", compiled.name)
                except ImportError as error:
                    log.info("%s stays plain: %s", compiled.name, error)
                except Exception as error:  # top loop: whatever a compiler does, plain code goes on
                    log.warning("%s stays plain: %s", compiled.name, str(error).strip().split("\n")[0] or repr(error))
                finally:
                    with self._changed:
                        self._waiting.pop(0)
                        self._changed.notify_all()

    def before_fork(self) -> None:
        self._building.acquire()
        self._changed.acquire()

    def after_fork_in_parent(self) -> None:
        self._changed.release()
        self._building.release()

    def after_fork_in_child(self) -> None:
        for compiled in self._waiting:  # the thread is the parent's: the child may ask again
            compiled.asked = False
        self.__init__()  # type: ignore[misc]


_queue = _Queue()
os.register_at_fork(
    before=_queue.before_fork,
    after_in_parent=_queue.after_fork_in_parent,
    after_in_child=_queue.after_fork_in_child,
)
