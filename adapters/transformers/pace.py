"""How fast this model computes and its store loads, as measured: how far ahead to load, and whether to load at all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.adapters.transformers.stopwatch import Stopwatch
from kvstore.policies.cost import Costs
from kvstore.policies.read_buffer import layers_ahead, read_buffer
from kvstore.policies.split import Decision, Prospect, split

WEIGHT = 0.25  # of the newest measurement
UNSETTLED = 64  # passes that the device may be behind with; older ones are not learned from


class Work(NamedTuple):
    """A forward pass: how many sequences, of how many new columns, behind how many cached ones."""

    rows: int
    new: int
    cached: int


class Pace:
    """What is known of one model beside one store. Any thread."""

    def __init__(self, decides: bool = True) -> None:
        """``decides``: whether what is cached may be computed again where that is quicker."""
        self.decides = decides
        self._lock = threading.Lock()  # guards the fields below
        self._load = self._prefill = 0.0  # running means of seconds per token over all layers; 0: not measured yet
        self._costs = Costs()
        self._running = deque[tuple[Stopwatch, Work]](maxlen=UNSETTLED)  # passes whose end the device has not reached

    def loaded(self, seconds: float, tokens: int) -> None:
        """Loading all layers of so many tokens took so long, waiting for nobody."""
        if tokens:
            with self._lock:
                self._load = _mean(self._load, seconds / tokens)

    def brought(self, seconds: float, size: int) -> None:
        """So many bytes went from memory to where the model reads them."""
        with self._lock:
            self._costs.host.moved(size, seconds)

    def fetched(self, decision: Decision, seconds: float) -> None:
        """All that was decided to be loaded had come from disk after so long."""
        with self._lock:
            self._costs.read(decision.disk_seconds or 0.0, seconds)

    def computed(self, watch: Stopwatch, work: Work) -> None:
        """A forward pass is over, as far as the host is concerned."""
        with self._lock:
            self._running.append((watch, work))
            self._settle()

    def depth(self, history: int, new: int, layers: int) -> int:
        """Layers to have loaded before the forward pass begins, and to be ahead of it from then on."""
        with self._lock:
            self._settle()
            buffer = read_buffer(self._load, history, self._prefill, new, history)
        return layers_ahead(buffer, history, layers)

    def decide(self, tokens: Sequence[int], prospect: Prospect, limit: float) -> Decision:
        """How much of what is cached of prompts of so many ``tokens`` to load, within ``limit`` seconds."""
        with self._lock:
            self._settle()
            return split(tokens, prospect, self._costs, limit)

    def _settle(self) -> None:
        while self._running and (seconds := self._running[0][0].seconds()) is not None:
            rows, new, cached = self._running.popleft()[1]
            self._prefill = _mean(self._prefill, seconds / new)
            self._costs.prefill.took(rows, new, cached, seconds)


def _mean(old: float, new: float) -> float:
    return new if not old else (1 - WEIGHT) * old + WEIGHT * new
