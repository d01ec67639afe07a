"""How fast this model computes and its store loads, as measured, and how far ahead loading should run."""

from __future__ import annotations

import threading

from kvstore.policies.read_buffer import layers_ahead, read_buffer

WEIGHT = 0.25  # of the newest measurement


class Pace:
    """Running means of seconds per token over all layers. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two fields below; 0: not measured yet
        self._load = 0.0
        self._prefill = 0.0

    def loaded(self, seconds: float, tokens: int) -> None:
        """Loading all layers of so many tokens took so long, waiting for nobody."""
        if tokens:
            with self._lock:
                self._load = _mean(self._load, seconds / tokens)

    def computed(self, seconds: float, tokens: int) -> None:
        """Computing all layers of so many new tokens took so long."""
        if tokens:
            with self._lock:
                self._prefill = _mean(self._prefill, seconds / tokens)

    def depth(self, history: int, new: int, layers: int) -> int:
        """Layers to have loaded before the forward pass begins, and to be ahead of it from then on."""
        with self._lock:
            buffer = read_buffer(self._load, history, self._prefill, new, history)
        return layers_ahead(buffer, history, layers)


def _mean(old: float, new: float) -> float:
    return new if not old else (1 - WEIGHT) * old + WEIGHT * new
