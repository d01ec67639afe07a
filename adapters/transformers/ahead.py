"""Layers are brought to where the model reads them before attention asks: those next in line, in another thread.

One race is worth telling. The cache is dropped while a layer is on its way: (1) the thread has looked, found nobody
against it, and copies from blocks of the store; (2) whoever drops the cache wants the leases to end; (3) were they to
end now, the memory could go while it is read. So the one who drops only says so, and the thread ends the leases.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from kvstore.errors import StoreClosed

log = logging.getLogger("kvstore")


class Worker(Protocol):
    """Runs what it is given in another thread, in order (a stream of ``kvstore.tensors.streams``)."""

    def run(self, work: Callable[[], None]) -> None:
        """Soon."""


class Ahead:
    """A window of ``depth`` layers, brought by ``bring(layer)`` (None: it cannot), which starts with layer 0.

    All methods but ``close`` belong to the thread in which the model runs.
    """

    def __init__(self, bring: Callable[[int], Any], layers: int, depth: int, worker: Worker) -> None:
        self._bring, self._layers, self._depth, self._worker = bring, layers, depth, worker
        # Reentrant, because a cache may be collected, and so closed, inside any of these sections.
        self._changed = threading.Condition(threading.RLock())  # guards the fields below
        self._queued: set[int] = set()
        self._running: int | None = None
        self._brought: dict[int, Any] = {}
        self._closed = False
        self._when_over: Callable[[], None] | None = None
        self._next = 0

    def start(self) -> None:
        """Before the forward pass: the first ``depth`` layers."""
        self._queue(self._depth)

    def reached(self, layer: int) -> None:
        """The model computes ``layer``: the window moves on."""
        self._queue(layer + 1 + self._depth)

    def take(self, layer: int) -> Any:
        """What was brought of a layer; None when nobody has begun, or it cannot be had. Waits while it is under way."""
        with self._changed:
            self._queued.discard(layer)  # whoever asks is quicker than a thread that has yet to begin
            while self._running == layer:
                self._changed.wait()
            return self._brought.pop(layer, None)

    def close(self, then: Callable[[], None]) -> None:
        """Bring nothing more, and call ``then`` as soon as nothing is being brought. Again is no error."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._queued.clear()
            self._brought.clear()
            if not first:
                return
            if self._running is not None:
                self._when_over = then
                return
        then()

    def _queue(self, upto: int) -> None:
        while self._next < min(upto, self._layers):
            layer, self._next = self._next, self._next + 1
            with self._changed:
                self._queued.add(layer)
            try:
                self._worker.run(lambda layer=layer: self._run(layer))  # type: ignore[misc]
            except StoreClosed:
                return  # nobody will begin; whoever asks does it himself

    def _run(self, layer: int) -> None:
        with self._changed:
            if layer not in self._queued:
                return
            self._queued.discard(layer)
            self._running = layer
        brought = None
        try:
            if not self._closed:
                brought = self._bring(layer)
        except Exception as error:  # top of a thread's work: whoever asks for the layer tries again, and hears of it
            log.warning("layer %d could not be brought ahead: %s", layer, error)
        finally:
            with self._changed:
                self._running = None
                if brought is not None and not self._closed:
                    self._brought[layer] = brought
                then, self._when_over = self._when_over, None
                self._changed.notify_all()
            if then is not None:
                then()
