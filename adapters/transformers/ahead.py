"""Layers are brought to where the model reads them before attention asks: those next in line, in another thread.

One race is worth telling. The cache is dropped while a layer is on its way: (1) the thread has looked, found nobody
against it, and copies from blocks of the store; (2) whoever drops the cache wants the leases to end; (3) were they to
end now, the memory could go while it is read. So the one who drops only says so, and the thread ends the leases.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from kvstore.errors import StoreClosed
from kvstore.store import Store

FEW_TOKENS = 16

log = logging.getLogger("kvstore")


class Worker(Protocol):
    """Runs what it is given in another thread, in order (a stream of ``kvstore.tensors.streams``)."""

    def run(self, work: Callable[[], None]) -> None:
        """Soon."""


def worker_for(store: Store, new: int, on_device: bool) -> Worker | None:
    """Who brings layers ahead of a pass over ``new`` tokens; None: it does not pay, and they come when asked for.

    A pass over few tokens in which torch uses every core has little to hide a load under, and no core to do it on.
    """
    if not on_device and new < FEW_TOKENS and torch.get_num_threads() >= (os.cpu_count() or 1):
        return None
    try:
        return store.worker()
    except (StoreClosed, RuntimeError):  # closed, or the system gives no more threads
        return None


class Ahead:
    """A window of ``depth`` layers, brought by ``bring(layer)`` (None: it cannot), which starts with layer 0.

    All methods but ``close`` belong to the thread in which the model runs.
    """

    def __init__(self, bring: Callable[[int], Any], layers: int, depth: int, worker: Worker) -> None:
        self._bring, self._layers, self._depth, self._worker = bring, layers, depth, worker
        # Reentrant, because a cache may be collected, and so closed, inside any of these sections.
        self._changed = threading.Condition(threading.RLock())  # guards the fields below
        self._queued: set[int] = set()
        self._asked = False  # the worker has been, and has not come to the end of what is queued
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
        with self._changed:
            upto = min(upto, self._layers)
            if self._closed or upto <= self._next:
                return
            self._queued.update(range(self._next, upto))
            self._next = upto
            if self._asked:
                return
            self._asked = True
        # One work at a time, however many layers: a worker that is held up must not fill up and hold up the model.
        with contextlib.suppress(StoreClosed):  # then nobody begins; whoever asks does it himself
            self._worker.run(self._work)

    def _work(self) -> None:
        while (layer := self._begun()) is not None:
            self._run(layer)

    def _begun(self) -> int | None:
        with self._changed:
            self._running = min(self._queued, default=None)
            if self._running is None:
                self._asked = False
            else:
                self._queued.discard(self._running)
            return self._running

    def _run(self, layer: int) -> None:
        brought = None
        try:
            brought = self._bring(layer)
        except Exception as error:  # top of a thread's work: whoever asks for the layer tries again, and hears of it
            # As text: an error refers to everything on its way here, and who keeps log records would keep it all.
            log.warning("layer %d could not be brought ahead: %s: %s", layer, type(error).__name__, str(error))
        finally:
            with self._changed:
                self._running = None
                if brought is not None and not self._closed:
                    self._brought[layer] = brought
                then, self._when_over = self._when_over, None
                self._changed.notify_all()
            if then is not None:
                then()
