"""Streams: work that runs in order, beside the thread that asks for it, and events that say how far it has come.

On CUDA a stream is one of the device's own. In plain memory it is a thread, so that the same code runs, and the same
races can be shown, where there is no GPU. torch is imported by what needs it, not by this module.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from queue import Empty, Queue
from typing import TYPE_CHECKING, Protocol

from kvstore.errors import StoreClosed

if TYPE_CHECKING:
    import torch

log = logging.getLogger("kvstore")

WAITING_WORKS = 4096  # of one thread, at most; who brings more waits
EXIT_SECONDS = 5.0  # that work under way may take when the interpreter ends


class Event(Protocol):
    """A point in a stream's work. Any thread may ask."""

    def done(self) -> bool:
        """Whether all work before it is over; microseconds."""

    def wait(self) -> None:
        """Blocks the calling thread until it is."""


class Stream(Protocol):
    """Work in order. Works of different streams run at the same time, but for what ``wait`` orders."""

    def run(self, work: Callable[[], None]) -> None:
        """Has ``work`` done behind everything that was asked for before. Raises what work raised, or earlier work."""

    def record(self) -> Event:
        """An event behind everything that was asked for before."""

    def wait(self, event: Event) -> None:
        """What is asked for from now on starts after ``event``, of whatever stream it is."""

    def close(self) -> None:
        """Waits until all work is over. Raises what work raised and nobody has been told of. Again is no error."""


class ThreadEvent:
    """An event of a ``ThreadStream``."""

    def __init__(self) -> None:
        self._reached = threading.Event()

    def done(self) -> bool:
        """See ``Event``."""
        return self._reached.is_set()

    def wait(self) -> None:
        """See ``Event``."""
        self._reached.wait()

    def reach(self) -> None:
        """Called by the stream when it is there."""
        self._reached.set()


class ThreadStream:
    """A stream in plain memory: one thread. ``name`` is the thread's; at most ``room`` works wait.

    Work that raises does not stop what comes behind it: the error is logged, and raised by the next ``run`` or by
    ``close``, once. Where strangers share the stream it ``tells`` nobody: the log has it.
    """

    def __init__(self, name: str, room: int = WAITING_WORKS, tells: bool = True) -> None:
        self._tells = tells
        self._works: Queue[Callable[[], None] | None] = Queue(room)
        self._door = threading.Lock()  # nothing is queued behind the end
        self._closed = False  # guarded by _door
        self._error: BaseException | None = None  # replaced in one step, so no lock
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def run(self, work: Callable[[], None]) -> None:
        """See ``Stream``. Blocks while too many works wait."""
        self._raise()
        self._queue(work)

    def record(self) -> ThreadEvent:
        """See ``Stream``."""
        event = ThreadEvent()
        self._queue(event.reach)
        return event

    def wait(self, event: Event) -> None:
        """See ``Stream``."""
        if not event.done():
            self._queue(event.wait)

    def close(self) -> None:
        """See ``Stream``; joins the thread, unless it is its own work that closes it."""
        with self._door:
            first, self._closed = not self._closed, True
        if first:
            self._works.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self._end)
        self._raise()

    def _end(self) -> None:
        """The interpreter ends: what has not begun is dropped. Work in torch that went on would abort the process."""
        if not self._thread.is_alive():  # so it is in the child of a fork, too
            return
        self._closed = True
        try:
            while True:
                self._works.get_nowait()
        except Empty:
            self._works.put(None)
        self._thread.join(EXIT_SECONDS)

    def _queue(self, work: Callable[[], None]) -> None:
        with self._door:
            if self._closed:
                raise StoreClosed(f"the stream {self._thread.name} is closed")
            self._works.put(work)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            try:
                work()
            except Exception as error:  # top loop: what stands behind broken work waits for its events
                log.exception("work in the stream %s failed", self._thread.name)
                self._error = self._error or (error if self._tells else None)


class _Reached:
    """An event of work that was over before anybody could ask."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class CallerStream:
    """The thread that asks does the work at once: what an engine on the CPU is."""

    def run(self, work: Callable[[], None]) -> None:
        """See ``Stream``."""
        work()

    def record(self) -> Event:
        """See ``Stream``."""
        return _Reached()

    def wait(self, event: Event) -> None:
        """See ``Stream``; blocks."""
        event.wait()

    def close(self) -> None:
        """See ``Stream``; all work is over already."""


class CudaEvent:
    """An event of a ``CudaStream``. Where the device has failed, nothing goes on: then it counts as reached."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        """See ``Event``."""
        try:
            return bool(self.event.query())
        except RuntimeError as error:
            log.warning("the device has failed: %s", error)
            return True

    def wait(self) -> None:
        """See ``Event``."""
        self.event.synchronize()


class CudaStream:
    """A stream of a CUDA device. ``work`` runs on the host at once; what it launches goes into the stream.

    ``stream``: one that exists and is somebody else's; by default a new one. Like all of CUDA: not after a fork.
    """

    def __init__(self, device: torch.device | str, stream: torch.cuda.Stream | None = None) -> None:
        import torch

        self.stream = torch.cuda.Stream(torch.device(device)) if stream is None else stream
        self._own = stream is None

    def run(self, work: Callable[[], None]) -> None:
        """See ``Stream``."""
        import torch

        with torch.cuda.stream(self.stream):
            work()

    def record(self) -> CudaEvent:
        """See ``Stream``."""
        return CudaEvent(self.stream.record_event())

    def wait(self, event: Event) -> None:
        """See ``Stream``. An event that is not of CUDA is waited for by the calling thread."""
        if isinstance(event, CudaEvent):
            self.stream.wait_event(event.event)
        else:
            event.wait()

    def close(self) -> None:
        """See ``Stream``; a stream that is somebody else's is left alone."""
        if self._own:
            self.stream.synchronize()


def current(device: torch.device | str) -> Stream:
    """The stream in which the calling thread's engine works on ``device`` now."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return CudaStream(device, torch.cuda.current_stream(device))
    return CallerStream()
