"""How long a model works, in pieces: by the clock on a CPU; on a GPU, which the host is ahead of, by its events."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Adds up what lies between ``start`` and ``stop``. For the thread in which the model runs, but for ``seconds``."""

    def start(self) -> None:
        """Work begins."""

    def stop(self) -> None:
        """It is over."""

    def seconds(self) -> float | None:
        """All work together; None as long as the device is not through with it. Blocks nobody."""


def stopwatch(device: torch.device) -> Stopwatch:
    """One for a model on this device."""
    return EventWatch(device) if device.type == "cuda" else ClockWatch()


class ClockWatch:
    """See ``Stopwatch``."""

    def __init__(self) -> None:
        self._total, self._since = 0.0, 0.0

    def start(self) -> None:
        """See ``Stopwatch``."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """See ``Stopwatch``."""
        self._total += time.perf_counter() - self._since

    def seconds(self) -> float:
        """See ``Stopwatch``."""
        return self._total


class EventWatch:
    """See ``Stopwatch``. What the stream waits for between a stop and the next start, such as loads, is not counted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        """See ``Stopwatch``."""
        self._record()

    def stop(self) -> None:
        """See ``Stopwatch``."""
        self._record()

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def seconds(self) -> float | None:
        """See ``Stopwatch``."""
        try:
            if not self._events[-1].query():
                return None
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            seconds: float = sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
            return seconds
        except RuntimeError:  # the device has failed
            return None
